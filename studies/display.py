"""What a person sees while a study runs: live bars on a terminal, plain lines everywhere else.

May import training (for `Progress`). runner.py calls these methods; a caller may pass a display of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hybridzoo.studies.plan import Plan
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.trial import Trial
from hybridzoo.training import Progress as TrainingProgress


def format_score(shown: Shown, value: float) -> str:
    """Return a score as people read it: `97.3 %`, or `2.381 bits a byte`."""
    return f"{100 * value:.1f} %" if shown.percent else f"{value:.3f} {shown.label}"


def format_seconds(seconds: float) -> str:
    """Return `42 s`, `3 min 20 s` or `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def format_count(number: int, noun: str) -> str:
    """Return `1 trial` or `4 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Display:
    """Hears of everything and shows nothing: the base of the others, and what tests and scripts use.

    `plan` tells what a trial is called and how its score is printed. Times left are guessed from the finished trials of
    the same task.
    """

    def begin(self, trials: Sequence[Trial], reused: int, processes: int, plan: Plan) -> None: ...

    def started(self, trial: Trial) -> None: ...

    def progress(self, trial: Trial, progress: TrainingProgress) -> None: ...

    def lost(self, trial: Trial, why: str) -> None: ...

    def ended(self, trial: Trial, result: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


class _Counting(Display):
    """Keeps the count and the estimate that both visible displays print."""

    def begin(self, trials: Sequence[Trial], reused: int, processes: int, plan: Plan) -> None:
        self.waiting = {trial.key: trial for trial in trials}
        self.titles = plan.titles(trials)
        self.total, self.done, self.reused = len(trials) + reused, reused, reused
        self.processes, self.shown = max(1, processes), plan.shown
        self.seconds: dict[str, list[float]] = {}
        if reused:
            self.note(f"{reused} of {self.total} trials are already finished")

    def title(self, trial: Trial) -> str:
        return self.titles.get(trial.key, trial.title)

    def lost(self, trial: Trial, why: str) -> None:
        self.note(f"{self.title(trial)}: {why}; it is started again")

    def ended(self, trial: Trial, result: dict[str, Any]) -> None:
        self.done += 1
        self.waiting.pop(trial.key, None)
        if result["status"] == "finished":
            self.seconds.setdefault(trial.task, []).append(result["seconds"])

    def time_left(self) -> str:
        known = [second for seconds in self.seconds.values() for second in seconds]
        if not known or not self.waiting:
            return ""
        means = {task: sum(seconds) / len(seconds) for task, seconds in self.seconds.items()}
        overall = sum(known) / len(known)
        left = sum(means.get(trial.task, overall) for trial in self.waiting.values()) / self.processes
        return f"about {format_seconds(left)} left"

    def outcome(self, trial: Trial, result: dict[str, Any]) -> str:
        if result["status"] == "failed":
            return f"FAILED: {result['error']}"
        shown = self.shown[trial.task]
        return f"{format_score(shown, result['metrics'][shown.metric])} in {format_seconds(result['seconds'])}"


class PlainDisplay(_Counting):
    """One line for each trial that ends, and a sign of life from long ones."""

    def __init__(self, file: TextIO | None = None, every: float = 20.0) -> None:
        self.file, self.every = file or sys.stderr, every
        self.last = time.monotonic()

    def progress(self, trial: Trial, progress: TrainingProgress) -> None:
        if time.monotonic() - self.last > self.every:
            self.note(f"        {self.title(trial)}: step {progress.step}/{progress.steps}, loss {progress.loss:.3f}")

    def ended(self, trial: Trial, result: dict[str, Any]) -> None:
        super().ended(trial, result)
        width = len(str(self.total))
        left = self.time_left()
        tail = f" ({left})" if left else ""
        self.note(f"[{self.done:{width}}/{self.total}] {self.title(trial)}: {self.outcome(trial, result)}{tail}")

    def note(self, text: str) -> None:
        print(text, file=self.file, flush=True)
        self.last = time.monotonic()


class LiveDisplay(_Counting):
    """A bar for the study, one for each running trial, and finished trials scrolling by above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
            refresh_per_second=4,
        )
        self.rows: dict[str, TaskID] = {}
        self.overall: TaskID | None = None

    def begin(self, trials: Sequence[Trial], reused: int, processes: int, plan: Plan) -> None:
        super().begin(trials, reused, processes, plan)
        if self.overall is not None:  # of the round before: pilots, then trials
            self.bars.remove_task(self.overall)
        self.overall = self.bars.add_task("[bold]all trials", total=self.total, completed=self.done, detail="")
        self.bars.start()

    def started(self, trial: Trial) -> None:
        steps = trial.train["steps"]
        self.rows[trial.key] = self.bars.add_task(escape(self.title(trial)), total=steps, detail="starting")

    def progress(self, trial: Trial, progress: TrainingProgress) -> None:
        shown = self.shown[trial.task]
        detail = f"loss {progress.loss:.3f}"
        if shown.metric in progress.metrics:
            detail += f"  {format_score(shown, progress.metrics[shown.metric])}"
        self.bars.update(self.rows[trial.key], completed=progress.step, detail=detail)

    def lost(self, trial: Trial, why: str) -> None:
        super().lost(trial, why)
        self.bars.remove_task(self.rows.pop(trial.key))

    def ended(self, trial: Trial, result: dict[str, Any]) -> None:
        super().ended(trial, result)
        if trial.key in self.rows:
            self.bars.remove_task(self.rows.pop(trial.key))
        failed = result["status"] == "failed"
        mark = "[red]✗[/]" if failed else "[green]✓[/]"
        self.bars.console.print(
            f"{mark} {escape(self.title(trial))}: {escape(self.outcome(trial, result))}", highlight=False
        )
        assert self.overall is not None
        self.bars.update(self.overall, completed=self.done, detail=self.time_left())

    def note(self, text: str) -> None:
        self.bars.console.print(escape(text), highlight=False)

    def end(self) -> None:
        self.bars.stop()


def default_display() -> Display:
    """Return live bars where standard error is a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay()
