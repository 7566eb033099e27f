"""The best ratio of a curve, fitted, with the interval that its seeds allow; or that it cannot be told.

May import nothing above studies. sentences.py says it in words, figures.py draws it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hybridzoo.studies.comparisons import SEEDS, with_the_best
from hybridzoo.studies.resampling import DRAWS, draw_means, percentiles

Verdict: TypeAlias = Literal["inside", "edge", "flat", "unknown"]


@dataclass(frozen=True)
class Optimum:
    """Where a curve over ratios is best.

    `inside`: at `ratio`, between measured ones, within `[low, high]`. `edge`: the best measured ratio is the first or
    last of the curve, so the curve may go on to rise beyond; `[low, high]` says how far inwards it may lie. `flat`: the
    seeds tell no ratio from the best, or the interval is the whole range, and `ratio` should not be shown. `unknown`:
    fewer than three seeds or than three ratios, or several stacks at one of them; `why` says which.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    measured: float  # the measured ratio of the best mean
    why: str = ""


def fit_optimum(
    ratios: Sequence[float],
    scores: Sequence[Sequence[float]],
    maximise: bool,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Optimum:
    """Fit the best ratio of a curve; `scores[i][j]` is of `ratios[i]` and of seed j. Order does not matter.

    The fit is the top of the parabola through the best mean and its two neighbours, so that a cliff far off does not
    move it; at either end of the curve it is the end itself. The interval is of curves redrawn over the seeds
    (`draw_means`), percentile method, and wide enough for both their fitted and their best measured ratios: a parabola
    leans away from a cliff, and what a curve does between measured ratios is not known.

    Raises: `ValueError` where ratios and scores are not as many.
    """
    if len(ratios) != len(scores):
        raise ValueError(f"need scores of every ratio, got {len(ratios)} ratios and {len(scores)} rows of scores")
    if not ratios:
        raise ValueError("no ratios to fit")
    rows = sorted(zip(ratios, scores, strict=True), key=lambda row: row[0])
    places, curve = [ratio for ratio, _ in rows], [values for _, values in rows]
    sign = 1.0 if maximise else -1.0
    means = [sign * statistics.fmean(values) for values in curve]
    best = max(range(len(places)), key=lambda i: means[i])
    measured = places[best]
    if len(set(places)) < len(places):
        # They differ in something else as well, such as where the layers stand: neither their mean nor the best of
        # them is what a ratio scores.
        why = "several stacks have one ratio"
        return Optimum("unknown", measured, places[0], places[-1], measured, why)
    if len(places) < 3:
        return Optimum("unknown", measured, places[0], places[-1], measured, "fewer than three ratios")
    grid = torch.tensor(places, dtype=torch.float64)
    fitted = float(_tops(grid, torch.tensor([means], dtype=torch.float64))[0])
    seeds = len(curve[0])
    if seeds < SEEDS:
        # Two residuals are mirror images: redrawn curves would move along one line only, and claim what is not known.
        why = "one seed bounds nothing" if seeds == 1 else "two seeds are too few to bound it"
        return Optimum("unknown", fitted, places[0], places[-1], measured, why)
    redrawn = sign * draw_means(curve, draws, seed)
    ends = [percentiles(one, confidence) for one in (_tops(grid, redrawn), grid[redrawn.argmax(1)])]
    low, high = min(fitted, *(low for low, _ in ends)), max(fitted, *(high for _, high in ends))
    compared = with_the_best(curve, maximise, confidence)
    if all(one.tied for one in compared.rest):
        why = "no ratio is told from the best"
        return Optimum("flat", fitted, places[0], places[-1], measured, why)
    if low <= places[0] and high >= places[-1]:
        return Optimum("flat", fitted, low, high, measured, "the interval of the best ratio is the whole range")
    return Optimum("edge" if best in (0, len(places) - 1) else "inside", fitted, low, high, measured)


def _tops(grid: Tensor, means: Tensor) -> Tensor:
    """Where each row of `means [R, K]` over ratios `grid [K]`, ascending, is highest by its local parabola: `[R]`."""
    best = means.argmax(1)
    inner = best.clamp(1, len(grid) - 2)
    rows = torch.arange(len(means))
    left, middle, right = (means[rows, inner + step] for step in (-1, 0, 1))
    a, b, c = (grid[inner + step] for step in (-1, 0, 1))
    rise, fall = (middle - left) / (b - a), (middle - right) / (c - b)
    # The slope of the parabola falls linearly from `rise` between a and b to `-fall` between b and c: where it is 0.
    turn = rise + fall
    top = (a + b) / 2 + (c - a) / 2 * torch.where(turn > 0, rise / turn, 0.5)
    return torch.where(best == inner, top, grid[best])
