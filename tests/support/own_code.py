"""A user's own code for tests: a file that registers a mixer, and a process that forgets it afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

from hybridzoo.mixers import registry

OWN = """from __future__ import annotations

from dataclasses import dataclass

from hybridzoo.mixers import Carve, register_mixer


@register_mixer("{name}", source="nobody", summary="CARVE under another name")
class Own(Carve):
    @dataclass(frozen=True, kw_only=True)
    class Config(Carve.Config):
        turns: int = 3
"""


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Within, mixers may be registered and modules imported; afterwards both are as they were."""
    before = set(sys.modules)
    with mock.patch.object(registry, "_REGISTRY", dict(registry._REGISTRY)):
        yield
    for name in set(sys.modules) - before:
        if name == "own" or name.startswith(("user_code_", "parcel")):
            del sys.modules[name]
