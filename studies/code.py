"""Which code decides a trial's result, as a hash: part of the trial's key, so that no result of other code is reused.

May import architectures and training. Comments and docstrings do not count; figures and sentences do not either, since
they only show results.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import hybridzoo
from hybridzoo.kernels.source import folder_digest, source_digest

_DECIDING = ("kernels", "mixers", "blocks", "architectures", "training", "studies/tasks")


def code_digest(classes: Iterable[type]) -> str:
    """Return the hash of the zoo's code that trains and scores, and of the modules of `classes` outside the zoo.

    `classes` are a user's own mixers and tasks, among others. Of a script or notebook only the class itself counts, so
    that a changed list of seeds below it trains nothing again. A class without source (typed into a prompt) has none.
    """
    own = sorted({text for cls in classes for text in _sources(cls)})
    return source_digest([f"zoo = '{_zoo_digest()}'", *own])


@functools.cache
def _zoo_digest() -> str:
    root = Path(hybridzoo.__file__).parent
    return folder_digest(*(root / name for name in _DECIDING))


def _sources(cls: type) -> list[str]:
    found = []
    for base in cls.__mro__:
        package = base.__module__.partition(".")[0]
        if package in ("hybridzoo", "torch", "builtins", "typing", "abc"):
            continue
        module = sys.modules.get(base.__module__)
        try:
            if module is None or base.__module__ == "__main__":
                found.append(textwrap.dedent(inspect.getsource(base)))
            else:
                found.append(inspect.getsource(module))
        except (OSError, TypeError):
            continue
    return found
