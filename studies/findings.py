"""Results gathered for a report: for every task and stack the scores over seeds, the curves, and plain sentences.

May import nothing above studies. Figures and tables show what is gathered here, so that picture and number agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, TypeAlias

from hybridzoo.studies.plan import Plan
from hybridzoo.studies.stack import Kind, Stack
from hybridzoo.studies.stats import Summary, late_gain, pareto_frontier, summarise
from hybridzoo.studies.study import yaml_word
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.trial import data_mark
from hybridzoo.studies.tuning import Tuned
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
    gates: tuple[tuple[dict[str, Any], ...], ...] = ()  # each seed's rows of gates.py; empty for older results

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
            gates=tuple(compress(self.gates, kept)),
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
        steps, curves = self.curve(metric)
        means = [statistics.fmean(values) for values in zip(*curves, strict=False)]
        return late_gain(steps[: len(means)], means, maximise)


@dataclass(frozen=True)
class Findings:
    """All cells that have a result, task by task and in the study's order of stacks; and what has none.

    Of a study with several budgets, `at` gives the findings of one: only stacks of one budget are compared.
    """

    plan: Plan
    cells: dict[str, dict[tuple[str, str], Cell]]  # task, then the stack's budget and label
    results: tuple[dict[str, Any], ...]  # of every trial that has one, as they were read
    failed: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]  # titles of trials without a result
    faults: tuple[str, ...]
    environments: tuple[dict[str, Any], ...]
    tuned: tuple[Tuned, ...] = ()  # the learning rates that pilots chose
    others: int = 0  # trials that the folder has results of, and the plan no longer
    data: dict[str, str] = field(default_factory=dict)  # by task, `data_mark` of its data; missing where unknown
    lacks: tuple[str, ...] = ()  # what a study that was kept without its trials does not tell: predicates of it

    def of(self, task: str) -> list[Cell]:
        return list(self.cells[task].values())

    def cell(self, task: str, stack: Stack) -> Cell | None:
        """The results of a stack on a task; None where there is none yet."""
        return self.cells[task].get((stack.budget, stack.label))

    def at(self, budget: str) -> Findings:
        """The part of the findings that is of one budget."""
        plan = self.plan.at(budget)
        keys = {trial.key for trial in plan.trials}
        part = gather(plan, [result for result in self.results if result["key"] in keys], self.faults)
        return replace(part, data=self.data, lacks=self.lacks)

    def comparable(self, task: str) -> list[Cell]:
        """The cells of a task, each with those seeds alone that all of them have: pairs, so fit to be compared.

        Raises `ValueError` for findings of several budgets.
        """
        cells = self._of_one_budget(task)
        shared = set.intersection(*(set(cell.seeds) for cell in cells)) if cells else set()
        return [cell.of_seeds(shared) for cell in cells] if shared else []

    def shown(self, task: str) -> Shown:
        return self.plan.shown[task]

    def ranked(self, task: str) -> list[Cell]:
        """The cells of a task, best mean first; `ValueError` for findings of several budgets."""
        return sorted(self._of_one_budget(task), key=lambda cell: cell.mean, reverse=self.shown(task).maximise)

    def _of_one_budget(self, task: str) -> list[Cell]:
        if len(self.plan.budgets) > 1:
            given = ", ".join(self.plan.budgets)
            raise ValueError(f"stacks of several budgets ({given}) are not compared: take those of one with at()")
        return self.of(task)


def gather(plan: Plan, results: Sequence[Mapping[str, Any]], faults: Iterable[str] = ()) -> Findings:
    """Sort the results of a plan's trials into cells. One result may be of several budgets' trials."""
    by_key = {result["key"]: result for result in results}
    cells: dict[str, dict[tuple[str, str], Cell]] = {task: {} for task in plan.shown}
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for trial in plan.trials:
        result = by_key.get(trial.key)
        if result is not None and result["status"] != "failed":
            found.setdefault((trial.task, trial.budget, trial.stack), []).append({**result, "seed": trial.seed})
    for task, shown in plan.shown.items():
        for stack in plan.stacks:
            runs = found.get((task, stack.budget, stack.label))
            if runs:
                cells[task][stack.budget, stack.label] = _cell(stack, task, shown, runs)
    recorded = [by_key[trial.key] for trial in plan.distinct if trial.key in by_key]
    environments = {str(result["environment"]): result["environment"] for result in results if result["environment"]}
    return Findings(
        plan=plan,
        cells=cells,
        results=tuple(dict(result) for result in recorded),
        failed=tuple(dict(result) for result in recorded if result["status"] == "failed"),
        missing=tuple(title for key, title in plan.titles(plan.distinct).items() if key not in by_key),
        faults=tuple(faults),
        environments=tuple(environments.values()),
        data={trial.task: data_mark(trial.fingerprint) for trial in plan.trials},
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
        gates=tuple(tuple(run.get("gates", ())) for run in runs),
    )


def weighs_memory(budget: str) -> bool:
    """Whether stacks of a budget may differ in what a sequence keeps, so that quality can be weighed against it."""
    return budget != "inference_bytes"


def on_frontier(cells: Sequence[Cell], maximise: bool) -> list[Cell]:
    """Return the cells that no other of their budget beats on both mean score and inference memory, smallest first.

    None are of a budget that holds this memory equal: the best there would be a frontier by itself.
    """
    found: list[Cell] = []
    for budget in dict.fromkeys(cell.stack.budget for cell in cells if weighs_memory(cell.stack.budget)):
        mine = [cell for cell in cells if cell.stack.budget == budget]
        costs = [float(cell.stack.state_bytes) for cell in mine]
        found += [mine[i] for i in pareto_frontier(costs, [cell.mean for cell in mine], maximise)]
    return found


def families(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the ratio curves by name, each with its cells by attention share.

    One curve holds, of one budget, the mixtures of one recurrent mixer with one attention that differ in nothing else
    than the order and number of their layers, and ends at the stacks of either alone where the study has them. A
    recurrent stack that is in no mixture is a curve of one; attention alone is none. Where curves of one family differ
    in a word (an axis of the study, say), their names end with it.
    """
    cells = list(cells)
    kinds = [_Group.of(cell.stack) for cell in cells]
    curves: dict[_Group, list[Cell]] = {}
    for cell, kind in zip(cells, kinds, strict=True):
        if 0 < cell.stack.attention < 1:
            curves.setdefault(kind, []).append(cell)
    for cell, kind in zip(cells, kinds, strict=True):
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
    """A stack's budget and `Kind` in a form that can be compared and counted."""

    budget: str
    recurrent: Words
    attention: Words
    rest: Words
    parallel: bool
    placement: str

    @classmethod
    def of(cls, stack: Stack) -> _Group:
        kind: Kind = stack.kind
        return cls(
            stack.budget,
            _words(kind.recurrent),
            _words(kind.attention),
            _words(kind.rest),
            kind.parallel,
            stack.placement,
        )

    def ends(self, mixture: _Group) -> bool:
        """Whether this is one of the two ends of `mixture`'s curve, which have no placement."""
        mixers = (self.recurrent, self.attention)
        alike = (self.budget, self.rest) == (mixture.budget, mixture.rest)
        return alike and mixers in ((mixture.recurrent, ()), ((), mixture.attention))

    @property
    def words(self) -> dict[str, str]:
        parallel = ("parallel", str(self.parallel).lower())
        placed = [("placement", self.placement)] if self.placement else []
        return dict([*self.rest, *self.recurrent, *self.attention, parallel, *placed, ("budget", self.budget)])


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
