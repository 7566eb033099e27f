"""Results gathered for a report: for every task and stack the scores over seeds, the curves, and plain sentences.

May import nothing above studies. Figures and tables show what is gathered here, so that picture and number agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, TypeAlias

from hybridzoo.studies.plan import Kind, Plan, Stack
from hybridzoo.studies.stats import Summary, pareto_frontier, still_improving, summarise
from hybridzoo.studies.study import yaml_word
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

    def of_seeds(self, seeds: Collection[int]) -> Cell:
        """Return the same with `seeds` alone."""
        kept = [seed in seeds for seed in self.seeds]
        return replace(
            self,
            seeds=tuple(compress(self.seeds, kept)),
            scores=tuple(compress(self.scores, kept)),
            metrics=tuple(compress(self.metrics, kept)),
            histories=tuple(compress(self.histories, kept)),
            seconds=tuple(compress(self.seconds, kept)),
        )

    def level(self, metric: str) -> list[float]:
        """The scores over seeds at another difficulty."""
        return [metrics[metric] for metrics in self.metrics if metric in metrics]

    def curve(self, metric: str) -> tuple[list[int], list[list[float]]]:
        """Return the steps of evaluations, and each seed's values there."""
        curves = [history.curve(metric) for history in self.histories]
        return curves[0][0], [values for _, values in curves]

    def gained(self, metric: str, maximise: bool) -> float:
        """How much the mean curve's last fifth is better than the fifth before it."""
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

    def comparable(self, task: str) -> list[Cell]:
        """The cells of a task, each with those seeds alone that all of them have: pairs, so fit to be compared."""
        cells = self.of(task)
        shared = set.intersection(*(set(cell.seeds) for cell in cells)) if cells else set()
        return [cell.of_seeds(shared) for cell in cells] if shared else []

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


def on_frontier(cells: Sequence[Cell], maximise: bool) -> list[Cell]:
    """Return the cells that no other beats on both mean score and inference memory, smallest first."""
    costs = [float(cell.stack.state_bytes) for cell in cells]
    best = pareto_frontier(costs, [cell.mean for cell in cells], maximise)
    return [cells[i] for i in best]


def families(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the ratio curves by name, each with its cells by attention share.

    One curve holds the mixtures of one recurrent mixer with one attention that differ in nothing else than the order
    and number of their layers, and ends at the stacks of either alone where the study has them. A recurrent stack that
    is in no mixture is a curve of one; attention alone is none. Where curves of one family differ in a word (an axis of
    the study, say), their names end with it.
    """
    cells = list(cells)
    kinds = {cell.stack.label: _Group.of(cell.stack.kind) for cell in cells}
    curves: dict[_Group, list[Cell]] = {}
    for cell in cells:
        if 0 < cell.stack.attention < 1:
            curves.setdefault(kinds[cell.stack.label], []).append(cell)
    for cell in cells:
        kind = kinds[cell.stack.label]
        joined = [curve for curve in curves if kind.ends(curve)]
        for curve in joined:
            curves[curve].append(cell)
        if not joined and cell.stack.attention == 0:
            curves[kind] = [*curves.get(kind, []), cell]
    for members in curves.values():
        members.sort(key=lambda cell: cell.stack.attention)
    return dict(zip(_names(curves), curves.values(), strict=True))


Words: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Group:
    """A stack's `Kind` in a form that can be compared and counted."""

    recurrent: Words
    attention: Words
    rest: Words
    parallel: bool

    @classmethod
    def of(cls, kind: Kind) -> _Group:
        return cls(_words(kind.recurrent), _words(kind.attention), _words(kind.rest), kind.parallel)

    def ends(self, mixture: _Group) -> bool:
        """Whether this is one of the two ends of `mixture`'s curve."""
        mixers = (self.recurrent, self.attention)
        return self.rest == mixture.rest and mixers in ((mixture.recurrent, ()), ((), mixture.attention))

    @property
    def words(self) -> dict[str, str]:
        return dict([*self.rest, *self.recurrent, *self.attention, ("parallel", str(self.parallel).lower())])


def _words(words: Mapping[str, Any]) -> Words:
    return tuple((name, yaml_word(value)) for name, value in words.items())


def _names(curves: Mapping[_Group, Sequence[Cell]]) -> list[str]:
    """The family of each curve, and of curves that share one the words in which they differ."""
    family = {kind: members[0].stack.family for kind, members in curves.items()}  # the first has least attention
    names: list[str] = []
    for kind in curves:
        others = [other.words for other in curves if other != kind and family[other] == family[kind]]
        words = dict.fromkeys(  # two mixers that differ alike in one word say it once
            f"{name.rpartition('.')[2]}={value}"
            for name, value in kind.words.items()
            if any(other.get(name, value) != value for other in others)
        )
        name = f"{family[kind]} ({', '.join(words)})" if words else family[kind]
        alike = sum(taken.startswith(name) for taken in names)
        names.append(f"{name} ({alike + 1})" if name in names else name)
    return names
