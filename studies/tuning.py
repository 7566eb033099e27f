"""Each stack's own learning rate: pilots over a small grid, the best of it, and the trials that train with that.

One rate for all favours the stacks that it suits. A pilot is a trial like any other, kept under its own key, so pilots
are reused, and one with a trial's seed and rate is that trial. May import training; runner.py runs the pilots.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from hybridzoo.studies.plan import Plan
from hybridzoo.studies.results import CorruptResultError, write_json
from hybridzoo.studies.trial import Trial

TUNED = "tuned.json"


class Tuned(TypedDict):
    """The rate of one stack on one task. `scores` are each rate's mean over the pilots' seeds, by the rate as text.

    None is a rate of which a pilot diverged: the worst there can be. `edge` says that the best is the smallest or
    largest rate there was, so that a better one may lie beyond.
    """

    budget: str
    stack: str
    task: str
    lr: float
    scores: dict[str, float | None]
    edge: bool


def pilots(plan: Plan) -> tuple[Trial, ...]:
    """Return the pilots of a plan, each key once: every stack on every task, at every rate, from every pilot's seed."""
    tune = plan.study.get("tune")
    if not tune:
        return ()
    found: dict[str, Trial] = {}
    for seed in tune["seeds"]:
        for trial in _groups(plan):
            for one in _at_rates(trial, seed, tune["lr"]):
                found.setdefault(one.key, one)  # under the label that `Plan.distinct` gives it too
    return tuple(found.values())


def _groups(plan: Plan) -> list[Trial]:
    """One trial for each budget, stack and task."""
    first: dict[tuple[str, str, str], Trial] = {}
    for trial in plan.trials:
        first.setdefault((trial.budget, trial.stack, trial.task), trial)
    return list(first.values())


def _at_rates(trial: Trial, seed: int, rates: Sequence[float]) -> list[Trial]:
    return [replace(trial, seed=seed, train={**trial.train, "seed": seed, "lr": rate}) for rate in rates]


def choose(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[Tuned]:
    """Return the best rate of every stack on every task, from the results of all pilots by key.

    The mean over seeds decides; a rate of which a pilot diverged is worse than any other; the smaller rate wins a tie.
    A stack on a task gets no rate where a pilot failed in any other way, which says nothing of its rate: another might
    have won.
    """
    tune = plan.study["tune"]
    rates = sorted(tune["lr"])
    chosen = []
    for trial in _groups(plan):
        shown = plan.shown[trial.task]
        means: dict[float, float | None] = {}
        of_rate = {
            rate: [results[one.key] for seed in tune["seeds"] for one in _at_rates(trial, seed, [rate])]
            for rate in rates
        }
        if any(unanswered(record) for records in of_rate.values() for record in records):
            continue
        for rate, records in of_rate.items():
            scores = [record["metrics"][shown.metric] for record in records if record["status"] == "finished"]
            means[rate] = math.fsum(scores) / len(scores) if len(scores) == len(records) else None
        best = min(rates, key=lambda rate: (_loss(means[rate], shown.maximise), rate))
        chosen.append(
            Tuned(
                budget=trial.budget,
                stack=trial.stack,
                task=trial.task,
                lr=best,
                scores={_text(rate): mean for rate, mean in means.items()},
                edge=best in (rates[0], rates[-1]),
            )
        )
    return chosen


def diverged(error: str) -> bool:
    """Whether a record's error says that the training diverged."""
    return error.startswith("DivergedError")


def unanswered(record: Mapping[str, Any]) -> bool:
    """Whether a pilot failed without saying anything of its rate; that it diverged is an answer, and comes again."""
    return record["status"] == "failed" and not diverged(record["error"])


def left_out(plan: Plan, chosen: Sequence[Tuned]) -> list[Trial]:
    """Return one trial for each budget, stack and task that has no rate."""
    rates = {(one["budget"], one["stack"], one["task"]) for one in chosen}
    return [trial for trial in _groups(plan) if (trial.budget, trial.stack, trial.task) not in rates]


def _loss(mean: float | None, maximise: bool) -> float:
    if mean is None:
        return math.inf
    return -mean if maximise else mean


def _text(rate: float) -> str:
    return json.dumps(rate)  # read back as the same number


def with_rates(plan: Plan, chosen: Sequence[Tuned]) -> Plan:
    """Return the plan with every trial at the rate chosen for its stack on its task, without those that have none."""
    rates = {(one["budget"], one["stack"], one["task"]): one["lr"] for one in chosen}
    trials = tuple(
        replace(trial, train={**trial.train, "lr": rates[trial.budget, trial.stack, trial.task]})
        for trial in plan.trials
        if (trial.budget, trial.stack, trial.task) in rates
    )
    return replace(plan, trials=trials)


def write_tuned(folder: Path, chosen: Sequence[Tuned]) -> None:
    """Keep the chosen rates in a run's folder; of a study that tunes nothing, or has not yet, nothing is kept."""
    if chosen:
        write_json(folder / TUNED, list(chosen))
    else:
        (folder / TUNED).unlink(missing_ok=True)


def read_tuned(folder: str | os.PathLike[str]) -> list[Tuned]:
    """Read the rates that a run's trials were given, in the plan's order; none where the study tunes nothing.

    Raises: `CorruptResultError` for a file that cannot be read.
    """
    path = Path(folder) / TUNED
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [
            Tuned(
                budget=one["budget"],
                stack=one["stack"],
                task=one["task"],
                lr=float(one["lr"]),
                scores={str(rate): None if mean is None else float(mean) for rate, mean in one["scores"].items()},
                edge=bool(one["edge"]),
            )
            for one in data
        ]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptResultError(
            f"{path}: cannot be read ({error}); running the study again in this folder rewrites it"
        ) from None
