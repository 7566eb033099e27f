"""Pictures show what the findings hold, within their edges, at a scale where it can be seen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from hybridzoo.studies import gather
from hybridzoo.studies.canvas import spread
from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.style import looks, styled

RATIOS = (0.0, 1 / 8, 1 / 4, 1 / 2)
# Five mixers at every ratio, and attention alone: what a study of hybrids compares.
MANY = [
    *(
        (f"{name}, {ratio:g}", name, ratio, 0.3 + 0.1 * i + 0.2 * ratio, 2.4)
        for i, name in enumerate("abcde")
        for ratio in RATIOS
    ),
    ("all attention", "attention", 1.0, 0.9, 2.5),
]


@pytest.fixture
def drawn(make_results):
    """Draw made-up results and return the figures, those `of` these stems (or all) laid out as they are saved."""

    def draw(*of, change=lambda plan: plan, **words):
        plan, results = make_results(**words)
        with styled():
            figures = draw_all(gather(change(plan), results))
            for figure in [figures[stem] for stem in of or figures]:
                figure.draw_without_rendering()  # twice, as matplotlib does to save: the first lays out by guesses
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
        return replace(plan, stacks=tuple(stacks), targets={"params": 19_500}, study={**plan.study, "hold": hold})

    (axes,) = drawn("parameters", change=narrow)["parameters"].axes
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(label.get_text().replace(",", "")) == place


def test_every_stack_has_a_look_of_its_own(make_results):
    many = [(f"s{i}", f"family{i % 3}", (i // 3) / 8, 0.5, 2.4) for i in range(24)]
    for rows_ in (many[:17], [(f"w{i}", "attention", 1.0, 0.9, 2.5) for i in range(9)]):
        plan, _ = make_results(rows=rows_)
        for a, b in itertools.combinations(looks(plan.stacks).values(), 2):
            assert a != b


def test_gates_are_drawn_over_the_layers_that_the_tables_count(make_results):
    plan, results = make_results()
    values = {"mean": 0.5, "q05": 0.5, "q25": 0.5, "median": 0.5, "q75": 0.5, "q95": 0.5}
    rows = [{"layer": layer, "mixer": "carve", "gate": "write", **values} for layer in range(4)]
    with styled():
        figure = draw_all(gather(plan, [{**result, "gates": rows} for result in results]))["gates-recall"]
        figure.canvas.draw()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert dict(zip(axes.get_xticks(), labels, strict=True)) == {layer: str(layer) for layer in range(4)}


def test_a_label_however_long_stays_within_every_picture(drawn):
    said = "tokens of a sequence that is longer than most which are said backwards and forwards " * 2

    def longer(plan):
        shown = {task: replace(one, label=said, level_axis=one.level_axis and said) for task, one in plan.shown.items()}
        return replace(plan, shown=shown)

    for rows_ in (None, MANY):
        figures = drawn(change=longer, rows=rows_) if rows_ else drawn(change=longer)
        for stem, figure in figures.items():
            ticks = {tick for axes in figure.axes for tick in (*axes.get_xticklabels(), *axes.get_yticklabels())}
            for text in set(figure.findobj(Text)) - ticks:  # of ticks there are some that are not drawn
                if text.get_text() and text.get_visible() and text.get_window_extent().width:
                    box = text.get_window_extent()
                    assert min(box.x0, box.y0) >= -1, (stem, text)  # 1 dot: what a letter's edge may differ by
                    assert box.x1 <= figure.bbox.width + 1, (stem, text)
                    assert box.y1 <= figure.bbox.height + 1, (stem, text)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.3, 0.31, 0.5, 1.0]), min_size=1, max_size=12), st.randoms())
def test_what_stands_at_one_place_is_set_side_by_side_and_all_keep_their_order(places, draw):
    order = list(range(len(places)))
    draw.shuffle(order)
    moved = spread(places, order, span=1.0)
    for a, b in itertools.permutations(range(len(places)), 2):
        if (places[a], order[a]) < (places[b], order[b]):
            assert moved[b] - moved[a] > 0.0079
    if len(places) <= 4:
        assert max(abs(new - old) for new, old in zip(moved, places, strict=True)) <= 0.05


def marks(axes):
    """Where the means stand, in dots of the picture."""
    lines = [line for line in axes.lines if line.get_markersize() == 7 and len(line.get_xdata()) == 1]
    return [tuple(axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))) for line in lines]


def test_stacks_that_keep_the_same_are_all_seen(drawn):
    def alike(plan):
        return replace(plan, stacks=tuple(replace(stack, state_bytes=4096) for stack in plan.stacks))

    for axes in drawn("frontier", change=alike)["frontier"].axes:
        xs = sorted(x for x, _ in marks(axes))
        assert len(xs) == 7
        assert min(b - a for a, b in itertools.pairwise(xs)) > 10


def test_the_frontier_passes_through_the_marks_of_its_stacks(drawn):
    figure = drawn("frontier")["frontier"]
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
        joined = {tuple(axes.transData.transform(one)) for one in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert len(joined & set(marks(axes))) == len(line.get_xdata()) - 1  # and on to the edge


def test_an_interval_of_a_percentage_ends_where_the_percentages_do(drawn):
    axes, text, *_ = drawn("ratio", noise=0.3)["ratio"].axes
    ends = [end for line in axes.lines if line.get_marker() == "_" for end in line.get_ydata()]
    assert len(ends) >= 8
    assert min(ends) == 0.0
    assert max(ends) == 1.0
    assert text.get_ylim()[1] < 6  # no interval of two seeds presses what is not a percentage together


def test_a_line_has_its_name_in_the_legend_with_one_seed_too(drawn):
    (legend,) = drawn(seeds=(0,))["ratio"].legends
    assert "mixtures of carve and attention" in [text.get_text() for text in legend.get_texts()]


def test_curves_are_told_by_one_entry_each_and_ratios_by_the_axis(drawn):
    figure = drawn("ratio", rows=MANY)["ratio"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*"abcde", "all attention"]
    for axes in figure.axes[1::2]:
        assert {label.get_text() for label in axes.get_xticklabels()} == {"0 %", "12.5 %", "25 %", "50 %", "100 %"}
        low, high = axes.get_xlim()
        places = sorted(axes.get_xticks())
        assert min(b - a for a, b in itertools.pairwise(places)) > 0.12 * (high - low)


def test_ratios_too_many_for_their_labels_keep_some_that_do_not_overlap(drawn):
    rows_ = [(f"s{i}", "carve" if i < 32 else "attention", i / 32, 0.5, 2.4) for i in range(33)]
    for axes in drawn("ratio", rows=rows_)["ratio"].axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_visible()]
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


def test_the_start_of_a_training_leaves_a_picture_that_it_would_press_together(drawn):
    axes = drawn("learning-text")["learning-text"].axes[0]
    first = max(line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) > 2)
    last = [line.get_ydata()[-1] for line in axes.lines if len(line.get_ydata()) > 2]
    low, high = axes.get_ylim()
    assert low < min(last)
    assert max(last) < high < first
    assert max(last) - min(last) > 0.3 * (high - low)


def test_lines_over_the_difficulty_are_of_one_width(drawn):
    for figure in (drawn("levels-recall")["levels-recall"], drawn("levels-recall", rows=MANY)["levels-recall"]):
        for axes in filter(lambda axes: axes.get_visible(), figure.axes):
            lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
            assert len({line.get_linewidth() for line in lines if line.get_zorder() == 2}) == 1


def test_very_many_stacks_have_a_panel_for_each_curve(drawn):
    levels = drawn("levels-recall", rows=MANY)["levels-recall"]
    assert [axes.get_title(loc="left") for axes in levels.axes if axes.get_visible()] == list("abcde")
    for axes in levels.axes[:5]:
        assert len(marks(axes)) == 4 * 5  # of four difficulties: its four ratios and all attention
    learning = [
        axes.get_title(loc="left")
        for axes in drawn("learning-recall", rows=MANY)["learning-recall"].axes
        if axes.get_visible()
    ]
    assert learning == [label for label, *_ in MANY]


def test_a_tied_gate_is_said_to_stand_under_correct(make_results):
    plan, results = make_results(rows=[("tied", "carve", 0.0, 0.5, 2.4), ("own", "gdn2", 0.0, 0.5, 2.4)])
    value = dict.fromkeys(("mean", "q05", "q25", "median", "q75", "q95"), 0.5)
    gates = {"tied": ["correct"], "own": ["correct", "write"]}
    results = [
        {**one, "gates": [{"layer": 0, "mixer": "x", "gate": gate, **value} for gate in gates[one["stack"]]]}
        for one in results
    ]
    for correct, said in (("tied", True), ("scalar", False)):
        words = {"carve.correct": correct, "carve.write": "scalar"}
        first, *rest = plan.stacks
        changed = replace(plan, stacks=(replace(first, kind=replace(first.kind, recurrent=words)), *rest))
        with styled():
            figure = draw_all(gather(changed, results))["gates-recall"]
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert any("shown under correct" in text.replace("\n", " ") for text in texts) == said
