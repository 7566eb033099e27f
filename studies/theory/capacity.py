"""Memory capacity: how many key-value pairs a state of K by V gives back, against the claimed min(K, V).

Pairs go through the recurrence itself. A linear read is exact for all of n pairs exactly when some state maps each key
to its value: that is n linear systems in K unknowns, one a value channel, and V plays no part.

Shapes: B batch, K key dim, V value dim, n pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import largest_error, orthogonal_keys, recall, unit_keys

EXACT = 1e-9  # relative error in float64 below which a read is called exact
RECALLED = 0.99  # share of queries whose nearest value is the right one, for a count of pairs to pass
CODEBOOK = 64  # values to choose from


class Row(NamedTuple):
    """One count of pairs, stored one way: the largest relative error of a read, and how often the nearest is right."""

    K: int
    V: int
    pairs: int
    keys: str
    stored_by: str
    largest_relative_error: float
    nearest_value: float


def best_read(keys: Tensor, values: Tensor) -> Tensor:
    """Read through the best of all states, in least squares: what no order of writing and no gate can improve on."""
    state = torch.linalg.pinv(keys) @ values
    return keys @ state


def probe(settings: Settings) -> Result:
    """Count the pairs recalled for several K and V, with orthogonal and with random keys."""
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = settings.pick(((8, 2), (8, 8), (4, 8)), ((16, 4), (16, 16), (16, 64), (32, 8), (8, 32)))
    batch = settings.pick(2, 8, 32)
    rows: list[Row] = []
    for K, V in sizes:
        for n in _counts(K):
            rows.extend(_measure(K, V, n, batch, generator))
    table = Table(
        "Recall of n pairs by keys and by how they are stored",
        Row._fields,
        tuple(rows),
    )
    summary = _summary(rows, sizes)
    found = {(K, V): _largest(rows, K, V, "orthogonal", "delta rule", True) for K, V in sizes}
    capacity = Statement(
        "A state of K by V stores min(K, V) pairs exactly, and no more.",
        HOLDS if all(n == min(size) for size, n in found.items()) else FAILS,
        "; ".join(
            f"K = {K}, V = {V}: {n} pairs exactly, {min(K, V)} claimed" for (K, V), n in found.items() if n != min(K, V)
        ),
    )
    corrected = Statement(
        "Orthogonal keys are recalled exactly up to K pairs, whatever V is (our statement).",
        HOLDS if all(n == K for (K, _), n in found.items()) else FAILS,
        f"largest relative error at n = K: {_worst_at_K(rows):.1e}; with n > K no state holds them exactly",
    )
    K, V = sizes[0]
    return Result(
        name="capacity",
        title="Memory capacity",
        claim="The state of one head holds at most min(K, V) key-value pairs.",
        source=f"{PAPER}, memory capacity",
        statements=(capacity, corrected),
        finding=(
            f"The capacity is K. A state of {K} by {V} gives back {K} pairs with orthogonal keys to "
            f"{_worst_at_K(rows):.0e}; V decides how much each pair says, not how many there are. With random keys the "
            "best state is as exact, but one pass of the delta rule is not: later writes disturb earlier pairs."
        ),
        tables={"recall": table, "summary": summary},
        shown=("summary",),
        panels=tuple(_panel(rows, K, V) for K, V in (sizes[0], sizes[1])),
    )


def _counts(K: int) -> list[int]:
    return sorted({1, max(1, K // 4), K // 2, 3 * K // 4, K, K + 1, 3 * K // 2, 2 * K, 3 * K})


def _measure(K: int, V: int, n: int, batch: int, generator: torch.Generator) -> list[Row]:
    book = F.normalize(torch.randn(CODEBOOK, V, generator=generator, dtype=torch.float64), dim=-1)
    chosen = torch.randint(CODEBOOK, (batch, n), generator=generator)
    values = book[chosen]
    kinds = {"random": unit_keys(batch, n, K, generator=generator)}
    if n <= K:
        kinds = {"orthogonal": orthogonal_keys(batch, n, K, generator), **kinds}
    rows: list[Row] = []
    for kind, keys in kinds.items():
        reads = {
            "delta rule": recall(keys, values),
            "sum": recall(keys, values, correct=False),
            "best state": best_read(keys, values),
        }
        for name, read in reads.items():
            right = ((read @ book.T).argmax(-1) == chosen).double().mean()
            rows.append(Row(K, V, n, kind, name, largest_error(read, values), float(right)))
    return rows


def _largest(rows: list[Row], K: int, V: int, kind: str, stored: str, exact: bool) -> int:
    """The largest n up to which every smaller count that was tried passes too."""
    last = 0
    for row in rows:
        if row[:2] == (K, V) and (row.keys, row.stored_by) == (kind, stored):
            if not (row.largest_relative_error < EXACT if exact else row.nearest_value >= RECALLED):
                break
            last = row.pairs
    return last


def _summary(rows: list[Row], sizes: tuple[tuple[int, int], ...]) -> Table:
    columns = (
        *("K", "V", "claimed", "orthogonal keys, exact", "random keys, exact in the best state"),
        *("random keys, nearest value, best state", "random keys, nearest value, delta rule"),
    )
    return Table(
        f"Most pairs recalled: exactly (error below {EXACT:g}), or by the nearest of {CODEBOOK} values "
        f"(at least {RECALLED:.0%} right)",
        columns,
        tuple(
            (
                *(K, V, min(K, V)),
                _largest(rows, K, V, "orthogonal", "delta rule", True),
                _largest(rows, K, V, "random", "best state", True),
                _largest(rows, K, V, "random", "best state", False),
                _largest(rows, K, V, "random", "delta rule", False),
            )
            for K, V in sizes
        ),
    )


def _worst_at_K(rows: list[Row]) -> float:
    at_K = [row for row in rows if row.pairs == row.K and (row.keys, row.stored_by) == ("orthogonal", "delta rule")]
    return max(row.largest_relative_error for row in at_K)


def _panel(rows: list[Row], K: int, V: int) -> Panel:
    lines = []
    for kind, stored in (("orthogonal", "delta rule"), ("random", "best state"), ("random", "delta rule")):
        points = [
            (float(row.pairs), max(row.largest_relative_error, 1e-17))
            for row in rows
            if (row.K, row.V, row.keys, row.stored_by) == (K, V, kind, stored)
        ]
        x, y = tuple(x for x, _ in points), tuple(y for _, y in points)
        lines.append(Line(f"{kind} keys, {stored}", x, y))
    marks = ((float(min(K, V)), "min(K, V)"), (float(K), "K")) if min(K, V) != K else ((float(K), "K = min(K, V)"),)
    return Panel(
        f"K = {K}, V = {V}", "pairs stored", "largest relative error of a read", tuple(lines), False, True, marks
    )
