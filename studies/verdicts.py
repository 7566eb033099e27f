"""What a study's numbers allow to be concluded: what ties with the best, where a curve is best, which orders hold.

May import nothing above studies. sentences.py says it, tables.py lists it, figures.py draws it: all three ask here, so
that they agree.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hybridzoo.studies.comparisons import (
    SEEDS,
    Comparison,
    RankCorrelation,
    holm,
    paired_p,
    rank_correlation,
    with_the_best,
)
from hybridzoo.studies.findings import Cell, Findings, families
from hybridzoo.studies.optimum import Optimum, fit_optimum
from hybridzoo.studies.stack import Stack
from hybridzoo.studies.stats import Summary, difference
from hybridzoo.studies.tasks import Shown

GUESSES = 1.5  # times the score of guessing: a mean below it says that next to nothing was learnt
FEWEST = 3  # stacks that an order must have, to be worth a correlation


@dataclass(frozen=True)
class Ranking:
    """Cells of the same seeds, best mean first, each but the first with its comparison to the first."""

    cells: tuple[Cell, ...]
    compared: Mapping[str, Comparison]  # by stack's label

    @property
    def ties(self) -> list[Cell]:
        """The cells that the seeds do not tell from the best."""
        return [cell for cell in self.cells[1:] if self.compared[cell.stack.label].tied]


def ranking(cells: Sequence[Cell], maximise: bool) -> Ranking:
    """Rank cells of the same seeds and compare each with the best, corrected for their number."""
    if not cells:
        return Ranking((), {})
    ranked = sorted(cells, key=lambda cell: cell.mean, reverse=maximise)
    compared = with_the_best([cell.scores for cell in ranked], maximise)
    return Ranking(tuple(ranked), {ranked[one.index].stack.label: one for one in compared.rest})


def optimum_of(curve: Sequence[Cell], maximise: bool) -> Optimum:
    """Fit the best ratio of a curve's cells, all of the same seeds."""
    return fit_optimum([cell.stack.attention for cell in curve], [cell.scores for cell in curve], maximise)


def optima(findings: Findings, task: str) -> dict[str, Optimum]:
    """Return the optimum of every ratio curve of three ratios or more, by its name; none where nothing was learnt."""
    return _optima(findings.shown(task), findings.comparable(task))


def level_optima(findings: Findings, task: str) -> dict[int, dict[str, Optimum]]:
    """Return the same at each difficulty that the trained models were scored at, of a task that has several."""
    shown, cells = findings.shown(task), findings.comparable(task)
    found = {}
    for level, metric in shown.levels if len(shown.levels) > 1 else ():
        scored = [replace(cell, scores=tuple(cell.level(metric))) for cell in cells]
        if all(len(cell.scores) == len(cell.seeds) for cell in scored):
            found[level] = _optima(shown, scored)
    return found


def _optima(shown: Shown, cells: Sequence[Cell]) -> dict[str, Optimum]:
    if not _learnt(shown, cells):
        return {}
    curves = families(cells)
    ratios = {name: {cell.stack.attention for cell in curve} for name, curve in curves.items()}
    return {name: optimum_of(curve, shown.maximise) for name, curve in curves.items() if len(ratios[name]) >= 3}


@dataclass(frozen=True)
class MixerPair:
    """Two ratio curves compared at the `shares` of attention that both have, all but attention alone.

    `apart` summarises first - second, each seed's mean over those shares; `p` is the paired t test's, and `adjusted`
    is `p` after Holm, the family being all pairs of the task.
    """

    first: str
    second: str
    shares: tuple[float, ...]
    apart: Summary
    p: float
    adjusted: float

    @property
    def tied(self) -> bool:
        """Whether the seeds do not tell the two apart."""
        return self.adjusted >= 0.05


def mixer_pairs(findings: Findings, task: str) -> list[MixerPair]:
    """Compare every two ratio curves of a task; none on fewer than `SEEDS` seeds, or where nothing was learnt.

    The two differ in their recurrent mixer alone: not in a word of the attention, say, or in where it stands. The mean
    over shares makes one number of a seed, since what its stacks have in common, its data among them, makes them too
    alike to count as several.
    """
    cells = findings.comparable(task)
    if not _learnt(findings.shown(task), cells) or len(cells[0].seeds) < SEEDS:
        return []
    curves = families(cells)
    pairs = []
    for first, second in itertools.combinations(curves, 2):
        if not _differ_in_the_mixer(curves[first], curves[second]):
            continue
        one, other = _by_share(curves[first]), _by_share(curves[second])
        shares = tuple(sorted(share for share in one if share in other))
        if shares:
            apart = difference(_mean(one[share] for share in shares), _mean(other[share] for share in shares))
            pairs.append((first, second, shares, apart, paired_p(apart)))
    return [MixerPair(*pair, value) for pair, value in zip(pairs, holm([p for *_, p in pairs]), strict=True)]


def _differ_in_the_mixer(first: Sequence[Cell], second: Sequence[Cell]) -> bool:
    """Whether the stacks of two curves differ in their recurrent mixer and in nothing else."""
    # Of a curve's stacks a mixture says most: what the attention is, and where it stands.
    one, other = (max(curve, key=lambda cell: 0 < cell.stack.attention < 1).stack for curve in (first, second))
    alike = (_same(stack, "attention", "rest") + placement(stack) for stack in (one, other))
    return len(set(alike)) == 1 and one.kind.recurrent != other.kind.recurrent


def _by_share(curve: Sequence[Cell]) -> dict[float, list[float]]:
    """Each seed's score at every share of attention below 1, a mean where several stacks have one share."""
    found: dict[float, list[Sequence[float]]] = {}
    for cell in curve:
        if cell.stack.attention < 1:
            found.setdefault(cell.stack.attention, []).append(cell.scores)
    return {share: _mean(scores) for share, scores in found.items()}


def _mean(rows: Iterable[Sequence[float]]) -> list[float]:
    """The mean of several rows of scores, seed by seed."""
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def learnt(findings: Findings, task: str) -> bool:
    """Whether some stack of a task scores well above guessing: without one there is nothing to compare."""
    return _learnt(findings.shown(task), findings.comparable(task))


def _learnt(shown: Shown, cells: Sequence[Cell]) -> bool:
    return any(not near_guessing(shown, cell) for cell in cells)


def near_guessing(shown: Shown, cell: Cell) -> bool:
    """Whether a mean is under `GUESSES` times the score of guessing, where the task has one."""
    return shown.chance is not None and shown.maximise and cell.mean < GUESSES * shown.chance


@dataclass(frozen=True)
class Order:
    """How far two settings order the same stacks alike. `first` and `second` name the settings."""

    task: str
    first: str
    second: str
    stacks: tuple[str, ...]
    correlation: RankCorrelation


def all_orders(findings: Findings) -> list[tuple[str, Order]]:
    """Return every order that a study can compare, each with its budget (none where budgets are what is compared)."""
    each = parts(findings)
    orders = [("", order) for task in findings.plan.shown for order in budget_orders(each, task)]
    for name, part in each.items():
        orders += [(name, order) for task in part.plan.shown for order in hybrid_orders(part, task)]
    return orders


def parts(findings: Findings) -> dict[str, Findings]:
    """Return the findings of each budget that the study holds, in its order."""
    budgets = findings.plan.budgets
    return {name: findings.at(name) for name in budgets} if len(budgets) > 1 else {budgets[0]: findings}


def budget_orders(each: Mapping[str, Findings], task: str) -> list[Order]:
    """Compare the order of stacks on `task` under every two budgets: of stacks, and seeds, that both have."""
    orders = []
    for (first, one), (second, other) in itertools.combinations(each.items(), 2):
        left = {cell.stack.label: cell for cell in one.comparable(task)}
        right = {cell.stack.label: cell for cell in other.comparable(task)}
        pairs = [(left[label], right[label]) for label in left if label in right]
        orders += _order(task, first, second, pairs, [label for label in left if label in right])
    return orders


def hybrid_orders(findings: Findings, task: str) -> list[Order]:
    """Compare the order of recurrent mixers alone with that of the hybrids made of them, at every ratio."""
    cells = findings.comparable(task)
    pure = {_same(cell.stack, "recurrent", "rest"): cell for cell in cells if cell.stack.attention == 0}
    groups: dict[tuple[float, str, str], dict[str, tuple[Cell, Cell]]] = {}
    for cell in cells:
        alone = pure.get(_same(cell.stack, "recurrent", "rest"))
        if 0 < cell.stack.attention < 1 and alone is not None:
            key = (cell.stack.attention, _same(cell.stack, "attention", "rest"), placement(cell.stack))
            groups.setdefault(key, {}).setdefault(alone.stack.label, (alone, cell))
    orders = []
    for (share, _, place), pairs in sorted(groups.items()):
        second = " ".join(filter(None, [f"{100 * share:.3g} % attention", place]))
        orders += _order(task, "no attention", second, list(pairs.values()), list(pairs))
    return orders


def _order(
    task: str, first: str, second: str, pairs: Sequence[tuple[Cell, Cell]], labels: Sequence[str]
) -> list[Order]:
    if len(pairs) < FEWEST:
        return []
    correlation = rank_correlation([a.scores for a, _ in pairs], [b.scores for _, b in pairs])
    return [Order(task, first, second, tuple(labels), correlation)]


def placement(stack: Stack) -> str:
    """Where the stack's attention layers stand, in one word; nothing where the study does not vary it."""
    return stack.placement


def _same(stack: Stack, *parts: str) -> str:
    """What two stacks must share to differ in nothing but the other parts of their kind."""
    words = {part: getattr(stack.kind, part) for part in parts}
    return json.dumps({**words, "parallel": stack.kind.parallel}, sort_keys=True, default=str)


def grids(findings: Findings, task: str) -> dict[str, dict[tuple[str, float], Cell]]:
    """Return the mixtures of every recurrent mixer by (placement, share of attention), where a study varies both.

    Cells have the same seeds throughout. Of several stacks at one place the study's first stands.
    """
    found: dict[str, dict[tuple[str, float], Cell]] = {}
    for cell in findings.comparable(task):
        if 0 < cell.stack.attention < 1 and placement(cell.stack):
            found.setdefault(cell.stack.family, {}).setdefault((placement(cell.stack), cell.stack.attention), cell)
    return {
        name: grid
        for name, grid in found.items()
        if len({place for place, _ in grid}) > 1 and len({share for _, share in grid}) > 1
    }
