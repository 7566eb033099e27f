"""`${d_model}` in a spec: a value taken from elsewhere in the same file.

OmegaConf does the substitution. Before it may, every interpolation is checked to be a plain path (so that no resolver,
`${oc.env:HOME}` or another, ever runs), its chain to end, and the data to stay small once all are expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from hybridzoo.mixers.schema import SpecError, nearest

MAX_EXPANDED = 100_000  # values and characters of text
MAX_CHAIN = 16

_INTERPOLATION = re.compile(r"\$\{\s*([^{}]*?)\s*\}")
_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def interpolate(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with every `${path.from.the.top}` replaced by the value at that path.

    Raises `SpecError`, its message starting with the key, for anything but a plain path, a path that leads nowhere, a
    cycle, and data that would expand past 100,000 values.
    """
    check = _Check(data)
    total = 0
    for key, value in _leaves(data, ""):
        total += check.extent(value, (key,)).size
        if total > MAX_EXPANDED:
            raise SpecError(f"{key}: interpolations expand to more than {MAX_EXPANDED:,} values")
    resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


class _Extent(NamedTuple):
    """What a value becomes once expanded."""

    size: int = 1
    depth: int = 0  # interpolations that follow one another


class _Check:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.extents: dict[str, _Extent] = {}  # of the values at paths, each measured once

    def extent(self, value: Any, chain: tuple[str, ...]) -> _Extent:
        """Measure a leaf; `chain` holds the keys that led to it, the last its own."""
        if not isinstance(value, str):
            return _Extent()
        paths = _INTERPOLATION.findall(value)
        if "${" in _INTERPOLATION.sub("", value):
            raise SpecError(f"{chain[-1]}: '{value}': an interpolation is '${{path.to.key}}', closed and not nested")
        parts = [self.extent_at(path, chain) for path in paths]
        depth = max((part.depth + 1 for part in parts), default=0)
        if len(chain) - 1 + depth > MAX_CHAIN:
            raise SpecError(f"{chain[-1]}: more than {MAX_CHAIN} interpolations in a chain")
        return _Extent(1 + len(value) + sum(part.size for part in parts), depth)

    def extent_at(self, path: str, chain: tuple[str, ...]) -> _Extent:
        if path not in self.extents:
            # A path inside a value that is being expanded, or around it, would be expanded for ever.
            if any(f"{link}.".startswith(f"{path}.") or f"{path}.".startswith(f"{link}.") for link in chain):
                raise SpecError(f"{chain[-1]}: interpolation goes in a circle: {' -> '.join([*chain, path])}")
            if len(chain) > MAX_CHAIN:
                raise SpecError(f"{chain[-1]}: more than {MAX_CHAIN} interpolations in a chain")
            leaves = [self.extent(leaf, (*chain, key)) for key, leaf in _leaves(self.lookup(path, chain[-1]), path)]
            self.extents[path] = _Extent(sum(leaf.size for leaf in leaves), max(leaf.depth for leaf in leaves))
        return self.extents[path]

    def lookup(self, path: str, key: str) -> Any:
        if ":" in path:
            raise SpecError(f"{key}: '${{{path}}}': resolvers never run; only '${{path.to.key}}' within the file")
        if not _PATH.fullmatch(path):
            raise SpecError(f"{key}: '${{{path}}}': expected the full path of a key, as in '${{d_model}}'")
        target: Any = self.data
        for name in path.split("."):
            known = list(target) if isinstance(target, dict) else []
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif name in known:
                target = target[name]
            else:
                raise SpecError(f"{key}: '${{{path}}}' leads nowhere: no key '{name}'{nearest(name, known)}")
        return target
