"""Which code decides a trial's result, as a hash: part of the trial's key, so that no result of other code is reused.

May import architectures and training. Comments and docstrings do not count; figures and sentences do not either, since
they only show results.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import hybridzoo
from hybridzoo.kernels.source import folder_digest, source_digest
from hybridzoo.mixers.user_code import import_user_code

_DECIDING = ("kernels", "mixers", "blocks", "architectures", "training", "studies/tasks")
_SCRIPT = ("__main__", "__mp_main__")  # of the process that was started, and of its workers
_KNOWN = ("hybridzoo", "torch", "builtins", "typing", "abc")  # in no module of these is a user's own code


def code_digest(classes: Iterable[type], modules: Iterable[ModuleType] = ()) -> str:
    """Return the hash of the zoo's code that trains and scores, and of a user's own behind `classes` and `modules`.

    `classes` are a user's own mixers and tasks, among others; `modules` what was imported to register them. A module
    counts as a whole, and so does every one of the user's own that it imports, directly or through others. Of a script
    or notebook only the class itself and what is imported count, so that a changed list of seeds below it trains
    nothing again. A class without source (typed into a prompt) has none.
    """
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__.partition(".")[0] not in _KNOWN}
    typed = [base for base in bases if base.__module__ == "__main__" or base.__module__ not in sys.modules]
    roots = [*modules, *(sys.modules[base.__module__] for base in bases if base.__module__ in sys.modules)]
    reached = [module for module in _reached(roots) if module.__name__ != "__main__"]
    texts = [*map(_source, typed), *map(_source, reached)]
    own = {text for text in texts if text is not None}
    return source_digest([f"zoo = '{zoo_digest()}'", *sorted(own)])


def zoo_digest() -> str:
    """Return the hash of the zoo's own code that trains and scores, as it lies on this machine's disk."""
    return _zoo_digest()


@functools.cache
def _zoo_digest() -> str:
    root = Path(hybridzoo.__file__).parent
    return folder_digest(*(root / name for name in _DECIDING))


def own_digests(imports: Iterable[str]) -> dict[str, str]:
    """Return the hash of each of a user's own modules as it lies on the disk: those that `imports` name, by that word,
    and those that they import, by their name.

    A script that runs a study is left out: a worker may have it under another name, or not at all.
    """
    named = {name: import_user_code(name) for name in imports}
    known = {id(module) for module in named.values()}
    reached = {module.__name__: module for module in _reached(named.values()) if id(module) not in known}
    found = {name: _module_digest(one) for name, one in {**reached, **named}.items() if one.__name__ not in _SCRIPT}
    return {name: digest for name, digest in found.items() if digest}


def changed_modules(planned: Mapping[str, str], imports: Iterable[str]) -> list[str]:
    """Import a user's modules, and name those of `planned`, from `own_digests`, that are not the same here.

    What is imported stays, so each is judged by its text when this process first looked. One that `imports` do not
    name, and that is not imported yet, is not judged.
    """
    named = {name: import_user_code(name) for name in imports}
    here = {name: named.get(name) or sys.modules.get(name) for name in planned}
    return [name for name, one in here.items() if one is not None and _first_digest(one) != planned[name]]


@functools.cache
def _first_digest(module: ModuleType) -> str:
    return _module_digest(module)


def _module_digest(module: ModuleType) -> str:
    """The hash of a module's text; empty for one without source."""
    text = _source(module)
    return "" if text is None else source_digest([text])


def _source(one: type | ModuleType) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(one))
    except (OSError, TypeError):
        return None


def _reached(roots: Iterable[ModuleType]) -> list[ModuleType]:
    """The roots, and all modules of the user's own that they import, each once."""
    found: dict[str, ModuleType] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module.__name__ not in found:
            found[module.__name__] = module
            waiting += [one for name in _imported(module) if (one := sys.modules.get(name)) is not None and _own(one)]
    return list(found.values())


def _imported(module: ModuleType) -> set[str]:
    """The names of modules that `module` holds, that what it holds was defined in, or that its text imports."""
    names = set()
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            names.add(value.__name__)
        elif isinstance(value, type) or inspect.isroutine(value):
            names.add(str(getattr(value, "__module__", "")))
    for node in ast.walk(ast.parse(_source(module) or "")):  # a constant says not where it comes from, its import does
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Of `from ..a import b` in package p.q: p.a, and p.a.b where that is a module.
            outer = (module.__package__ or "").split(".")
            start = outer[: len(outer) - node.level + 1] if node.level else []
            place = ".".join([*start, *filter(None, [node.module])])
            names.update([place, *(f"{place}.{alias.name}" for alias in node.names)])
    return names


def _own(module: ModuleType) -> bool:
    """Whether a module is source that the user may change: not the zoo's, Python's own, or installed."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or module.__name__.partition(".")[0] in _KNOWN:
        return False
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return path.suffix == ".py" and not installed and not any(path.is_relative_to(one) for one in _python_folders())


@functools.cache
def _python_folders() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
