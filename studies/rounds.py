"""Rounds of trials in one call of a study: which have no result yet, running them on an engine, keeping what comes.

The engine starts when the first trial needs it and is kept for all rounds: the timed steps, the pilots, the trials. May
import architectures and training; runner.py says which rounds there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hybridzoo.studies.code import own_digests, zoo_digest
from hybridzoo.studies.display import Display, format_seconds
from hybridzoo.studies.engines import Engine, Event, describe
from hybridzoo.studies.estimate import Estimate, estimate
from hybridzoo.studies.plan import Plan
from hybridzoo.studies.results import CorruptResultError, ResultFiles, write_result
from hybridzoo.studies.trial import Job, Trial, failure_of, run_job

Record = Mapping[str, Any]


class Stopped(KeyboardInterrupt):
    """Ctrl-C while trials ran; the display has said how many are on disk."""


def standing(folder: Path, trials: Iterable[Trial]) -> dict[str, Record | CorruptResultError]:
    """Return, by key, the record of every trial that has one in `folder`, and the error of those that are damaged."""
    found: dict[str, Record | CorruptResultError] = {}
    files = ResultFiles(folder)
    for trial in trials:
        try:
            found[trial.key] = files.read(trial.key)
        except FileNotFoundError:
            continue
        except CorruptResultError as error:
            found[trial.key] = error
    return found


def retried(record: Record) -> bool:
    """Whether a failed trial is tried again when its study is run again: any."""
    return record["status"] == "failed"


def never(record: Record) -> bool:
    """What failed stays as it is."""
    return False


class Rounds:
    """Runs trials and keeps their results in `folder`; a context manager, which ends the engine.

    `start` starts the engine for that many trials at most; `largest` is how many the largest round to come has.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        imports: Sequence[str],
        display: Display,
        start: Callable[[int], Engine],
    ) -> None:
        self.folder, self.plan, self.imports, self.display = folder, plan, tuple(imports), display
        self.start = start
        self.largest = 1
        self.engine: Engine | None = None
        self.zoo, self.own = zoo_digest(), own_digests(imports)
        self.titles: dict[str, str] = {}  # by key; a pilot that is run again keeps the one with its rate
        self.failed: dict[str, tuple[str, str]] = {}  # titles and errors, by key, of those whose last record is that

    def waiting(self, trials: Sequence[Trial], retry: Callable[[Record], bool]) -> list[Trial]:
        """Return the trials without a result, and those whose record is to be made anew; change nothing."""
        found = standing(self.folder, trials)
        left = []
        for trial in trials:
            record = found.get(trial.key)
            if record is None or isinstance(record, CorruptResultError) or retry(record):
                left.append(trial)
        return left

    def set_damaged_aside(self, trials: Sequence[Trial]) -> None:
        """Keep what cannot be read under another name, and say so."""
        files = ResultFiles(self.folder)
        for key, error in standing(self.folder, trials).items():
            if isinstance(error, CorruptResultError):
                for path in files.paths(key):
                    aside = path.with_suffix(".corrupt")
                    os.replace(path, aside)
                    self.display.note(f"will be run again: {error}; the bad file is kept as {aside.name}")

    def estimate(self, trials: Sequence[Trial], seconds: float) -> Estimate:
        """Time a few steps and say how long the trials will take: see `estimate`."""
        flops = {trial.key: self.plan.flops(trial) for trial in trials}
        return estimate(self._engine(), trials, flops, self.imports, self.zoo, seconds)

    def run(self, trials: Sequence[Trial], reused: int) -> None:
        """Run the trials and write each one's record as it ends."""
        if not trials:
            self.display.begin([], reused, 0, self.plan)
            self.display.end()
        else:
            _Round(self, self._engine(len(trials)), trials, reused).run()

    def _engine(self, trials: int = 1) -> Engine:
        if self.engine is None:
            self.engine = self.start(max(trials, self.largest))
        return self.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.engine is not None:
            self.engine.__exit__(kind, error, where)


class _Round:
    """One round while it runs."""

    def __init__(self, rounds: Rounds, engine: Engine, trials: Sequence[Trial], reused: int) -> None:
        self.rounds, self.engine, self.trials, self.reused = rounds, engine, trials, reused
        self.display = rounds.display
        rounds.titles = {**rounds.plan.titles(trials), **rounds.titles}
        self.began: dict[int, float] = {}
        self.done = 0

    def run(self) -> None:
        self.display.begin(self.trials, self.reused, self.engine.width, self.rounds.plan)
        start = time.perf_counter()
        jobs = [Job(trial, self.rounds.imports, self.rounds.zoo, self.rounds.own) for trial in self.trials]
        try:
            self.engine.run(run_job, jobs, self._hear)
        except KeyboardInterrupt:
            self.display.note(
                f"stopped after {format_seconds(time.perf_counter() - start)}: {self.reused + self.done} of "
                f"{self.reused + len(jobs)} trials are on disk, and the same command goes on from there"
            )
            raise Stopped from None
        finally:
            self.display.end()

    def _hear(self, event: Event) -> None:
        trial = self.trials[event.index]
        if event.kind == "started":
            self.began[event.index] = time.perf_counter()
            self.display.started(trial)
        elif event.kind == "progress":
            self.display.progress(trial, event.value)
        elif event.kind == "lost":
            self.display.lost(trial, event.value)
        else:
            result = event.value
            if event.kind == "failed":
                seconds = time.perf_counter() - self.began[event.index]
                result = failure_of(trial, event.value, event.traceback, seconds)
            result = self._keep(trial, result)
            self.rounds.failed.pop(trial.key, None)
            if result["status"] == "failed":
                self.rounds.failed[trial.key] = (self.rounds.titles[trial.key], result["error"])
            self.done += 1
            self.display.ended(trial, result)

    def _keep(self, trial: Trial, result: Record) -> dict[str, Any]:
        """Write a record and return it; one that cannot be kept is its trial's failure, not the study's."""
        path = self.rounds.folder / trial.file_name
        try:
            write_result(path, result)
        except ValueError as error:
            result = failure_of(trial, describe(error), "", result["seconds"])
            write_result(path, result)
        return dict(result)
