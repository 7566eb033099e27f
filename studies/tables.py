"""The numbers of a report as tables: one a kind of picture, written as CSV with nothing rounded.

May import nothing above studies. The columns stay as they are named here: people read them back.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from hybridzoo.studies.findings import Cell, Findings, on_frontier, weighs_memory
from hybridzoo.studies.results import SHORT_KEY
from hybridzoo.training import History

Value: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """`rows[i][j]` is the value of `columns[j]`; None where there is none."""

    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def to_csv(self) -> str:
        """Return the table as CSV: numbers in full precision, nothing for None."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def all_tables(findings: Findings) -> dict[str, Table]:
    """Return every table of a report, by the stem of its file's name."""
    return {
        "stacks": stack_table(findings),
        "trials": trial_table(findings),
        "levels": level_table(findings),
        "learning": learning_table(findings),
    }


def stack_table(findings: Findings) -> Table:
    """A row for each task and stack: what it costs and how it scored; behind the ratio curve and the frontier."""
    columns = (
        *("budget", "task", "stack", "layers", "family", "attention_share", "placement", "ffn_width", "parameters"),
        *("trained_length", "train_flops_per_token", "decode_flops_per_token", "state_bytes", "kv_bytes"),
        *("metric", "seeds", "mean", "low_95", "high_95", "least", "most", "gained_at_the_end", "on_frontier"),
        *("seconds_per_trial", "solved"),
    )
    rows = []
    for task, shown in findings.plan.shown.items():
        best = [cell.stack for cell in on_frontier(findings.of(task), shown.maximise)]
        for stack in findings.plan.stacks:
            cell = findings.cell(task, stack)
            costs = (
                *(stack.budget, task, stack.label, stack.pattern, stack.family, stack.attention, stack.placement),
                stack.ffn_width,
                *(
                    stack.parameters[task],
                    findings.plan.lengths[task],
                    stack.train_flops[task],
                    stack.decode_flops[task],
                ),
                *(stack.state_bytes, stack.kv_bytes, shown.metric),
            )
            beaten_by_none = stack in best if weighs_memory(stack.budget) else None
            scores = _scores(cell, shown.metric, shown.maximise, beaten_by_none)
            rows.append((*costs, *scores, stack.solved))
    return Table("Stacks: what each costs and how it scored", columns, tuple(rows))


def _scores(cell: Cell | None, metric: str, maximise: bool, best: bool | None) -> tuple[Value, ...]:
    if cell is None:
        return (0, *[None] * 8)
    summary = cell.summary
    low, high = (summary.low, summary.high) if summary.n > 1 else (None, None)
    gained = cell.gained(metric, maximise)
    mean_seconds = sum(cell.seconds) / len(cell.seconds)
    return (summary.n, summary.mean, low, high, summary.least, summary.most, gained, best, mean_seconds)


def trial_table(findings: Findings) -> Table:
    """A row for each planned trial, whatever became of it."""
    columns = (
        *("budget", "task", "stack", "seed", "status", "metric", "score", "seconds", "tokens_per_second", "error"),
        *("key", "data", "code"),
    )
    results = {result["key"]: result for result in findings.results}
    rows: list[tuple[Value, ...]] = []
    for trial in findings.plan.trials:
        metric = findings.shown(trial.task).metric
        result: dict[str, Any] = results.get(trial.key, {})
        rows.append(
            (
                *(trial.budget, trial.task, trial.stack, trial.seed, result.get("status", "missing"), metric),
                result.get("metrics", {}).get(metric),
                result.get("seconds"),
                History.from_dict(result["history"]).tokens_per_second if result.get("history") else None,
                result.get("error", ""),
                *(trial.key, findings.data.get(trial.task), trial.code[:SHORT_KEY]),
            )
        )
    return Table("Trials: every one that was planned", columns, tuple(rows))


def level_table(findings: Findings) -> Table:
    """A row for each seed and difficulty: what lies behind the level curves."""
    rows = [
        (cell.stack.budget, task, cell.stack.label, seed, level, metrics[metric])
        for task, shown in findings.plan.shown.items()
        for cell in findings.of(task)
        for seed, metrics in zip(cell.seeds, cell.metrics, strict=True)
        for level, metric in shown.levels
        if metric in metrics
    ]
    columns = ("budget", "task", "stack", "seed", "level", "score")
    return Table("Levels: the score at each difficulty", columns, tuple(rows))


def learning_table(findings: Findings) -> Table:
    """A row for each seed and evaluation on the way: what lies behind the learning curves."""
    columns = ("budget", "task", "stack", "seed", "step", "score")
    return Table("Learning: the score on the way", columns, tuple(_learning(findings)))


def _learning(findings: Findings) -> Iterable[tuple[Value, ...]]:
    for task, shown in findings.plan.shown.items():
        for cell in findings.of(task):
            for seed, history in zip(cell.seeds, cell.histories, strict=True):
                for step, value in zip(*history.curve(shown.metric), strict=True):
                    yield cell.stack.budget, task, cell.stack.label, seed, step, value
