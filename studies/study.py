"""A study: stacks to compare, tasks to train them on, seeds, what is held equal; declared in YAML, strictly checked.

May import architectures and training. plan.py turns a study into trials; docs/studies.md explains every key.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridzoo.architectures.loader import origin_of, parse_override
from hybridzoo.architectures.plain_yaml import read_file
from hybridzoo.mixers.schema import SpecError, convert, nearest, unknown
from hybridzoo.studies.tasks import build_task
from hybridzoo.training import TrainConfig

_NAME = re.compile(r"\w[\w .-]{0,99}")


def may_name_a_folder(name: str) -> bool:
    """Whether `name` is 1 to 100 letters, digits, spaces, `.`, `_` or `-`, and starts with none of ` .-`."""
    return _NAME.fullmatch(name) is not None


def yaml_word(value: Any) -> str:
    """Return a value as YAML and overrides write it: `null`, `true`, and all else as its text."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What every stack has equal. `params` is met by the width of the FFN, within `tolerance` (a share).

    `params` is a number, or `largest`: that of the stack which has most as declared, which widening always reaches.
    """

    params: int | Literal["largest"] = "largest"
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.params != "largest" and self.params < 1:
            raise SpecError(f".params: must be at least 1, got {self.params}")
        if not 0 < self.tolerance < 1:
            raise SpecError(f".tolerance: must be a share between 0 and 1, got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The keys of a study file."""

    name: str
    spec: str | dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    about: str = ""
    stacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    hold: Hold | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if not may_name_a_folder(self.name):
            raise SpecError(
                f".name: '{self.name}' is also the folder of the results: at most 100 letters, digits, spaces, '.', "
                "'_' and '-', first a letter, digit or '_'"
            )
        for name in ("tasks", "seeds"):
            if not getattr(self, name):
                raise SpecError(f".{name}: a study needs at least one")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SpecError(f".seeds: must be distinct and not negative, got {list(self.seeds)}")
        if self.context is not None and self.context < 1:
            raise SpecError(f".context: must be at least 1, got {self.context}")
        for path, values in self.axes.items():
            if not isinstance(values, list | tuple):
                raise SpecError(f".axes.{path}: expected a list of values, as in [16, 32], got {yaml_word(values)}")
            if not values:
                raise SpecError(f".axes.{path}: an axis needs at least one value")


@dataclass(frozen=True)
class StudyTaskEntry:
    """One task of a study: the words that build it, and how models are trained on it."""

    task: dict[str, Any]
    train: TrainConfig


@dataclass(frozen=True)
class Crossing:
    """Where a crossed stack comes from: the label it was declared under, and the value that each axis has in it."""

    declared: str
    chosen: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study. `stacks` are already crossed with the axes: a label, and overrides of the base spec; `crossings`
    say what each was crossed from.

    `spec` is a shipped spec's name, a path, or a spec's own mapping. `context` is the length at which inference memory
    is counted: None is 4,096, or less where a stack takes less. `source` is what errors call the file, `origins` what
    gave a key where the file did not, `folder` where its relative paths start.
    """

    name: str
    about: str
    spec: str | dict[str, Any]
    stacks: dict[str, dict[str, Any]]
    crossings: dict[str, Crossing]
    tasks: dict[str, StudyTaskEntry]
    seeds: tuple[int, ...]
    hold: Hold | None
    context: int | None
    source: str
    folder: Path
    origins: dict[str, str]

    def placed(self, message: str) -> str:
        """Put the file, or the override, that gave the key at fault before an error message that starts with it."""
        return f"{origin_of(message, self.origins, self.source)}: {message}"

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain data with every default filled in."""
        data = dataclasses.asdict(self)
        del data["source"], data["folder"], data["origins"], data["crossings"]
        data["tasks"] = {
            label: {**entry.task, "train": dataclasses.asdict(entry.train)} for label, entry in self.tasks.items()
        }
        return data


def list_studies() -> list[str]:
    """Return the names of the studies that are shipped, sorted."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def study_path(name: str) -> Path:
    """Return the file of a shipped study; `SpecError` that lists them, with the nearest, for another name."""
    if name not in list_studies():
        raise SpecError(
            f"no study '{name}'{nearest(name, list_studies())}; shipped: {', '.join(list_studies())}; "
            "a file of your own is a path that ends in .yaml"
        )
    return _shipped_folder() / f"{name}.yaml"


def load_study(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """Load a shipped study by name, or a file by a path that ends in .yaml, and lay `key=value` overrides over it.

    Raises: `SpecError` that names the file, the key, what was given and the nearest valid choice.
    """
    given = os.fspath(name_or_path)
    if given.endswith((".yaml", ".yml")):
        path, where = Path(given), given
        if not path.exists():
            stem = path.stem
            raise SpecError(
                f"{given}: no such file{nearest(stem, list_studies())}; shipped: {', '.join(list_studies())}"
            )
    else:
        path = study_path(given)
        where = path.name
    file = data = read_file(path, where)
    origins = {}
    for text in overrides:
        keys, value = parse_override(text)
        data = _overlay(data, keys, value)
        origins[".".join(keys)] = f"override '{text}'"
    _check_labels(file, data, origins)
    return _checked(data, where, path.parent, origins)


def _check_labels(file: Mapping[str, Any], data: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse an override of one word in a task or stack that the file does not have: its label is a slip, not new."""
    for place, origin in origins.items():
        section, _, rest = place.partition(".")
        label, _, word = rest.partition(".")
        labels = file.get(section)
        if section not in ("tasks", "stacks") or not word or not isinstance(labels, Mapping) or label in labels:
            continue
        if not labels or section in origins or f"{section}.{label}" in origins or "type" in data[section][label]:
            continue  # declared here, in one override or in several
        raise SpecError(f"{origin}: {unknown(section, 'label', label, labels)}")


def study_from(data: Mapping[str, Any], where: str = "study", folder: Path | None = None) -> Study:
    """Check a mapping with the keys of a study file; `where` names it in errors, `folder` is where its paths start."""
    return _checked(data, where, folder or Path.cwd(), {})


def _checked(data: Mapping[str, Any], where: str, folder: Path, origins: dict[str, str]) -> Study:
    try:
        written = convert(_Written, data, "")
        stacks, crossings = _cross(written.stacks or {"base": {}}, written.axes)
        tasks = {label: _task_entry(label, entry, written.train) for label, entry in written.tasks.items()}
    except SpecError as error:
        message = str(error).removeprefix(".").removeprefix(": ")
        raise SpecError(f"{origin_of(message, origins, where)}: {message}") from None
    return Study(
        name=written.name,
        about=written.about,
        spec=written.spec,
        stacks=stacks,
        crossings=crossings,
        tasks=tasks,
        seeds=written.seeds,
        hold=written.hold,
        context=written.context,
        source=where,
        folder=folder,
        origins=origins,
    )


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("hybridzoo"))) / "yaml" / "studies"


def _overlay(data: Mapping[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner = data.get(keys[0])
    if len(keys) > 1:
        value = _overlay(inner if isinstance(inner, Mapping) else {}, keys[1:], value)
    return {**data, keys[0]: value}


def _task_entry(label: str, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> StudyTaskEntry:
    words = dict(entry)
    own = words.pop("train", {})
    where = f"tasks.{label}.train"
    if not isinstance(own, Mapping):
        raise SpecError(f"{where}: expected a mapping of keys to values, got {own!r}")
    for place, given in (("train", shared), (where, own)):
        if "seed" in given:
            raise SpecError(f"{place}.seed: the seeds are the study's own: give them as 'seeds'")
    convert(TrainConfig, shared, "train")  # so that an error in what all tasks share is not put on the first of them
    build_task(words, f"tasks.{label}")
    return StudyTaskEntry(words, convert(TrainConfig, {**shared, **own}, where))


def _cross(
    stacks: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Crossing]]:
    """Return every stack under every combination of the axes' values, labelled by both, and what each comes from."""
    crossed: dict[str, dict[str, Any]] = {}
    crossings: dict[str, Crossing] = {}
    for label, overrides in stacks.items():
        flat = _flatten(overrides)
        for path in axes:
            if path in flat:
                raise SpecError(f".stacks.{label}.{path}: is also an axis; one of the two must go")
        for values in itertools.product(*axes.values()):
            crossing = Crossing(label, dict(zip(axes, values, strict=True)))
            full = crossed_label(crossing, axes)
            crossed[full] = {**flat, **crossing.chosen}
            crossings[full] = crossing
    return crossed, crossings


def crossed_label(crossing: Crossing, axes: Iterable[str]) -> str:
    """Return a stack's label with the value that it has on each of `axes`: `delta, window=16`."""
    words = ", ".join(f"{axis_name(path, crossing.chosen)}={yaml_word(crossing.chosen[path])}" for path in axes)
    if not words:
        return crossing.declared
    return words if crossing.declared == "base" else f"{crossing.declared}, {words}"


def axis_name(path: str, axes: Iterable[str]) -> str:
    """Return the last word of an axis, or its whole path where another of `axes` ends alike."""
    last = path.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in axes) == 1 else path


def _flatten(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    # Nested mappings and dotted keys mean the same; a mapping with a `type` replaces an entry, and so stays whole.
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and "type" not in value and value:
            flat.update(_flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat
