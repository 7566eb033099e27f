"""A study: stacks to compare, tasks to train them on, seeds, what is held equal; declared in YAML, strictly checked.

May import architectures and training. plan.py turns a study into trials; docs/studies.md explains every key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from hybridzoo.architectures.loader import is_spec, list_specs, origin_of, parse_override
from hybridzoo.architectures.plain_yaml import read_file
from hybridzoo.mixers.schema import SpecError, convert, nearest, unknown
from hybridzoo.studies.hybrids import AXES as HYBRID_AXES
from hybridzoo.studies.hybrids import Hybrid
from hybridzoo.studies.tasks import build_task
from hybridzoo.studies.tasks.answers import AnswerConfig
from hybridzoo.training import TrainConfig
from hybridzoo.training.config import MOST_SEED

_NAME = re.compile(r"\w[\w .-]{0,99}")


def may_name_a_folder(name: str) -> bool:
    """Whether `name` is 1 to 100 letters, digits, spaces, `.`, `_` or `-`, and starts with none of ` .-`."""
    return _NAME.fullmatch(name) is not None


def yaml_word(value: Any) -> str:
    """Return a value as YAML and overrides write it: `null`, `true`, and all else as its text."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


BUDGETS = ("params", "train_flops", "inference_bytes")


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What is made equal, within `tolerance` (a share): each of the three that is given is a budget of its own.

    `params`, and `train_flops` a token in training, are a number, or `largest`: that of the stack which has most as
    declared, which widening always reaches. `inference_bytes` are those of one sequence after the study's context,
    weights excluded; there may also be held to the `smallest`. With none given, `params` is `largest`.
    """

    params: int | Literal["largest"] | None = None
    train_flops: int | Literal["largest"] | None = None
    inference_bytes: int | Literal["largest", "smallest"] | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not self.asked:
            object.__setattr__(self, "params", "largest")
        for budget, target in self.asked.items():
            if isinstance(target, int) and target < 1:
                raise SpecError(f".{budget}: must be at least 1, got {target}")
        if not 0 < self.tolerance < 1:
            raise SpecError(f".tolerance: must be a share between 0 and 1, got {self.tolerance}")

    @property
    def asked(self) -> dict[str, int | str]:
        """The budgets that are asked for, each with its target: a number, `largest` or `smallest`."""
        return {budget: value for budget in BUDGETS if (value := getattr(self, budget)) is not None}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Give every stack its own learning rate: pilots train it at each of `lr`, once for each of `seeds`.

    The rate whose pilots score best, in the task's own metric and in the mean, is the one that its trials train with.
    """

    lr: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if len(set(self.lr)) < max(2, len(self.lr)) or not all(0 < lr < float("inf") for lr in self.lr):
            raise SpecError(f".lr: must be two or more distinct finite rates above 0, got {list(self.lr)}")
        if not self.seeds or not _may_be_seeds(self.seeds):
            raise SpecError(
                f".seeds: must be distinct, from 0 to {MOST_SEED:,}, and one at least, got {list(self.seeds)}"
            )
        object.__setattr__(self, "lr", tuple(sorted(self.lr)))


def _may_be_seeds(seeds: Sequence[int]) -> bool:
    return len(set(seeds)) == len(seeds) and all(0 <= seed <= MOST_SEED for seed in seeds)


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
    tune: Tune | None = None
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
        if not _may_be_seeds(self.seeds):
            raise SpecError(f".seeds: must be distinct, from 0 to {MOST_SEED:,}, got {list(self.seeds)}")
        if self.context is not None and self.context < 1:
            raise SpecError(f".context: must be at least 1, got {self.context}")
        for path, values in self.axes.items():
            if not isinstance(values, list | tuple):
                raise SpecError(f".axes.{path}: expected a list of values, as in [16, 32], got {yaml_word(values)}")
            if not values:
                raise SpecError(f".axes.{path}: an axis needs at least one value")
            if twice := _twice(path, values):
                one, other = map(yaml_word, twice)
                said = f"{one} stands there twice" if one == other else f"{one} and {other} are the same"
                raise SpecError(f".axes.{path}: its values must be distinct, and {said}")


def _twice(path: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Return two values of an axis that are one, however they are written; nothing where all differ."""

    def same(value: Any) -> Any:
        if path == "ratio":  # 1/4, 0.25 and '0.25'
            with contextlib.suppress(ValueError, ZeroDivisionError):
                return Fraction(str(value))
        return yaml_word(value) if isinstance(value, bool | None) else value

    return next(((a, b) for a, b in itertools.combinations(values, 2) if same(a) == same(b)), ())


@dataclass(frozen=True)
class StudyTaskEntry:
    """One task of a study: the words that build it, and how models are trained on it."""

    task: dict[str, Any]
    train: TrainConfig


@dataclass(frozen=True)
class Crossing:
    """Where a crossed stack comes from: the label it was declared under, and the value that each axis has in it.

    Of a hybrid, also the names of its two mixers (`recurrent`, then `attention`), where its attention stands, and the
    one mixer that it is of where the ratio leaves no other.
    """

    declared: str
    chosen: dict[str, Any]
    hybrid: tuple[str, str] | None = None
    placement: str = ""
    alone: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study. `stacks` are already crossed with the axes: a label, and overrides of the base spec; `crossings`
    say what each was crossed from.

    `spec` is a shipped spec's name, a path, or a spec's own mapping. `context` is the length at which inference memory
    is counted: None is 4,096, or less where a stack takes less. `source` is what errors call the file, `overrides` were
    laid over it, `origins` says what gave a key where the file did not, `folder` is where relative paths start.
    """

    name: str
    about: str
    spec: str | dict[str, Any]
    stacks: dict[str, dict[str, Any]]
    crossings: dict[str, Crossing]
    tasks: dict[str, StudyTaskEntry]
    seeds: tuple[int, ...]
    hold: Hold | None
    tune: Tune | None
    context: int | None
    source: str
    folder: Path
    origins: dict[str, str]
    overrides: tuple[str, ...] = ()

    def placed(self, message: str) -> str:
        """Put the file, or the override, that gave the key at fault before an error message that starts with it."""
        return f"{origin_of(message, self.origins, self.source)}: {message}"

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain data: the defaults of training filled in, specs and tasks as they were written."""
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
        if name in list_specs():
            raise SpecError(_a_spec(name))
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
    if is_spec(file):
        raise SpecError(_a_spec(given))
    origins = {}
    for text in overrides:
        keys, value = parse_override(text)
        data = _overlay(data, keys, value)
        origins[".".join(keys)] = f"override '{text}'"
    _check_labels(file, data, origins)
    return replace(_checked(data, where, path.parent, origins), overrides=tuple(overrides))


def _a_spec(name: str) -> str:
    return (
        f"'{name}' is a spec, one stack: use `hybridzoo train {name}` or `hybridzoo show {name}`; a study names it "
        "under 'spec', beside its tasks"
    )


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
        tune=written.tune,
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
    task = build_task(words, f"tasks.{label}")
    train = convert(TrainConfig, {**shared, **own}, where)
    steps = f"{where}.steps" if "steps" in own else "train.steps" if "steps" in shared else ""
    if isinstance(task.config, AnswerConfig):
        _check_curriculum(label, task.config, train.steps, steps)
    return StudyTaskEntry(words, train)


def _check_curriculum(label: str, config: AnswerConfig, steps: int, given: str) -> None:
    """Refuse a training that ends within its curriculum; `given` is the key of its steps, nothing for the default."""
    before = sum(length for _, length in config.stages)
    if before < steps:
        return
    # As a way out, the same stages in at most half of the steps; of very few steps there is none but no curriculum.
    scaled = [(level, length * steps // (2 * before)) for level, length in config.stages]
    stages = ", ".join(f"{{{config.knob}: {level}, steps: {length}}}" for level, length in scaled if length)
    place = given or f"tasks.{label}.curriculum"
    longer = f"{given or f'tasks.{label}.train.steps'}={2 * before}"
    raise SpecError(
        f".{place}: the curriculum of tasks.{label} takes {before} steps and the whole training {steps}, so the task's "
        f"own {config.knob}, {config.own}, would never be trained on: give more steps ({longer}, say), or a shorter "
        f"curriculum (tasks.{label}.curriculum=[{stages}])"
    )


def _cross(
    stacks: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Crossing]]:
    """Return every stack under every combination of the axes' values, labelled by both, and what each comes from."""
    crossed: dict[str, dict[str, Any]] = {}
    crossings: dict[str, Crossing] = {}
    for label, overrides in stacks.items():
        flat = _flatten(overrides)
        if "hybrid" in flat:
            raise SpecError(f".stacks.{label}.hybrid: expected its words, as in {_HYBRID_FORM}")
        words = {path.removeprefix(_HYBRID): flat.pop(path) for path in list(flat) if path.startswith(_HYBRID)}
        mine = {path: values for path, values in axes.items() if words or path not in HYBRID_AXES}
        for path in mine:
            if path in flat or (path in words and path in HYBRID_AXES):
                where = path if path in flat else f"hybrid.{path}"
                raise SpecError(f".stacks.{label}.{where}: is also an axis; one of the two must go")
        if words and ("layers" in flat or "layers" in mine):
            raise SpecError(f".stacks.{label}.hybrid: gives the layers, and so do 'layers'; one of the two must go")
        for values in itertools.product(*mine.values()):
            chosen = dict(zip(mine, values, strict=True))
            full = crossed_label(Crossing(label, chosen), mine)
            crossings[full], own = _chosen(label, words, chosen)
            crossed[full] = {**flat, **own}
    unused = [
        path for path in axes if path in HYBRID_AXES and all(path not in one.chosen for one in crossings.values())
    ]
    for path in unused:
        raise SpecError(
            f".axes.{path}: is an axis of hybrids, and no stack is one; a hybrid is written as in {_HYBRID_FORM}"
        )
    return crossed, crossings


_HYBRID = "hybrid."
_HYBRID_FORM = "stacks: {mine: {hybrid: {recurrent: c, attention: a, layers: 8}}}"


def _chosen(label: str, words: Mapping[str, Any], chosen: dict[str, Any]) -> tuple[Crossing, dict[str, Any]]:
    """Return where one combination of the axes comes from, and the keys of the spec that it changes."""
    if not words:
        return Crossing(label, chosen), chosen
    own = {path: value for path, value in chosen.items() if path not in HYBRID_AXES}
    from_axes = {path: value for path, value in chosen.items() if path in HYBRID_AXES}
    where = f".stacks.{label}.hybrid"
    if "ratio" not in {**words, **from_axes}:
        raise SpecError(f"{where}: missing 'ratio': give it here, or as an axis: axes: {{ratio: [0, 1/4, 1/2, 1]}}")
    try:
        hybrid = convert(Hybrid, {**words, **from_axes}, where)
    except SpecError as error:
        # What an axis says wrong is put there; a ratio is also a matter of how many layers a stack has.
        for path in from_axes:
            if str(error).startswith(f"{where}.{path}: "):
                told = str(error).removeprefix(f"{where}.{path}: ")
                raise SpecError(f".axes.{path}: {told} (of stacks.{label})") from None
        raise
    mixers = (hybrid.recurrent, hybrid.attention)
    return Crossing(label, chosen, mixers, hybrid.placed, hybrid.alone), {"layers": hybrid.pattern, **own}


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
