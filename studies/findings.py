"""Results gathered for a report: for every task and stack the scores over seeds, the curves, and plain sentences.

May import nothing above studies. Figures and tables show what is gathered here, so that picture and number agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridzoo.studies.plan import Plan, Stack
from hybridzoo.studies.stats import Summary, pareto_frontier, still_improving, summarise
from hybridzoo.studies.tasks import Shown
from hybridzoo.training import History


@dataclass(frozen=True)
class Cell:
    """One stack on one task: `scores[i]`, `histories[i]` and `metrics[i]` are of `seeds[i]`, in the study's order."""

    stack: Stack
    task: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    metrics: tuple[dict[str, float], ...]
    histories: tuple[History, ...]
    seconds: tuple[float, ...]

    @property
    def summary(self) -> Summary:
        return summarise(self.scores)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def level(self, metric: str) -> list[float]:
        """The scores over seeds at another difficulty."""
        return [metrics[metric] for metrics in self.metrics if metric in metrics]

    def curve(self, metric: str) -> tuple[list[int], list[list[float]]]:
        """Return the steps of evaluations, and each seed's values there."""
        curves = [history.curve(metric) for history in self.histories]
        return curves[0][0], [values for _, values in curves]

    def gained(self, metric: str, maximise: bool) -> float:
        """How much the mean curve still improved in the last fifth of the training."""
        _, curves = self.curve(metric)
        means = [statistics.fmean(values) for values in zip(*curves, strict=False)]
        return still_improving(means, maximise)


@dataclass(frozen=True)
class Findings:
    """All cells that have a result, task by task and in the study's order of stacks; and what has none."""

    plan: Plan
    cells: dict[str, dict[str, Cell]]  # task, then stack's label
    results: tuple[dict[str, Any], ...]  # of every trial that has one, as they were read
    failed: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]  # titles of trials without a result
    faults: tuple[str, ...]
    environments: tuple[dict[str, Any], ...]

    def of(self, task: str) -> list[Cell]:
        return list(self.cells[task].values())

    def shown(self, task: str) -> Shown:
        return self.plan.shown[task]

    def ranked(self, task: str) -> list[Cell]:
        """The cells of a task, best mean first."""
        return sorted(self.of(task), key=lambda cell: cell.mean, reverse=self.shown(task).maximise)


def gather(plan: Plan, results: Sequence[Mapping[str, Any]], faults: Iterable[str] = ()) -> Findings:
    """Sort the results of a plan's trials into cells."""
    by_key = {result["key"]: result for result in results}
    stacks = {stack.label: stack for stack in plan.stacks}
    cells: dict[str, dict[str, Cell]] = {task: {} for task in plan.shown}
    failed: list[dict[str, Any]] = []
    missing: list[str] = []
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trial in plan.trials:
        result = by_key.get(trial.key)
        if result is None:
            missing.append(trial.title)
        elif result["status"] == "failed":
            failed.append(dict(result))
        else:
            found.setdefault((trial.task, trial.stack), []).append({**result, "seed": trial.seed})
    for task, shown in plan.shown.items():
        for label in stacks:
            runs = found.get((task, label))
            if runs:
                cells[task][label] = _cell(stacks[label], task, shown, runs)
    environments = {str(result["environment"]): result["environment"] for result in results if result["environment"]}
    return Findings(
        plan=plan,
        cells=cells,
        results=tuple(dict(by_key[trial.key]) for trial in plan.trials if trial.key in by_key),
        failed=tuple(failed),
        missing=tuple(missing),
        faults=tuple(faults),
        environments=tuple(environments.values()),
    )


def _cell(stack: Stack, task: str, shown: Shown, runs: Sequence[Mapping[str, Any]]) -> Cell:
    return Cell(
        stack=stack,
        task=task,
        seeds=tuple(run["seed"] for run in runs),
        scores=tuple(run["metrics"][shown.metric] for run in runs),
        metrics=tuple(run["metrics"] for run in runs),
        histories=tuple(History.from_dict(run["history"]) for run in runs),
        seconds=tuple(run["seconds"] for run in runs),
    )


def on_frontier(findings: Findings, task: str) -> list[Cell]:
    """Return the cells that no other beats on both mean score and inference memory, smallest first."""
    cells = findings.of(task)
    costs = [float(cell.stack.state_bytes) for cell in cells]
    best = pareto_frontier(costs, [cell.mean for cell in cells], findings.shown(task).maximise)
    return [cells[i] for i in best]


def families(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the ratio curves: for each recurrent family its cells by attention share, with all-attention at the end.

    Where the study has several all-attention stacks (windows, say), none belongs to a family more than the others, and
    each curve ends where its own cells do. Stacks of attention alone are no family.
    """
    cells = list(cells)
    pure = [cell for cell in cells if cell.stack.attention == 1]
    curves: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.stack.attention < 1:
            curves.setdefault(cell.stack.family, []).append(cell)
    for members in curves.values():
        members.sort(key=lambda cell: cell.stack.attention)
        if len(pure) == 1 and len({cell.stack.attention for cell in members}) > 1:
            members.append(pure[0])
    return curves
