"""Run a study: trials on an engine, results as they come, and a second call that goes on where one stopped.

A run's folder holds `study.json` (the resolved plan), `specs/*.yaml` (every stack, loadable again) and
`trials/*.json` (one result each). Only the process that holds the folder's lock writes there, wherever the trials run:
so each result is written once, whole. May import architectures and training; report.py reads what is written here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridzoo.architectures import Spec
from hybridzoo.architectures.loader import origin_of
from hybridzoo.architectures.whole_file import write_text
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.display import Display, default_display, format_count
from hybridzoo.studies.engines import Engine, EngineName, check_engine, make_engine, visible_devices
from hybridzoo.studies.estimate import Estimate
from hybridzoo.studies.plan import Plan, make_plan
from hybridzoo.studies.results import CorruptResultError, ResultFiles, remove_leftovers, write_json
from hybridzoo.studies.rounds import Record, Rounds, Stopped, never, retried, standing
from hybridzoo.studies.solve import BUDGET_WORDS
from hybridzoo.studies.study import Study
from hybridzoo.studies.trial import Trial, slug
from hybridzoo.studies.tuning import Tuned, choose, diverged, left_out, pilots, unanswered, with_rates, write_tuned
from hybridzoo.training.lock import BusyError, only_one

__all__ = [
    "BusyError",
    "Execution",
    "Preview",
    "Run",
    "Stopped",
    "preview_study",
    "read_plan",
    "read_trials",
    "run_study",
]

PLAN, TRIALS, SPECS = "study.json", "trials", "specs"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the trials of a study are run: where, how many at a time, and which of those that failed.

    `engine` is where they run: `here` (this process), `processes` (workers on this machine, the default) or `ray`.
    `processes`, `threads` and `gpu_share` are how many trials at a time, with what each: see `make_engine`. A trial
    that failed is tried again unless `retry_failed` is false. `imports` are modules or files that register a user's
    mixers and tasks: workers import them before they build anything, and their code is part of every trial's key.
    """

    engine: EngineName | None = None
    processes: int | None = None
    threads: int | None = None
    gpu_share: float | None = None
    retry_failed: bool = True
    imports: Sequence[str] = ()

    def starter(self, study: Study) -> Callable[[int], Engine]:
        """Return what starts the engine for that many trials, once what is asked for is known to be there."""
        devices = _devices(study) if self.engine != "ray" else ()
        return lambda jobs: make_engine(
            self.engine,
            processes=self.processes,
            threads=self.threads,
            gpu_share=self.gpu_share,
            devices=devices,
            jobs=jobs,
        )


@dataclass(frozen=True)
class Run:
    """What a call of `run_study` did, pilots included. `reused` trials were there before; `failed` are titles of trials
    with their errors (and of pilots, except those that diverged: that is what pilots are for), `excluded` stacks that
    cannot meet a budget: budget, label, why. `estimated` is what `seconds` was expected to be, before the first trial
    started, where that was asked for and could be said."""

    folder: Path
    finished: int
    reused: int
    failed: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str, str], ...]
    seconds: float
    estimated: float | None = None


def run_study(
    study: Study,
    folder: str | os.PathLike[str],
    execution: Execution = Execution(),
    *,
    display: Display | None = None,
    estimate: float = 2.0,
) -> Run:
    """Run every trial of `study` that `folder` holds no finished result of; where it tunes, the pilots first.

    A trial that fails is recorded with its error and skipped; the next call tries it again. One whose worker dies is
    started again, and recorded as failed where that happens again and again. About `estimate` seconds go into timing
    steps, so that the display can say how long it will take; with 0 nothing is said. `KeyboardInterrupt` stops the
    workers and is raised on (as `Stopped`); the folder stays resumable.

    Raises: `SpecError` for a study that cannot be planned, and for a folder that holds another study's run;
    `BusyError` where another process is at the same folder; what `make_engine` raises.
    """
    started = time.perf_counter()
    display = default_display() if display is None else display
    root = Path(folder)
    _check_folder(root, study)
    check_engine(execution.engine, execution.processes, execution.gpu_share)
    display.note(f"planning study '{study.name}' in {root}")
    plan = make_plan(study, execution.imports)
    start = execution.starter(study)
    (root / TRIALS).mkdir(parents=True, exist_ok=True)
    with only_one(root, "running a study"), Rounds(root / TRIALS, plan, execution.imports, display, start) as rounds:
        remove_leftovers(root / TRIALS)
        ahead = _look_ahead(rounds, execution.retry_failed)
        rounds.largest = ahead.largest
        _settle(root, rounds, ahead)
        _say_what_is_planned(rounds.plan, display)
        _say_what_is_left_out(rounds, ahead)
        estimated = None
        if ahead.trials and estimate > 0:
            display.note("timing a few steps")
            expected = rounds.estimate(ahead.trials, estimate)
            display.note(str(expected))
            if expected.seconds is not None:
                estimated = time.perf_counter() - started + expected.seconds
        rounds.set_damaged_aside(ahead.pilots)
        if ahead.waiting_pilots:
            _run_pilots(rounds, ahead)
            _settle(root, rounds, replace(ahead, waiting_pilots=()))
        rounds.set_damaged_aside(rounds.plan.distinct)  # only now are their rates known, and so their files
        waiting = _waiting(rounds, rounds.plan, ahead.pilots, execution.retry_failed)
        rounds.run(waiting, len(rounds.plan.distinct) - len(waiting))
    trials = {trial.key for trial in rounds.plan.distinct}
    every = trials | {trial.key for trial in ahead.pilots}
    ran = len({trial.key for trial in (*ahead.waiting_pilots, *waiting)})
    before = _failed_before(rounds)
    failed = {key: said for key, said in rounds.failed.items() if key in trials or not diverged(said[1])}
    return Run(
        folder=root,
        finished=ran - len(rounds.failed),
        reused=len(every) - ran - len(before),
        failed=(*failed.values(), *before),
        excluded=plan.excluded,
        seconds=time.perf_counter() - started,
        estimated=estimated,
    )


def _failed_before(rounds: Rounds) -> list[tuple[str, str]]:
    """Title and error of each trial that failed in an earlier run and was not tried again, as a pilot that diverged."""
    titles = rounds.plan.titles(rounds.plan.distinct)
    return [
        (titles[key], record["error"])
        for key, record in standing(rounds.folder, rounds.plan.distinct).items()
        if isinstance(record, Mapping) and record["status"] == "failed" and key not in rounds.failed
    ]


def preview_study(
    study: Study,
    folder: str | os.PathLike[str],
    execution: Execution = Execution(),
    *,
    display: Display | None = None,
    estimate: float = 60.0,
) -> Preview:
    """Say what `run_study` would run, and how long it would take, from about `estimate` seconds of timed steps.

    Nothing is trained to its end, and nothing is written. Words and errors are those of `run_study`.
    """
    display = default_display() if display is None else display
    root = Path(folder)
    _check_folder(root, study)
    check_engine(execution.engine, execution.processes, execution.gpu_share)
    plan = make_plan(study, execution.imports)
    with Rounds(root / TRIALS, plan, execution.imports, display, execution.starter(study)) as rounds:
        ahead = _look_ahead(rounds, execution.retry_failed)
        rounds.largest = ahead.largest
        if ahead.pilots and not ahead.waiting_pilots:
            rounds.plan = _tuned(rounds, ahead.pilots)[0]
        _say_what_is_planned(rounds.plan, display)
        _say_what_is_left_out(rounds, ahead)
        if ahead.trials:
            display.note("timing a few steps")
        expected = rounds.estimate(ahead.trials, estimate) if ahead.trials else None
    known = ahead.pilots if ahead.waiting_pilots else (*ahead.pilots, *rounds.plan.distinct)
    waiting = ahead.waiting_pilots or ahead.trials
    reused = len({trial.key for trial in known}) - len(waiting)
    pilots = frozenset(trial.key for trial in ahead.waiting_pilots)
    return Preview(expected, pilots, reused, rounds.plan.titles(ahead.trials))


@dataclass(frozen=True)
class Preview:
    """What a run would do: `estimate` lists every trial to run (None: there is none), `pilots` are keys of those that
    are pilots, `reused` counts the results that are there already, `titles` are those of the trials to run, by key."""

    estimate: Estimate | None
    pilots: frozenset[str]
    reused: int
    titles: dict[str, str]


@dataclass(frozen=True)
class _Ahead:
    """What is left to do: all pilots, those without a result, and all trainings to come, these pilots first."""

    pilots: tuple[Trial, ...]
    waiting_pilots: tuple[Trial, ...]
    trials: tuple[Trial, ...]

    @property
    def largest(self) -> int:
        """The trials of the larger round: the pilots, or what comes after them."""
        return max(len(self.waiting_pilots), len(self.trials) - len(self.waiting_pilots))


def _look_ahead(rounds: Rounds, retry_failed: bool) -> _Ahead:
    every = pilots(rounds.plan)
    first = tuple(rounds.waiting(every, unanswered if retry_failed else never))
    if first:
        # Their rates are not known yet, but how many there are is: a pilot's seed at the best rate is its pilot.
        seeds = set(rounds.plan.study["tune"]["seeds"])
        return _Ahead(every, first, (*first, *(trial for trial in rounds.plan.distinct if trial.seed not in seeds)))
    plan = _tuned(rounds, every)[0] if every else rounds.plan
    return _Ahead(every, (), tuple(_waiting(rounds, plan, every, retry_failed)))


def _waiting(rounds: Rounds, plan: Plan, tried: Sequence[Trial], retry_failed: bool) -> list[Trial]:
    """Return the trials of a plan to run, after its pilots: one that is a pilot and diverged would do so again."""
    keys = {pilot.key for pilot in tried}

    def retry(record: Record) -> bool:
        return retry_failed and (unanswered(record) if record["key"] in keys else retried(record))

    return rounds.waiting(plan.distinct, retry)


def _run_pilots(rounds: Rounds, ahead: _Ahead) -> None:
    """Run the pilots, and once more those that failed in another way than by diverging: out of memory, perhaps."""
    rounds.display.note("pilots: every stack on every task, at each learning rate")
    rounds.run(ahead.waiting_pilots, len(ahead.pilots) - len(ahead.waiting_pilots))
    if again := rounds.waiting(ahead.waiting_pilots, unanswered):
        rounds.display.note("once more, the pilots that failed in another way than by diverging")
        rounds.run(again, len(ahead.pilots) - len(again))


def _tuned(rounds: Rounds, tried: Sequence[Trial]) -> tuple[Plan, list[Tuned]]:
    """Return the plan with the rates that the pilots, all of which have ended, chose."""
    records = {key: record for key, record in standing(rounds.folder, tried).items() if isinstance(record, Mapping)}
    chosen = choose(rounds.plan, records)
    return with_rates(rounds.plan, chosen), chosen


def _settle(root: Path, rounds: Rounds, ahead: _Ahead) -> None:
    """Write the plan, with the rates of its pilots where all of these have ended."""
    chosen: list[Tuned] = []
    if ahead.pilots and not ahead.waiting_pilots:
        whole = rounds.plan
        rounds.plan, chosen = _tuned(rounds, ahead.pilots)
        for trial in left_out(whole, chosen):
            budget = (trial.budget,) if len(whole.budgets) > 1 else ()
            where = " · ".join((trial.stack, trial.task, *budget))
            rounds.display.note(
                f"left out, since a pilot failed and so no learning rate could be chosen: {where}; the same command "
                "tries the pilot again"
            )
    write_tuned(root, chosen)
    _save_plan(root, rounds.plan)


def _say_what_is_left_out(rounds: Rounds, ahead: _Ahead) -> None:
    """Say how many results of the folder are of other settings, once the rates of the pilots are known."""
    number = 0 if ahead.waiting_pilots else other_results(rounds.folder, rounds.plan)
    if number:
        rounds.display.note(
            f"left out, since of other settings, seeds or code: {format_count(number, 'result')} in this folder"
        )


SAID = 12  # notes of one kind that a run says one by one; of more it says how many


def _say_what_is_planned(plan: Plan, display: Display) -> None:
    for note in plan.notes:
        display.note(note)
    _say(plan.repeats, f"stacks are another's equal, so listed or trained once; a run's {PLAN} names them", display)
    for budget in plan.budgets:
        solved = [stack for stack in plan.of_budget(budget) if stack.solved]
        at = f"at equal {BUDGET_WORDS[budget]}" if budget else ""
        _say(
            [f"{stack.label}, {at}: {stack.solved}" for stack in solved],
            f"stacks are {at}; how each was brought there a run's {PLAN} and its report's stacks.csv say",
            display,
        )
    for budget, label, why in plan.excluded:
        display.note(f"left out, since it cannot meet equal {BUDGET_WORDS[budget]}: {label}: {why}")


def _say(notes: Sequence[str], together: str, display: Display) -> None:
    """Say each of a few notes, and of more than anyone reads how many there are and where to read them."""
    for note in notes if len(notes) <= SAID else [f"{len(notes)} {together}"]:
        display.note(note)


def _devices(study: Study) -> tuple[str, ...]:
    """The GPUs to deal out to workers; a device that is not there is one error now, not one a trial."""
    devices = []
    for label, entry in study.tasks.items():
        try:
            devices.append(entry.train.resolve_device())
        except SpecError as error:
            # The task's own key or that of all tasks: which, only an override tells.
            own, shared = (
                origin_of(said, study.origins, study.source) for said in (f"tasks.{label}.{error}", str(error))
            )
            raise SpecError(f"{shared if own == study.source else own}: {error} (for tasks.{label})") from None
    if all(device.type != "cuda" for device in devices):
        return ()
    named = {str(device) for device in devices if device.index is not None}
    # One that is asked for by number is not to be renumbered by dealing it out.
    return (min(named),) if named else visible_devices()


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
    """Read the results of a plan's trials: those there are, in the plan's order, and what is wrong with bad files.

    A result that trials of several budgets share is read once."""
    found = standing(Path(folder) / TRIALS, plan.distinct).values()
    faults = [str(error) for error in found if isinstance(error, CorruptResultError)]
    return [dict(record) for record in found if not isinstance(record, CorruptResultError)], faults


def other_results(folder: Path, plan: Plan) -> int:
    """Return how many trials have results in `folder` and are neither trials nor pilots of a plan with its rates."""
    return ResultFiles(folder).others(trial.key for trial in (*plan.trials, *pilots(plan)))


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
    """Every stack's spec by the name of its file; of several budgets or tasks, one each."""
    found: dict[str, dict[str, Any]] = {}
    for stack in plan.stacks:
        for task, spec in stack.specs.items():
            words = [slug(stack.label)]
            words += [slug(stack.budget)] if len(plan.budgets) > 1 else []
            words += [slug(task)] if len(stack.specs) > 1 else []
            name, number = "--".join(words), 2
            while f"{name}.yaml" in found:  # labels may differ in what no file name shows
                name, number = f"{'--'.join(words)}--{number}", number + 1
            found[f"{name}.yaml"] = spec
    return found
