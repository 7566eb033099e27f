"""Pictures show what the findings hold, within their edges, at a scale where it can be seen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hybridzoo.studies import gather
from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.style import looks, styled


@pytest.fixture
def drawn(make_results):
    """Draw made-up results and return the figures, laid out as they are saved."""

    def draw(change=lambda plan: plan, **words):
        plan, results = make_results(**words)
        with styled():
            figures = draw_all(gather(change(plan), results))
            for figure in figures.values():
                figure.canvas.draw()
        return figures

    return draw


def test_a_legend_stays_within_its_picture(drawn):
    labels = ["attention", "3/4 attention, window=256", "1/2 attention", "carve[erase=token,predict=decayed]", "x", "y"]
    rows_ = [(label, "carve", place / 5, 0.5, 2.4) for place, label in enumerate(labels)]
    for figure in drawn(rows=rows_, change=lambda plan: replace(plan, shown={"recall": plan.shown["recall"]})).values():
        for legend in figure.legends:
            assert legend.get_window_extent().x1 <= figure.bbox.width


def test_guessing_is_named_beside_the_marks_and_within_the_picture(drawn):
    for figure in drawn().values():
        for axes in figure.axes:
            for text in (text for text in axes.texts if text.get_text() == "guessing"):
                assert text.get_window_extent().x0 >= axes.bbox.x1
                assert text.get_window_extent().x1 <= figure.bbox.width


def test_low_percentages_fill_their_axis_and_high_ones_keep_the_whole(drawn):
    low = [(f"s{place}", "carve", place / 5, 0.05 + place / 50, 2.4) for place in range(6)]
    for rows_, (least, most) in ((low, (0.15, 0.25)), (None, (1.0, 1.1))):
        figures = drawn(rows=rows_) if rows_ else drawn()
        for stem in ("ratio", "frontier", "learning-recall"):
            bottom, top = figures[stem].axes[0].get_ylim()
            assert bottom <= 0
            assert least <= top <= most


def test_ticks_of_parameters_are_labelled_with_what_they_are(drawn):
    def narrow(plan):
        stacks = [replace(stack, parameters={"recall": 19_500, "text": 19_900}) for stack in plan.stacks]
        hold = {"params": "largest", "tolerance": 0.02}
        return replace(plan, stacks=tuple(stacks), target=19_500, study={**plan.study, "hold": hold})

    (axes,) = drawn(change=narrow)["parameters"].axes
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(label.get_text().replace(",", "")) == place


def test_every_stack_has_a_look_of_its_own(make_results):
    many = [(f"s{i}", f"family{i % 3}", (i // 3) / 8, 0.5, 2.4) for i in range(24)]
    for rows_ in (many[:17], [(f"w{i}", "attention", 1.0, 0.9, 2.5) for i in range(9)]):
        plan, _ = make_results(rows=rows_)
        for a, b in itertools.combinations(looks(plan.stacks).values(), 2):
            assert a != b
