"""Expressivity: whether content gates solve selective key overwrite where token gates cannot, at equal parameters.

First by construction, in float64: a plain delta rule has neither an erase mask nor a content gate, and solves the task
exactly. Then by training, where it is no longer exact: more pairs than keys, and queries that favour a few pairs.

Shapes: B batch, K key dim, V value dim, n pairs, m overwrites.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hybridzoo.studies.stats import difference
from hybridzoo.studies.tables import Table, Value
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, largest_error, orthogonal_keys, recall, unit_keys
from hybridzoo.studies.theory.stacks import train_stack
from hybridzoo.studies.theory.trained import FITS, FULL, HEAD, SKEWED, steps, train_one

# Without decay, so that the erase gates are the only thing that can forget, and what they learn is not hidden by it.
CONTENT, TOKEN, NEITHER = "carve[decay=none]", "carve[decay=none,erase=token]", "delta_net"
GATES = {"content": CONTENT, "token": TOKEN, "none": NEITHER}
TASKS = {"8 pairs": FITS, "16 pairs": FULL, "16 pairs, skewed": SKEWED}
STACK, STACK_STEPS = "16 pairs, four layers", 300


class Row(NamedTuple):
    """One trained model: its task, what its erase gate reads, its size and its shares of right answers."""

    task: str
    erase: str
    mixer: str
    seed: int
    parameters: int
    accuracy: float
    overwritten: float
    intact: float
    loss: float


class Built(NamedTuple):
    """The delta rule with full writes on keys and overwrites: its largest relative error over all keys."""

    K: int
    V: int
    pairs: int
    overwrites: int
    keys: str
    rule: str
    largest_relative_error: float


def constructed(K: int, V: int, n: int, m: int, kind: str, correct: bool, generator: torch.Generator) -> float:
    """Write `n` pairs and then `m` of their keys anew, read all keys, and return the largest relative error.

    Overwritten keys must give their newer value, the others their own; `correct` is the delta rule, else writes add up.
    """
    keys = orthogonal_keys(4, n, K, generator) if kind == "orthogonal" else unit_keys(4, n, K, generator=generator)
    values = torch.randn(4, n, V, generator=generator, dtype=F64)
    newer = torch.randn(4, m, V, generator=generator, dtype=F64)
    written_keys = torch.cat([keys, keys[:, :m]], dim=1)
    written = torch.cat([values, newer], dim=1)
    final = torch.cat([newer, values[:, m:]], dim=1)
    read = recall(written_keys, written, correct=correct)[:, :n]  # the first reads ask for each key once
    return largest_error(read, final)


def probe(settings: Settings) -> Result:
    """Solve the task by construction, then train content, token and no erase gates on it."""
    generator = torch.Generator().manual_seed(settings.seed)
    built = []
    for K, V in settings.pick(((4, 2),), ((8, 8), (16, 4), (32, 64))):
        for kind, n in (("orthogonal", K), ("random", K), ("random", 2 * K)):
            for rule in ("delta rule", "sum"):
                worst = constructed(K, V, n, n // 2, kind, rule == "delta rule", generator)
                built.append(Built(K, V, n, n // 2, kind, rule, worst))
    exact = max(row.largest_relative_error for row in built if row.keys == "orthogonal" and row.rule == "delta rule")
    seeds = [settings.seed + i for i in range(settings.pick(1, 3, 5))]
    rows = []
    for name, task in TASKS.items() if settings.size != "small" else [*TASKS.items()][:1]:
        for erase, mixer in GATES.items():
            trained = [train_one(mixer, task, steps(settings), seed, CONTENT) for seed in seeds]
            rows += [
                _row(name, erase, seed, one.parameters, one.scores, one.loss)
                for seed, one in zip(seeds, trained, strict=True)
            ]
    if settings.size == "full":
        for erase, mixer in GATES.items():
            for seed in seeds:
                size, scores, loss = train_stack(mixer, CONTENT, STACK_STEPS, seed)
                rows.append(_row(STACK, erase, seed, size, scores, loss))
    names = list(dict.fromkeys(row.task for row in rows))
    compared = [_compare(rows, name, len(names)) for name in names]
    statements = (
        Statement(
            "Token gates cannot solve selective key overwrite; content gates can.",
            FAILS if exact < 1e-9 else OPEN,
            f"the delta rule, with full writes and no erase gate of either kind, solves it to {exact:.0e} with "
            "orthogonal keys up to K",
        ),
        *(statement for statement, _ in compared),
    )
    helped = [name for (statement, name) in compared if statement.verdict == HOLDS]
    return Result(
        name="separation",
        title="Expressivity on selective key overwrite",
        claim="Content-aware erase solves selective key overwrite, which no token-only gate can (Definition 6).",
        source=f"{PAPER}, expressivity separation",
        statements=statements,
        finding=(
            f"The delta rule already overwrites exactly ({exact:.0e}), so the task separates nothing by itself. "
            f"Trained for {steps(settings)} steps from {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} each, "
            + (f"a content gate helped with {' and '.join(helped)}." if helped else "content was not told from token.")
        ),
        tables={
            "constructed": Table("Overwrite by construction", Built._fields, tuple(built)),
            "trained": Table(f"Trained models, of heads of {HEAD} by {HEAD}", Row._fields, tuple(rows)),
            "means": _means(rows),
        },
        shown=("constructed", "means"),
        panels=(_panel(rows),),
    )


def _row(task: str, erase: str, seed: int, parameters: int, scores: Mapping[str, float], loss: float) -> Row:
    shares = (scores["accuracy"], scores["overwritten"], scores["intact"])
    return Row(task, erase, GATES[erase], seed, parameters, *shares, loss)


def _of(rows: Sequence[Row], task: str, erase: str) -> list[Row]:
    return [row for row in rows if (row.task, row.erase) == (task, erase)]


def _compare(rows: Sequence[Row], task: str, comparisons: int) -> tuple[Statement, str]:
    """Judge whether content helps on `task`: only an interval of the paired difference that excludes zero decides.

    The intervals of all `comparisons` hold together with 95 % (Bonferroni).
    """
    content, token = _of(rows, task, "content"), _of(rows, task, "token")
    confidence = 1 - 0.05 / comparisons
    gap = difference([row.accuracy for row in content], [row.accuracy for row in token], confidence)
    text = f"At equal parameters a content gate does better than a token gate: {task}."
    said = f"{100 * gap.mean:+.1f} points of recall over {gap.n} {'seed' if gap.n == 1 else 'seeds'}"
    if math.isnan(gap.low):
        return Statement(text, OPEN, said), task
    together = f" (95 % for all {comparisons} together)" if comparisons > 1 else " (95 %)"
    said += f", interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}{together}"
    if gap.low <= 0 <= gap.high:
        return Statement(text, OPEN, said), task
    return Statement(text, HOLDS if gap.mean > 0 else FAILS, said), task


def _means(rows: Sequence[Row]) -> Table:
    means: list[tuple[Value, ...]] = [
        (
            *(task, erase, of[0].parameters, len(of)),
            statistics.fmean(row.accuracy for row in of),
            statistics.fmean(row.overwritten for row in of),
            statistics.fmean(row.intact for row in of),
            max(row.accuracy for row in of) - min(row.accuracy for row in of),
        )
        for task in dict.fromkeys(row.task for row in rows)
        for erase in GATES
        if (of := _of(rows, task, erase))
    ]
    columns = ("task", "erase", "parameters", "seeds", "accuracy", "overwritten", "intact", "range_over_seeds")
    return Table("Recall after training, means over seeds", columns, tuple(means))


def _panel(rows: Sequence[Row]) -> Panel:
    names = list(dict.fromkeys(row.task for row in rows))
    lines = []
    for place, erase in enumerate(GATES):
        mine = [row for row in rows if row.erase == erase]
        x = tuple(names.index(row.task) + 0.12 * (place - 1) for row in mine)  # side by side
        lines.append(Line(f"erase gate: {erase}", x, tuple(row.accuracy for row in mine), "points"))
    return Panel("Recall after training, every seed", "", "share of right answers", tuple(lines), names=tuple(names))
