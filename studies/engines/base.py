"""What every engine is: something that runs jobs and says, event by event, what became of each.

Jobs and what is sent about them pickle; the work is a function that can be imported by name. May import nothing of
hybridzoo, and no torch: a worker sets its threads before torch is first imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias

Send: TypeAlias = Callable[[Any], None]
Work: TypeAlias = Callable[[Any, Send], Any]

RETRIES = 2  # a job whose worker died is run again so many times; then the job is the likelier culprit


class EngineError(ValueError):
    """An engine that cannot be had as it is asked for; the message says what is wrong."""


@dataclass(frozen=True)
class Event:
    """Something that happened to job `index`.

    `kind` is `started`; `progress`, with whatever the work sent; `lost`, where its worker died and it will be started
    again, with the reason in words; `done`, with its result; or `failed`, with the error in words and its traceback.
    Every job ends in exactly one `done` or `failed`, and nothing is said of it afterwards. (`ready` passes between a
    worker and its parent only.)
    """

    kind: Literal["ready", "started", "progress", "lost", "done", "failed"]
    index: int
    value: Any = None
    traceback: str = ""

    @property
    def is_end(self) -> bool:
        return self.kind in ("done", "failed")


OnEvent: TypeAlias = Callable[[Event], None]


class Engine(Protocol):
    """Runs jobs, several calls one after another on the same workers. A context manager: leaving it ends the workers.

    `name` is the word for it; `width` is how many jobs it runs at a time.
    """

    name: str

    @property
    def width(self) -> int: ...

    def run(self, work: Work, jobs: Sequence[Any], on_event: OnEvent, retries: int = RETRIES) -> None:
        """Run `work(job, send)` for every job; events arrive in the caller's thread.

        A job that raises is `failed` and the rest go on. One whose worker dies is started again up to `retries` times.
        Whatever ends this call early, `KeyboardInterrupt` included, ends the jobs too.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...


class Attempts:
    """Counts how often each job's worker died, and decides whether the job is run again."""

    def __init__(self, retries: int) -> None:
        self.retries = retries
        self.deaths: Counter[int] = Counter()

    def died(self, index: int, why: str) -> Event:
        """Return `lost` where the job is to be started again, `failed` where it has had its chances."""
        self.deaths[index] += 1
        if self.deaths[index] <= self.retries:
            return Event("lost", index, why)
        times = f", {self.deaths[index]} times in a row" if self.deaths[index] > 1 else ""
        return Event("failed", index, f"{why}{times}")


def sender(emit: OnEvent, index: int) -> Send:
    """Return what a work calls to say how far job `index` is."""
    return lambda value: emit(Event("progress", index, value))


def describe(error: BaseException) -> str:
    """Say an error in one line: its type and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
