"""Statistics against published values and against what defines them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.studies import stats

finite = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("p", "df", "expected"),  # from printed tables of Student's t
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.30265273),
        (0.975, 4, 2.77644511),
        (0.975, 9, 2.26215716),
        (0.975, 30, 2.04227246),
        (0.95, 5, 2.01504837),
        (0.995, 3, 5.84090931),
        (0.5, 7, 0.0),
        (0.025, 2, -4.30265273),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(p, df, expected):
    assert stats.t_quantile(p, df) == pytest.approx(expected, abs=1e-7)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_the_distribution_of_t_is_symmetric_and_within_bounds(t, df):
    assert 0 <= stats.t_cdf(t, df) <= 1
    assert stats.t_cdf(t, df) + stats.t_cdf(-t, df) == pytest.approx(1, abs=1e-12)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    draw = random.Random(1)
    covered = 0
    for _ in range(1000):
        summary = stats.summarise([draw.gauss(3, 2) for _ in range(3)], confidence=0.9)
        covered += summary.low <= 3 <= summary.high
    assert 870 <= covered <= 930


def test_one_value_has_a_mean_and_no_interval():
    summary = stats.summarise([0.5])
    assert summary.mean == 0.5
    assert math.isnan(summary.low)
    assert math.isnan(summary.high)


@given(st.lists(finite, min_size=2, max_size=8))
def test_the_mean_lies_in_its_interval_and_between_the_extremes(values):
    summary = stats.summarise(values)
    assert summary.low <= summary.mean <= summary.high
    assert summary.least - 1e-9 <= summary.mean <= summary.most + 1e-9


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="values"):
        stats.summarise(values)


def test_the_bootstrap_repeats_and_brackets_the_mean():
    values = [0.1, 0.4, 0.35, 0.2, 0.5, 0.3]
    low, high = stats.bootstrap_interval(values)
    assert (low, high) == stats.bootstrap_interval(values) == stats.bootstrap_interval(values[::-1])
    assert min(values) <= low < sum(values) / len(values) < high <= max(values)


@pytest.mark.parametrize(("skewed", "least"), [(False, 0.87), (True, 0.83)])
def test_the_bootstrap_covers_the_truth_almost_as_often_as_it_says(skewed, least):
    draw, covered = random.Random(2), 0
    for _ in range(200):
        values = [draw.expovariate(1) if skewed else draw.gauss(1, 2) for _ in range(12)]
        low, high = stats.bootstrap_interval(values, resamples=500)
        covered += low <= 1 <= high
    assert covered >= least * 200


def test_many_values_are_bootstrapped_and_few_are_student_s():
    draw = random.Random(4)
    values = [draw.gauss(0, 1) for _ in range(stats.BOOTSTRAP_FROM)]
    many, few = stats.summarise(values), stats.summarise(values[:-1])
    assert (many.low, many.high) == stats.bootstrap_interval(values)
    assert (few.low, few.high) != stats.bootstrap_interval(values[:-1])
    assert few.mean - few.low == pytest.approx(few.high - few.mean)


def test_pairing_by_seed_sees_a_difference_that_seeds_would_hide():
    a, b = [0.50, 0.70, 0.90], [0.48, 0.69, 0.88]
    paired = stats.difference(a, b)
    assert paired.low > 0
    assert stats.summarise(a).low < stats.summarise(b).high
    with pytest.raises(ValueError, match="paired"):
        stats.difference(a, b[:2])


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=12), st.booleans())
def test_the_frontier_is_exactly_the_points_that_none_beats(points, maximise):
    costs, values = [c for c, _ in points], [v for _, v in points]
    frontier = stats.pareto_frontier(costs, values, maximise)
    sign = 1 if maximise else -1

    def beats(i: int, j: int) -> bool:
        no_worse = costs[i] <= costs[j] and sign * values[i] >= sign * values[j]
        return no_worse and (costs[i] < costs[j] or sign * values[i] > sign * values[j])

    best = {(costs[j], values[j]) for j in range(len(points)) if not any(beats(i, j) for i in range(len(points)))}
    assert {(costs[i], values[i]) for i in frontier} == best
    assert len(frontier) == len(best)
    assert [costs[i] for i in frontier] == sorted(costs[i] for i in frontier)


def test_a_curve_still_rising_at_its_end_is_noticed():
    assert stats.late_gain([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.9], maximise=True) == pytest.approx(0.5)
    assert stats.late_gain([1, 2, 3, 4, 5], [3.0, 2.0, 1.5, 1.5, 1.5], maximise=False) == 0.0
    assert stats.late_gain([7], [0.5], maximise=True) == 0.0
    assert stats.late_gain([], [], maximise=True) == 0.0
    assert stats.late_gain([10, 20], [0.0, 0.5], maximise=True) == 0.5


def test_one_evaluation_that_stands_out_is_not_learning():
    steps = list(range(1, 16))
    assert stats.late_gain(steps, [*[0.5] * 14, 0.53], maximise=True) == pytest.approx(0.01)
    rising = [step / 15 for step in steps]
    assert stats.late_gain(steps, rising, maximise=True) == pytest.approx(3 / 15)  # what a fifth of the training gains


def test_what_is_late_goes_by_steps_and_not_by_points():
    """The last point may come soon after the one before it, at a rate near zero."""
    assert stats.late_windows([50, 100, 150, 200, 250, 300, 320]) == ([3, 4], [5, 6])
    assert stats.late_windows([100, 200, 300]) == ([1], [2])
    assert stats.late_windows([10, 100]) == ([0], [1])
    assert stats.late_windows([40]) == ([], [0])
