"""From a name or a path, and overrides, to a `Spec`: finds files, follows `base`, merges, and says where errors stand.

Each file is plain data (plain_yaml.py). A file with `base: other` is laid over that file, mapping by mapping, and
overrides are one more file on top; a `type` that differs replaces a mixer's whole entry, since words of one mixer mean
nothing to another. Interpolation and checking come last, on the merged data.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridzoo.architectures.interpolation import interpolate
from hybridzoo.architectures.plain_yaml import read_file, read_yaml
from hybridzoo.architectures.spec import Spec, long_forms, resolve
from hybridzoo.mixers.schema import SpecError, nearest

MAX_BASES = 16  # files that stand on one another
_SUFFIXES = (".yaml", ".yml")
_KEY = re.compile(r"[A-Za-z_][\w-]*")


def list_specs() -> list[str]:
    """Return the names of the specs that are shipped, sorted."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def spec_path(name: str, where: str = "") -> Path:
    """Return the file of a shipped spec. Raises `SpecError` that lists them, with the nearest, for another name."""
    path = _shipped_folder() / f"{name}.yaml"
    if name not in list_specs():
        prefix = f"{where}: " if where else ""
        if (_shipped_folder().parent / "studies" / f"{name}.yaml").is_file():
            raise SpecError(f"{prefix}{a_study(name)}")
        raise SpecError(
            f"{prefix}no spec '{name}'{nearest(name, list_specs())}; shipped: {', '.join(list_specs())}; "
            "a file of your own is a path that ends in .yaml"
        )
    return path


def load_spec(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Spec:
    """Load a shipped spec by name, or a file by a path that ends in .yaml, and lay overrides over it.

    An override is `key=value` with a dotted key, its value read as YAML: `d_model=128`, `mixers.c.erase=token`,
    `layers=(c*3 a)*2`, `ffn.width=null`. Their order does not matter, but of two for one key the later wins.

    Raises: `SpecError` that names the file (or override), the key, what was given and the nearest valid choice. Loading
    never runs code, and refuses files that would expand without bound. `TypeError` for what is no name or path.
    """
    given: Any = name_or_path
    if not isinstance(given, str | os.PathLike):
        hint = "; Spec.from_dict(...) reads a mapping" if isinstance(given, Mapping) else ""
        raise TypeError(f"expected a spec's name or path, got {type(given).__name__}{hint}")
    path, where = _find(os.fspath(given))
    data = read_file(path, where)
    if is_study(data):
        raise SpecError(a_study(os.fspath(given)))
    return _resolved(_based(data, path, where, opened=[]), overrides)


def spec_from(
    data: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "spec", folder: Path = Path()
) -> Spec:
    """Resolve a spec that is written inside another file, such as a study, as `load_spec` does one of its own.

    `where` is what errors call it, `folder` where the paths of its `base` start.
    """
    return _resolved(_based(dict(data), folder / "spec.yaml", where, opened=[]), overrides)


def is_spec(data: Mapping[str, Any]) -> bool:
    """Whether the keys of a file are those of a spec, and not of a study."""
    return not is_study(data) and ("layers" in data or "base" in data)


def is_study(data: Mapping[str, Any]) -> bool:
    """Whether the keys of a file are those of a study, which has a spec, and tasks to train it on."""
    return "tasks" in data and ("spec" in data or "stacks" in data)


def a_study(name: str) -> str:
    """Say what to do with a study where a spec was asked for."""
    return f"'{name}' is a study, which has several stacks: use `hybridzoo study run {name}`"


def _resolved(files: Sequence[tuple[str, dict[str, Any]]], overrides: Sequence[str]) -> Spec:
    merged = _Merged()
    for where, data in files:
        merged.lay({key: value for key, value in data.items() if key != "name"}, where)
    where, data = files[-1]
    merged.lay({"name": data.get("name", Path(where).stem)}, where)
    merged.override(overrides)
    try:
        return resolve(interpolate(merged.data))
    except SpecError as error:
        raise SpecError(merged.placed(str(error), where)) from None


def override_name(text: str) -> str:
    """Return what errors call an override: itself, cut where it is long."""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"override '{short}'"


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Split `a.b=value` into its path and its value, read as YAML. Raises `SpecError` for anything else."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    where = override_name(text)
    if not equals or not all(_KEY.fullmatch(part) for part in path):
        raise SpecError(f"{where}: expected key=value with a dotted key, as in mixers.c.erase=token")
    if not value.strip():
        raise SpecError(f"{where}: no value; to unset a key give null")
    return path, read_yaml(value, where)


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("hybridzoo"))) / "yaml" / "architectures"


def _find(given: str) -> tuple[Path, str]:
    """Return the file that a user's name or path means, and what errors call it."""
    if given.endswith(_SUFFIXES):
        if not Path(given).exists():
            stem = Path(given).stem
            raise SpecError(f"{given}: no such file{nearest(stem, list_specs())}; shipped: {', '.join(list_specs())}")
        return Path(given), given
    if os.sep in given:
        raise SpecError(f"{given}: the path of a spec ends in .yaml")
    _not_a_file(given, Path(), "")
    path = spec_path(given)
    return path, path.name


def _not_a_file(name: str, folder: Path, prefix: str) -> None:
    if name not in list_specs() and (folder / f"{name}.yaml").exists():
        raise SpecError(f"{prefix}no spec '{name}' is shipped; the file of that name is '{name}.yaml'")


def _chain(path: Path, where: str, opened: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Read a file and the files it is based on, the most basic first."""
    if path.resolve() in opened:
        names = " -> ".join(file.name for file in [*opened, path.resolve()])
        raise SpecError(f"{where}: base: a spec cannot be based on itself: {names}")
    if len(opened) > MAX_BASES:
        raise SpecError(f"{where}: base: more than {MAX_BASES} files based on one another")
    return _based(read_file(path, where), path, where, opened)


def _based(data: dict[str, Any], path: Path, where: str, opened: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    base = data.pop("base", None)
    if base is None:
        return [(where, data)]
    if not isinstance(base, str):
        raise SpecError(f"{where}: base: expected the name of a shipped spec or a path, got {base!r}")
    if not base.endswith(_SUFFIXES):
        _not_a_file(base, path.parent, f"{where}: base: ")
        base_path = spec_path(base, f"{where}: base")
        base_where = base_path.name
    else:
        base_path = path.parent / base
        base_where = os.path.relpath(base_path)
        if not base_path.exists():
            raise SpecError(
                f"{where}: base: no such file '{base}' beside {path.name}{nearest(Path(base).stem, list_specs())}"
            )
    return [*_chain(base_path, base_where, [*opened, path.resolve()]), (where, data)]


class _Merged:
    """Files and overrides laid over one another, and for every key the one that gave it last."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def lay(self, layer: Mapping[str, Any], where: str) -> None:
        layer = long_forms(layer)
        entries, old_entries = layer.get("mixers"), self.data.get("mixers")
        if isinstance(entries, Mapping) and isinstance(old_entries, Mapping):
            replaced = [name for name, entry in entries.items() if _changes_type(old_entries.get(name), entry)]
            self.data["mixers"] = {name: entry for name, entry in old_entries.items() if name not in replaced}
        self.data = _overlay(self.data, layer)
        self.origins.update(dict.fromkeys(_paths(layer), where))

    def override(self, overrides: Iterable[str]) -> None:
        if isinstance(overrides, str):
            raise SpecError(f"overrides: expected a list of 'key=value', got the text '{overrides}'")
        overrides = list(overrides)
        if wrong := [text for text in overrides if not isinstance(text, str)]:
            raise SpecError(f"overrides: expected a list of 'key=value', got {wrong[0]!r} in it")
        layer: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for text in overrides:
            path, value = parse_override(text)
            if path[0] == "base":
                raise SpecError(f"{override_name(text)}: base is part of a file; load that spec instead")
            for name in reversed(path):
                value = {name: value}
            layer = _overlay(layer, long_forms(value))
            origins.update(dict.fromkeys(_paths(value), override_name(text)))
        self.lay(layer, "overrides")
        self.origins.update(origins)

    def placed(self, message: str, file: str) -> str:
        """Put what gave the key at fault before an error message, and what gave the width that it met behind it."""
        origin, width = origin_of(message, self.origins, file), self.origins.get("d_model", file)
        note = f" (d_model from {width})" if " d_model " in message and width != origin else ""
        return f"{origin}: {message}{note}"


def origin_of(message: str, origins: Mapping[str, str], file: str) -> str:
    """Return what gave the key that an error message starts with: one of `origins` (by dotted key), or the file.

    Messages start with the key they are about, and an unknown key is quoted next (mixers/schema.py).
    """
    key = re.sub(r"\[\d+\]", "", message.partition(": ")[0])  # of a list, its key
    extra = re.match(r"(?:[^:]*: )?unknown (?:key|word) '([^']*)'", message)
    if extra:
        key = f"{key}.{extra[1]}" if not message.startswith("unknown") else extra[1]
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, file)


def _changes_type(old: Any, new: Any) -> bool:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return False
    return "type" in new and new["type"] != old.get("type", new["type"])


def _overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _paths(data: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
