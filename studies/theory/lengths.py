"""Quality against the content chunk after training: small models at every L, on keys that are overwritten.

What staleness alone does not say: a model may learn to do without what a fresh gate would tell it, or to use a stale
one. The task is that of `separation`, in rounds: what an earlier round wrote is never asked for again, so there is
something for an erase gate to clear, and enough tokens for long chunks. May import training.

Shapes: L content chunk (0: no content gate), S seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from hybridzoo.studies.optimum import Optimum, fit_optimum
from hybridzoo.studies.stats import Summary, difference, summarise
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.overwrite import OneMixer, Overwrite
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, Line, Panel, Settings, Statement
from hybridzoo.studies.theory.trained import Form, captures, content_up, train_one
from hybridzoo.training import evaluating

# Without decay, as in `separation`: the erase gate is then all that forgets, so that what it does can be seen.
MIXER = "carve[decay=none]"
OFF = 0
OFF_AT = 0.5  # where a picture's axis of lengths has no content gate
HEAD = 16  # what the fused kernels take
BATCH = 16
# As carve starts, and with a gate that is at work from the first step whether it helps or not: the first may be flat
# because nothing is read.
STARTS = {"shut": Form(head=HEAD), "open": Form(head=HEAD, erase_bias=-2.0, readout=2.0)}


class Model(NamedTuple):
    """One trained model; `without_readout` is its score with `U2` set to zero after training."""

    gate_starts: str
    L: int
    seed: int
    parameters: int
    accuracy: float
    overwritten: float
    intact: float
    without_readout: float | None
    loss: float
    device: str


class Point(NamedTuple):
    """One length: its mean score, and the paired difference to the shortest, in shares of the score there."""

    gate_starts: str
    L: int
    seeds: int
    accuracy: float
    low_95: float | None
    high_95: float | None
    against_shortest: float
    low: float | None
    high: float | None
    without_readout: float | None


class Best(NamedTuple):
    """The fitted best length of a curve over log2 L: `verdict` as in hybridzoo.studies.optimum."""

    gate_starts: str
    verdict: str
    best_L: float
    low: float
    high: float
    best_measured: float
    why: str


@dataclass(frozen=True)
class Curves:
    """What the trainings found: tables, statements and a picture for the probe `chunk`."""

    tables: dict[str, Table]
    statements: tuple[Statement, ...]
    panel: Panel
    finding: str


def task_of(settings: Settings) -> Overwrite:
    """Return the task: rounds of 20 tokens, as many as let the longest chunk be renewed twice.

    A round's 8 pairs fit into a head's 16 key channels; the 32 keys of all rounds do not.
    """
    if settings.size == "small":
        return Overwrite(pairs=4, overwrites=2, queries=4, keys=8, values=4, rounds=4, examples=16)
    return Overwrite(pairs=8, overwrites=4, queries=8, keys=32, values=8, rounds=settings.pick(4, 8, 14), examples=128)


def lengths_of(settings: Settings) -> tuple[int, ...]:
    """Return the chunks that are trained: one token first, which is what the others are held against."""
    return settings.pick((1, 16), (1, 8, 16, 32, 64), (1, 8, 16, 32, 64, 128))


def steps_of(settings: Settings) -> int:
    """Return how many steps each model is trained for."""
    return settings.pick(4, 60, 100)


def form_at(start: str, L: int, task: Overwrite) -> Form:
    """Return how a model with a chunk of `L` is made for `task`.

    `OFF` is a chunk that no sequence fills, so that nothing is ever read: without a content gate, and yet of the same
    size and from the same weights as the others.
    """
    chunk = L or (task.length // 16 + 1) * 16
    # A tile a token is the slowest way to go token by token.
    return replace(STARTS[start], chunk=chunk, backend="reference" if L == 1 else "auto")


def train_curves(settings: Settings) -> list[Model]:
    """Train a model for each start, length and seed, all on the same batches of a seed.

    On a GPU what can be replayed there as a graph. The other lengths would wait for its host at every operation, longer
    than a CPU takes for them.
    """
    task, device = task_of(settings), settings.resolve_device()
    rows = []
    for start in STARTS:
        for L in (OFF, *lengths_of(settings)):
            form = form_at(start, L, task)
            where = device.type if captures(form, device) else "cpu"
            for seed in range(settings.seed, settings.seed + settings.pick(1, 5, 6)):
                one = train_one(MIXER, task, steps_of(settings), seed, "", form, BATCH, where)
                silent = without_readout(one.model) if L else None
                scores = (one.scores["accuracy"], one.scores["overwritten"], one.scores["intact"], silent)
                rows.append(Model(start, L, seed, one.parameters, *scores, one.loss, where))
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch works in one thread: models this small wait for a second one longer than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_readout(model: OneMixer) -> float:
    """Return a model's score with its content readout switched off."""
    silent = deepcopy(model)
    up = content_up(silent)
    assert up is not None
    with evaluating(silent):
        up.zero_()
        return silent.task.evaluate(silent, torch.device("cpu"))["accuracy"]


def scores_of(rows: Sequence[Model], start: str) -> dict[int, list[float]]:
    """Return the scores of a start's lengths, `OFF` among them, each in the order of the seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.gate_starts == start:
            found.setdefault(row.L, []).append(row.accuracy)
    return found


def behind(scores: Mapping[int, Sequence[float]], L: int, confidence: float = 0.95, base: int | None = None) -> Summary:
    """Return the paired difference of `L` to `base`, the shortest length unless given, in shares of the mean there."""
    other = scores[min(L for L in scores if L) if base is None else base]
    level = statistics.fmean(other)
    return difference([x / level for x in scores[L]], [x / level for x in other], confidence)


def fit_length(scores: Mapping[int, Sequence[float]]) -> Optimum:
    """Fit the best length of one curve, over log2 L and without `OFF`; ends and optimum are in log2 L too."""
    lengths = [L for L in scores if L]
    return fit_optimum([math.log2(L) for L in lengths], [scores[L] for L in lengths], maximise=True)


def flat_statement(
    scores: Mapping[int, Sequence[float]], start: str, first: int, last: int, margin: float, comparisons: int
) -> Statement:
    """Judge whether lengths from `first` to `last` score as the shortest does, within `margin` of it.

    The intervals of all `comparisons` hold together with 95 % (Bonferroni). Holds where all lie within the margin, does
    not where one lies wholly beyond it.
    """
    shortest = min(L for L in scores if L)
    text = (
        f"Trained with the gate {start} at the start, chunks of {first}{f' to {last}' if last > first else ''} score "
        f"as those of {shortest} do, within {100 * margin:.2g} %."
    )
    gaps = {L: behind(scores, L, 1 - 0.05 / comparisons) for L in scores if first <= L <= last and shortest < L}
    off = 100 * behind(scores, OFF).mean
    if any(gap.n < 2 for gap in gaps.values()):
        return Statement(text, OPEN, "one seed bounds nothing")
    said = "; ".join(
        f"L = {L}: {100 * gap.mean:+.2f} % ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})" for L, gap in gaps.items()
    )
    said += (
        f"; 95 % for all {comparisons} together, {len(scores[shortest])} seeds; no content gate at all: {off:+.2f} %"
    )
    if any(gap.low > margin or gap.high < -margin for gap in gaps.values()):
        return Statement(text, FAILS, said)
    within = all(-margin <= gap.low and gap.high <= margin for gap in gaps.values())
    return Statement(text, HOLDS if within else OPEN, said)


def best_statement(found: Mapping[str, Optimum], by_start: Mapping[str, Mapping[int, Sequence[float]]]) -> Statement:
    """Judge whether one length is best after training: between lengths on both sides of it, and better than no gate.

    A best length that no content gate at all scores as well as is one of a gate that does nothing.
    """
    best, said = True, []
    for start, one in found.items():
        words = f"gate {start} at the start: {best_in_words(one)}"
        best = best and one.verdict == "inside"
        if one.verdict in ("inside", "edge"):
            gap = behind(by_start[start], round(2**one.measured), base=OFF)
            words += f"; L = {2**one.measured:.0f} against no content gate at all: {100 * gap.mean:+.2f} % "
            words += f"({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"
            best = best and gap.low > 0
        said.append(words)
    return Statement("One chunk length is best for quality after training.", HOLDS if best else OPEN, "; ".join(said))


def best_in_words(one: Optimum) -> str:
    """Return a fitted best length as a sentence has it, with its interval where the seeds leave one."""
    if one.verdict in ("flat", "unknown"):
        return f"{'flat: ' if one.verdict == 'flat' else ''}cannot be told ({_why(one)})"
    span = f"{2**one.low:.0f} to {2**one.high:.0f}"
    if one.verdict == "edge":
        return f"L = {2**one.measured:.0f} ({span}), an end of what was tried: beyond it nothing was measured"
    return f"L* = {2**one.ratio:.0f} ({span})"


def _why(one: Optimum) -> str:
    return one.why.replace("ratios", "lengths").replace("ratio", "length")


def curves(settings: Settings, first: int, last: int, margin: float) -> Curves:
    """Train the models and say what their scores show of lengths from `first` to `last`, to within `margin`."""
    with one_thread():
        rows = train_curves(settings)
    by_start = {start: scores_of(rows, start) for start in STARTS}
    claimed = [L for L in lengths_of(settings) if first <= L <= last]
    comparisons = len(claimed) * len(STARTS)
    found = {start: fit_length(scores) for start, scores in by_start.items()}
    points = [
        _point(rows, start, L, scores[L], behind(scores, L, 1 - 0.05 / comparisons))
        for start, scores in by_start.items()
        for L in scores
    ]
    bests = [
        Best(start, one.verdict, 2**one.ratio, 2**one.low, 2**one.high, 2**one.measured, _why(one))
        for start, one in found.items()
    ]
    task, seeds = task_of(settings), len(next(iter(by_start["shut"].values())))
    trained = f"{steps_of(settings)} steps, {task.length} tokens, {task.pairs} pairs a round"
    return Curves(
        tables={
            "trained": Table(f"Models trained at each length, {trained}", Model._fields, tuple(rows)),
            "quality": Table("Quality after training against the chunk", Point._fields, tuple(points)),
            "best": Table("The best chunk after training, fitted over log2 L", Best._fields, tuple(bests)),
        },
        statements=(
            *(flat_statement(by_start[start], start, claimed[0], claimed[-1], margin, comparisons) for start in STARTS),
            best_statement(found, by_start),
        ),
        panel=_panel(points, margin),
        finding=(
            f"Best after training, {seeds} {'seed' if seeds == 1 else 'seeds'} a length: "
            + "; ".join(f"with the gate {start} at the start, {best_in_words(one)}" for start, one in found.items())
            + f". {_read(rows)}"
        ),
    )


def _read(rows: Sequence[Model]) -> str:
    """Say how much the trained models lose without their readout: what is not used cannot grow stale."""
    said = []
    for start in STARTS:
        lost = [row.accuracy - row.without_readout for row in rows
                if row.gate_starts == start and row.without_readout is not None]  # fmt: skip
        said.append(f"{100 * statistics.fmean(lost):+.1f} points where the gate started {start}")
    return f"Switching the readout off after training costs {' and '.join(said)}."


def _point(rows: Sequence[Model], start: str, L: int, scores: Sequence[float], gap: Summary) -> Point:
    level = summarise(scores)
    silent = [row.without_readout for row in rows
              if (row.gate_starts, row.L) == (start, L) and row.without_readout is not None]  # fmt: skip
    low, high = (None, None) if level.n < 2 else (level.low, level.high)
    gap_low, gap_high = (None, None) if gap.n < 2 else (gap.low, gap.high)
    without = statistics.fmean(silent) if silent else None
    return Point(start, L, level.n, level.mean, low, high, gap.mean, gap_low, gap_high, without)


def _panel(points: Sequence[Point], margin: float) -> Panel:
    """Draw the paired differences: levels differ from seed to seed by far more than lengths do."""

    def line(kind: Literal["line", "points"], some: Sequence[Point], start: str) -> Line:
        x = tuple((point.L or OFF_AT) * 1.08 ** list(STARTS).index(start) for point in some)  # side by side
        ends = [(point.low, point.high) for point in some]
        spans = tuple((100 * low, 100 * high) for low, high in ends if low is not None and high is not None)
        y = tuple(100 * point.against_shortest for point in some)
        return Line(f"trained, gate {start} at the start", x, y, kind, spans)

    lines = []
    for start in STARTS:
        mine = [point for point in points if point.gate_starts == start]
        lines += [line("line", [p for p in mine if p.L], start), line("points", [p for p in mine if not p.L], start)]
    whole = (OFF_AT, float(max(point.L for point in points)))
    lines += [
        Line(f"within {100 * margin:.2g} %", whole, (edge, edge), "dashes") for edge in (-100 * margin, 100 * margin)
    ]
    return Panel(
        *("After training", "content chunk L", "score against the shortest, %", tuple(lines)),
        log_x=True,
        marks=((OFF_AT, "no content gate"),),
    )
