"""What is concluded, as tables: comparisons with the best, optima, orders, and what the gates do.

May import nothing above studies. verdicts.py concludes; tables.py writes these beside the numbers they come from.
"""

from __future__ import annotations

import math

from hybridzoo.studies.comparisons import SEEDS
from hybridzoo.studies.findings import Findings
from hybridzoo.studies.gates import QUANTILES
from hybridzoo.studies.tables import Table, Value, all_tables
from hybridzoo.studies.verdicts import all_orders, level_optima, mixer_pairs, optima, parts, ranking


def every_table(findings: Findings) -> dict[str, Table]:
    """Return all tables of a report, by the stem of their files' names: the numbers, then what is concluded."""
    return {
        **all_tables(findings),
        "comparisons": comparison_table(findings),
        "mixers": mixer_table(findings),
        "optima": optimum_table(findings),
        "orders": order_table(findings),
        "gates": gate_table(findings),
    }


def comparison_table(findings: Findings) -> Table:
    """A row for each stack but the best of its task: its paired difference from the best, and p after Holm."""
    columns = (
        *("budget", "task", "best", "stack", "seeds", "best_minus_stack", "low_95", "high_95", "p", "p_holm"),
        *("told_apart", "test"),
    )
    rows: list[tuple[Value, ...]] = []
    for budget, part in parts(findings).items():
        for task, shown in part.plan.shown.items():
            ranked = ranking(part.comparable(task), shown.maximise)
            for cell in ranked.cells[1:]:
                one = ranked.compared[cell.stack.label]
                names = (budget, task, ranked.cells[0].stack.label, cell.stack.label, one.apart.n)
                numbers = (one.apart.mean, one.apart.low, one.apart.high, one.p, one.adjusted)
                test = "paired t" if one.apart.n >= SEEDS else "ranges of the seeds"
                rows.append((*names, *map(_number, numbers), not one.tied, test))
    return Table("Comparisons: every stack against the best of its task", columns, tuple(rows))


def mixer_table(findings: Findings) -> Table:
    """A row for each two ratio curves: their paired difference over the shares of attention that both have."""
    columns = (
        *("budget", "task", "first", "second", "shares", "seeds", "first_minus_second", "low_95", "high_95"),
        *("p", "p_holm", "told_apart"),
    )
    rows: list[tuple[Value, ...]] = []
    for budget, part in parts(findings).items():
        for task in part.plan.shown:
            for pair in mixer_pairs(part, task):
                names = (budget, task, pair.first, pair.second, " ".join(map(str, pair.shares)), pair.apart.n)
                numbers = (pair.apart.mean, pair.apart.low, pair.apart.high, pair.p, pair.adjusted)
                rows.append((*names, *map(_number, numbers), not pair.tied))
    return Table("Mixers: every two ratio curves", columns, tuple(rows))


def optimum_table(findings: Findings) -> Table:
    """A row for each ratio curve: where it is best, within what interval, or that it cannot be told.

    First by the task's own score, without a level, then at each difficulty that the trained models were scored at.
    """
    columns = (
        *("budget", "task", "level", "curve", "verdict", "best_ratio", "low_95", "high_95", "best_measured_ratio"),
        "why",
    )
    rows: list[tuple[Value, ...]] = []
    for budget, part in parts(findings).items():
        for task in part.plan.shown:
            for level, curves in ((None, optima(part, task)), *level_optima(part, task).items()):
                for name, found in curves.items():
                    told = found.verdict in ("inside", "edge")
                    where = (found.ratio, found.low, found.high, found.measured) if told else (None,) * 4
                    rows.append((budget, task, level, name, found.verdict, *where, found.why))
    return Table("Optima: the best ratio of every curve", columns, tuple(rows))


def order_table(findings: Findings) -> Table:
    """A row for each two settings whose orders of stacks are compared: budgets, and alone against in hybrids."""
    columns = ("budget", "task", "first", "second", "stacks", "kendall_tau", "low", "high", "p", "names")
    rows: list[tuple[Value, ...]] = []
    for budget, order in all_orders(findings):
        found = order.correlation
        numbers = map(_number, (found.tau, found.low, found.high, found.p))
        rows.append((budget, order.task, order.first, order.second, found.n, *numbers, "; ".join(order.stacks)))
    return Table("Orders: how far two settings rank stacks alike", columns, tuple(rows))


def gate_table(findings: Findings) -> Table:
    """A row for each seed, layer, mixer and gate of the trained models."""
    columns = ("budget", "task", "stack", "seed", "layer", "mixer", "gate", "mean", *QUANTILES)
    rows = [
        (cell.stack.budget, task, cell.stack.label, seed, *(row[name] for name in columns[4:]))
        for task in findings.plan.shown
        for cell in findings.of(task)
        for seed, gates in zip(cell.seeds, cell.gates, strict=False)
        for row in gates
    ]
    return Table("Gates: what they do in the trained models, layer by layer", columns, tuple(rows))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
