"""The best ratio: found where it is, with an interval that holds it, called flat where it is flat."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.studies.optimum import fit_optimum
from hybridzoo.studies.resampling import draw_means, percentiles
from hybridzoo.studies.stats import difference

RATIOS = [0, 1 / 8, 1 / 4, 1 / 2, 1]


def curve(shape, seeds, noise, draw):
    return [[shape(ratio) + draw.gauss(0, noise) for _ in range(seeds)] for ratio in RATIOS]


@given(st.floats(0.26, 0.6), st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_top_of_a_parabola_is_found_exactly(top, maximise):
    sign = 1 if maximise else -1
    found = fit_optimum(RATIOS, [[-sign * (r - top) ** 2] * 3 for r in RATIOS], maximise, draws=200)
    assert found.ratio == pytest.approx(top, abs=1e-9)
    nearest = max(RATIOS, key=lambda r: -((r - top) ** 2))
    assert (found.low, found.high) == pytest.approx(sorted([top, nearest]), abs=1e-9)
    assert (found.verdict, found.measured) == ("inside", nearest)


@pytest.mark.parametrize(("seeds", "noise"), [(3, 0.02), (3, 0.1), (5, 0.02)])
def test_the_interval_covers_the_true_optimum(seeds, noise):
    draw, covered = random.Random(11), 0
    for _ in range(80):
        found = fit_optimum(RATIOS, curve(lambda r: -((r - 0.4) ** 2), seeds, noise, draw), True, draws=800)
        assert found.low <= found.ratio <= found.high
        covered += found.low <= 0.4 <= found.high
    assert covered >= 70  # 95 % of 80 are 76, and the standard deviation of the count is 2


@pytest.mark.parametrize("seeds", [3, 5])
def test_flat_is_called_flat(seeds):
    draw = random.Random(13)
    curves = [curve(lambda r: 1.0, seeds, 0.1, draw) for _ in range(80)]
    said = Counter(fit_optimum(RATIOS, one, True, draws=800).verdict for one in curves)
    assert said["flat"] >= 72


@pytest.mark.parametrize("maximise", [True, False])
def test_a_curve_that_rises_to_its_end_has_its_optimum_at_the_edge(maximise):
    sign = 1 if maximise else -1
    draw = random.Random(17)
    found = fit_optimum(RATIOS, curve(lambda r: sign * 5 * r, 3, 0.05, draw), maximise)
    assert (found.verdict, found.measured, found.high) == ("edge", 1.0, 1.0)
    assert found.low > 0.5


def test_a_cliff_and_a_plateau_leave_a_wide_interval_that_excludes_the_foot():
    draw = random.Random(19)
    found = fit_optimum(RATIOS, curve(lambda r: 0.5 if r == 0 else 0.99, 5, 0.005, draw), True)
    assert found.low > 0
    assert found.high - found.low > 0.4


def test_one_seed_or_two_ratios_give_no_interval_and_no_verdict():
    one = fit_optimum(RATIOS, [[r] for r in RATIOS], True)
    assert (one.verdict, one.why) == ("unknown", "one seed bounds nothing")
    assert fit_optimum(RATIOS, [[r, r] for r in RATIOS], True).verdict == "unknown"
    assert fit_optimum([0, 1], [[0.0] * 3, [1.0] * 3], True).why == "fewer than three ratios"
    with pytest.raises(ValueError, match="2 ratios and 1 rows"):
        fit_optimum([0, 1], [[0.0]], True)


@given(st.permutations(range(len(RATIOS))))
@settings(deadline=None, max_examples=20)
def test_the_order_of_stacks_changes_nothing(order):
    scores = curve(lambda r: -((r - 0.4) ** 2), 3, 0.05, random.Random(23))
    moved = fit_optimum([RATIOS[i] for i in order], [scores[i] for i in order], True, draws=300)
    assert moved == fit_optimum(RATIOS, scores, True, draws=300)


def test_no_ratio_is_fitted_where_several_stacks_have_one():
    scores = curve(lambda r: -((r - 0.4) ** 2), 3, 0.05, random.Random(29))
    found = fit_optimum([*RATIOS, RATIOS[2]], [*scores, [value + 1 for value in scores[2]]], True)
    assert (found.verdict, found.why) == ("unknown", "several stacks have one ratio")
    assert found.measured == RATIOS[2]


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_redrawn_differences_are_student_s(seeds):
    draw = random.Random(31)
    a, b = [draw.gauss(0, 1) for _ in range(seeds)], [draw.gauss(1, 2) for _ in range(seeds)]
    means = draw_means([a, b], draws=200_000)
    low, high = percentiles(means[:, 0] - means[:, 1], 0.8)
    exact = difference(a, b, 0.8)
    half = (exact.high - exact.low) / 2
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.03 * half)


def test_redrawn_means_repeat_from_a_seed_and_need_two_seeds_of_every_stack():
    scores = [[0.1, 0.2, 0.4], [0.3, 0.1, 0.2]]
    assert torch.equal(draw_means(scores, 50), draw_means(scores, 50))
    assert not torch.equal(draw_means(scores, 50), draw_means(scores, 50, seed=1))
    for bad in ([], [[0.1]], [[0.1, 0.2], [0.1]]):
        with pytest.raises(ValueError, match="two seeds"):
            draw_means(bad)
    assert math.isfinite(float(draw_means([[0.5, 0.5]], 10).sum()))
