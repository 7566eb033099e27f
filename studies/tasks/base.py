"""What a study asks of a task beyond training on it: a config of its own, and how a report should show it.

May import training. Each task is one file here; `register_task` gives it the name that YAML knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from hybridzoo.mixers.schema import SpecError, convert, unknown
from hybridzoo.training import Batch


@dataclass(frozen=True)
class Shown:
    """How a report shows a task. Metrics in [0, 1] are printed as percentages."""

    metric: str  # the score that ranks stacks
    label: str  # what its axis says
    maximise: bool
    about: str  # two or three plain sentences: what is measured, and how it is scored
    percent: bool = False
    chance: float | None = None  # the score of guessing
    level_axis: str = ""  # what `levels` counts, where the task is scored at several
    levels: tuple[tuple[int, str], ...] = ()  # (difficulty, metric)
    stages: tuple[int, ...] = ()  # steps at which training became harder

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Shown:
        levels = tuple((int(level), str(metric)) for level, metric in data["levels"])
        return cls(**{**data, "levels": levels, "stages": tuple(data["stages"])})


class StudyTask:
    """A task that a study can name. Subclasses declare a frozen dataclass `Config`, and are built from one."""

    Config: ClassVar[type[Any]]
    type: ClassVar[str] = ""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError(f"{self.__class__.__name__} does not say its vocabulary")

    @property
    def shown(self) -> Shown:
        raise NotImplementedError(f"{self.__class__.__name__} does not say how it is shown")

    @property
    def metric(self) -> str:
        return self.shown.metric

    @property
    def maximise(self) -> bool:
        return self.shown.maximise

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence that it is scored on, which a model may not take; 0: unknown."""
        return 0

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError(f"{self.__class__.__name__} draws no batches")

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        raise NotImplementedError(f"{self.__class__.__name__} has no score")

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides this task's data: a result is reused only where this is unchanged."""
        return {"type": self.type, **dataclasses.asdict(self.config)}


TaskClass = TypeVar("TaskClass", bound=type[StudyTask])
_TASKS: dict[str, type[StudyTask]] = {}


def register_task(name: str) -> Callable[[TaskClass], TaskClass]:
    """Decorate a `StudyTask` so that studies know it as `name`; `ValueError` where the name is taken."""

    def register(cls: TaskClass) -> TaskClass:
        if name in _TASKS:
            raise ValueError(f"task name {name!r} is taken by {_TASKS[name].__qualname__}")
        if not dataclasses.is_dataclass(cls.Config):
            raise TypeError(f"task {name!r}: {cls.__qualname__}.Config must be a frozen dataclass")
        cls.type = name
        _TASKS[name] = cls
        return cls

    return register


def list_tasks() -> list[str]:
    """Return the names that a study may give as a task's `type`."""
    return sorted(_TASKS)


def build_task(entry: Mapping[str, Any], where: str = "task") -> StudyTask:
    """Build the task that `{type: name, ...words}` describes.

    Raises: `SpecError` naming `where` and the key, for an unknown task, an unknown word or a value that cannot be.
    """
    words = dict(entry)
    name = words.pop("type", None)
    if name is None:
        raise SpecError(f"{where}: missing 'type'; known tasks: {', '.join(list_tasks())}")
    if not isinstance(name, str) or name not in _TASKS:
        raise unknown(f"{where}.type", "task", str(name), list_tasks())
    cls = _TASKS[name]
    return cls(convert(cls.Config, words, where))
