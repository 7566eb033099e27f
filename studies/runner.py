"""Run a study: trials on worker processes, results as they come, and a second call that goes on where one stopped.

A run's folder holds `study.json` (the resolved plan), `specs/*.yaml` (every stack, loadable again) and
`trials/*.json` (one result each). May import architectures and training; report.py reads what is written here.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from hybridzoo.architectures import Spec
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.display import Display, default_display, format_seconds
from hybridzoo.studies.plan import Plan, make_plan
from hybridzoo.studies.pool import Event, run_jobs
from hybridzoo.studies.results import (
    CorruptResultError,
    read_result,
    remove_leftovers,
    write_json,
    write_text,
)
from hybridzoo.studies.study import Study
from hybridzoo.studies.trial import Job, run_job, slug, write_failure

PLAN, TRIALS, SPECS, LOCK = "study.json", "trials", "specs", ".lock"


class BusyError(RuntimeError):
    """Another process is running a study in this folder."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C while trials ran; the display has said how many are on disk."""


@dataclass(frozen=True)
class Run:
    """What a call of `run_study` did. `reused` trials were finished before; `failed` are titles with their errors."""

    folder: Path
    finished: int
    reused: int
    failed: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...]
    seconds: float


def run_study(
    study: Study,
    folder: str | os.PathLike[str],
    *,
    processes: int | None = None,
    threads: int | None = None,
    retry_failed: bool = True,
    imports: Sequence[str] = (),
    display: Display | None = None,
) -> Run:
    """Run every trial of `study` that `folder` holds no finished result of.

    `processes` workers (default: one a core, or one where there is a GPU; 0 runs the trials in this process) of
    `threads` threads each (default: OMP_NUM_THREADS where it is set, else the cores shared out evenly). A trial that
    fails is recorded with its error and skipped; the next call tries it again unless `retry_failed` is false. `imports`
    are modules or files that register a user's mixers and tasks: workers import them before they build anything.
    `KeyboardInterrupt` stops the workers and is raised on (as `Stopped`); the folder stays resumable.

    Raises: `SpecError` for a study that cannot be planned, and for a folder that holds another study's run;
    `BusyError` where another process is at the same folder.
    """
    started = time.perf_counter()
    display = default_display() if display is None else display
    root = Path(folder)
    _check_folder(root, study)
    display.note(f"planning study '{study.name}' in {root}")
    plan = make_plan(study, imports)
    for entry in study.tasks.values():
        entry.train.resolve_device()  # a device that is not there is one error now, not one a trial
    (root / TRIALS).mkdir(parents=True, exist_ok=True)
    with _only_one(root):
        _save_plan(root, plan)
        remove_leftovers(root / TRIALS)
        jobs = _jobs_to_run(root, plan, retry_failed, tuple(imports), display)
        workers = _default_processes() if processes is None else processes
        workers = min(workers, len(jobs))
        per_worker = threads or _threads_asked_for() or max(1, _cores() // max(1, workers))
        for note in plan.notes:
            display.note(note)
        for label, why in plan.excluded:
            display.note(f"left out, since it cannot meet the budget: {label}: {why}")
        failed = _run(jobs, len(plan.trials) - len(jobs), workers, per_worker, plan, display)
    reused = len(plan.trials) - len(jobs)
    seconds = time.perf_counter() - started
    return Run(root, len(jobs) - len(failed), reused, tuple(failed), plan.excluded, seconds)


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read the plan of a run's folder; `SpecError` where there is none, or one that cannot be read."""
    path = Path(folder) / PLAN
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SpecError(f"{folder}: no {PLAN} here, so this is not the folder of a study's run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{path}: cannot be read ({error}); running the study again in this folder rewrites it"
        ) from None


def read_trials(folder: str | os.PathLike[str], plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the results of a plan's trials: those there are, in the plan's order, and what is wrong with bad files."""
    results, faults = [], []
    for trial in plan.trials:
        try:
            results.append(read_result(Path(folder) / TRIALS / trial.file_name, trial.key))
        except FileNotFoundError:
            continue
        except CorruptResultError as error:
            faults.append(str(error))
    return results, faults


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads_asked_for() -> int | None:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None


def _default_processes() -> int:
    return 1 if torch.cuda.is_available() else _cores()


def _earlier_plan(root: Path) -> Plan | None:
    try:
        return read_plan(root)
    except SpecError:  # none, or one that can no longer be read: it is written anew
        return None


def _check_folder(root: Path, study: Study) -> None:
    earlier = _earlier_plan(root)
    if earlier is not None and earlier.study["name"] != study.name:
        raise SpecError(
            f"{root}: holds a run of the study '{earlier.study['name']}', so '{study.name}' needs a folder of its own"
        )


def _save_plan(root: Path, plan: Plan) -> None:
    earlier = _earlier_plan(root)
    specs = _saved_specs(plan)
    write_json(root / PLAN, plan.to_dict())
    for name, spec in specs.items():
        write_text(root / SPECS / name, Spec.from_dict(spec, name).to_yaml())
    for name in set(_saved_specs(earlier) if earlier else ()) - set(specs):
        (root / SPECS / name).unlink(missing_ok=True)


def _saved_specs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every stack's spec by the name of its file; of several tasks, one each."""
    return {
        f"{slug(stack.label)}--{slug(task)}.yaml" if len(stack.specs) > 1 else f"{slug(stack.label)}.yaml": spec
        for stack in plan.stacks
        for task, spec in stack.specs.items()
    }


def _jobs_to_run(root: Path, plan: Plan, retry_failed: bool, imports: tuple[str, ...], display: Display) -> list[Job]:
    jobs = []
    for trial in plan.trials:
        path = root / TRIALS / trial.file_name
        try:
            result = read_result(path, trial.key)
        except FileNotFoundError:
            jobs.append(Job(trial, path, imports))
        except CorruptResultError as error:
            aside = path.with_suffix(".corrupt")
            os.replace(path, aside)
            display.note(f"will be run again: {error}; the bad file is kept as {aside.name}")
            jobs.append(Job(trial, path, imports))
        else:
            if result["status"] == "failed" and retry_failed:
                jobs.append(Job(trial, path, imports))
    return jobs


def _run(
    jobs: list[Job], reused: int, processes: int, threads: int, plan: Plan, display: Display
) -> list[tuple[str, str]]:
    failed: list[tuple[str, str]] = []
    began: dict[int, float] = {}
    done = 0

    def on_event(event: Event) -> None:
        nonlocal done
        trial = jobs[event.index].trial
        if event.kind == "started":
            began[event.index] = time.perf_counter()
            display.started(trial)
        elif event.kind == "progress":
            display.progress(trial, event.value)
        else:
            result = event.value
            if event.kind == "failed":
                seconds = time.perf_counter() - began[event.index]
                result = write_failure(jobs[event.index], event.value, event.traceback, seconds)
                failed.append((trial.title, event.value))
            done += 1
            display.ended(trial, result)

    display.begin([job.trial for job in jobs], reused, processes, plan.shown)
    start = time.perf_counter()
    try:
        run_jobs(run_job, jobs, processes, threads, on_event)
    except KeyboardInterrupt:
        display.note(
            f"stopped after {format_seconds(time.perf_counter() - start)}: {reused + done} of {reused + len(jobs)} "
            "trials are on disk, and the same command goes on from there"
        )
        raise Stopped from None
    finally:
        display.end()
    return failed


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets it go when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder would only waste work, as each result is written whole
        yield
        return
    with open(root / LOCK, "a+", encoding="utf-8") as file:
        _lock(file, root, fcntl)
        yield


def _lock(file: IO[str], root: Path, fcntl: Any) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BusyError(f"{root}: another process is running a study in this folder") from None
