"""Small-sample statistics over seeds: means, intervals, and whether two stacks can be told apart.

May import nothing of hybridzoo, and needs no scipy. Sources: Student's t through the regularised incomplete beta
function (Numerical Recipes, 6.4, modified Lentz); BCa bootstrap (Efron, JASA 1987); Pareto dominance. comparisons.py,
optimum.py and resampling.py hold what concerns several stacks at once.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BOOTSTRAP_FROM = 10  # values: from so many on they say more of their scatter than an assumed shape does


@dataclass(frozen=True)
class Summary:
    """The values of one number over seeds: their mean and the interval it is known to. `low` is NaN for one value."""

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Return mean and interval; with one value the interval is NaN, since nothing is known of the spread.

    Below `BOOTSTRAP_FROM` values the interval is Student's t, which holds at any number of them where they scatter
    normally; from there on `bootstrap_interval`, which asks for no shape but needs the values to show it: of five
    normal ones its 95 % interval holds the mean 85 times in 100 (simulated), of two or three it is hardly more than
    their range.

    Raises: `ValueError` without values, or for a value that is not finite.
    """
    if not values:
        raise ValueError("no values to summarise")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite, got {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Summary(tuple(values), mean, math.nan, math.nan)
    if len(values) >= BOOTSTRAP_FROM:
        return Summary(tuple(values), mean, *bootstrap_interval(values, confidence))
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Summary(tuple(values), mean, mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 4_000, seed: int = 0
) -> tuple[float, float]:
    """Return the bias-corrected, accelerated (BCa) bootstrap interval of the mean; the same for every order of values.

    Raises: `ValueError` without values.
    """
    if not values:
        raise ValueError("no values to resample")
    return _bca(tuple(sorted(values)), confidence, resamples, seed)


@functools.lru_cache(maxsize=4096)
def _bca(values: tuple[float, ...], confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    n, mean = len(values), statistics.fmean(values)
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(values, k=n)) for _ in range(resamples))
    below = (bisect.bisect_left(means, mean) + bisect.bisect_right(means, mean)) / 2 / resamples
    normal = statistics.NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    # Of the mean, the jackknife's acceleration is the skewness of the values.
    squares, cubes = (sum((value - mean) ** power for value in values) for power in (2, 3))
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        moved = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + moved / (1 - acceleration * moved))
        ends.append(means[min(resamples - 1, int(level * resamples))])
    return min(ends[0], mean), max(ends[1], mean)


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Summary:
    """Summarise `a - b`, paired: value i of each comes from the same seed, so from the same data.

    Raises: `ValueError` where the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must be as many, got {len(a)} and {len(b)}")
    return summarise([x - y for x, y in zip(a, b, strict=True)], confidence)


@functools.lru_cache(maxsize=256)
def t_quantile(p: float, df: int) -> float:
    """Return the `p` quantile of Student's t with `df` degrees of freedom, to about 1e-10."""
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"need 0 < p < 1 and df >= 1, got p={p}, df={df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, df: int) -> float:
    """Return the probability that Student's t with `df` degrees of freedom is at most `t`."""
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):  # where the continued fraction converges fast
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d, tiny)
            c = _nonzero(1 + term / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def _nonzero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def pareto_frontier(costs: Sequence[float], values: Sequence[float], maximise: bool) -> list[int]:
    """Return the indices of the points that no other beats on cost (lower) and value together, cheapest first.

    Of points equal in both, the first stays.
    """
    sign = 1 if maximise else -1
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -sign * values[i], i))
    best, frontier = -math.inf, []
    for i in order:
        if sign * values[i] > best:
            best = sign * values[i]
            frontier.append(i)
    return frontier


def late_gain(steps: Sequence[int], values: Sequence[float], maximise: bool, share: float = 0.2) -> float:
    """Return how much better the mean of the values in the last `share` of the steps is than that in as many before; 0
    if not.

    What an undertrained stack shows, so that its final score is not read as its ceiling. Means of several points, where
    there are several, so that one lucky evaluation is not read as learning.
    """
    before, later = late_windows(steps, share)
    if not before:
        return 0.0
    gain = statistics.fmean(values[i] for i in later) - statistics.fmean(values[i] for i in before)
    return max(0.0, gain if maximise else -gain)


def late_windows(steps: Sequence[int], share: float = 0.2) -> tuple[list[int], list[int]]:
    """Return which of the points after so many steps `late_gain` compares: those before, and those in the last `share`
    of the steps. Where no point lies in as many steps before, the one that is nearest; none where there is none."""
    if not steps:
        return [], []
    first, second = ((1 - part * share) * steps[-1] for part in (2, 1))
    later = [i for i, step in enumerate(steps) if step > second]
    before = [i for i, step in enumerate(steps) if first < step <= second]
    return before or [i - 1 for i in later[:1] if i], later


def spread(values: Sequence[float]) -> float:
    """Return the largest distance between two of `values`: 0 for one."""
    return max((abs(a - b) for a, b in itertools.combinations(values, 2)), default=0.0)
