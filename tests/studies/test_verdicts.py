"""What a report concludes: no best ratio without an interval, orders with their bounds, limits from the facts."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest
from made_up_study import FAMILIES, made_up
from matplotlib.patches import Rectangle

from hybridzoo.studies import CorruptResultError, gather, read_findings
from hybridzoo.studies.canvas import image_of
from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.figures_inside import half_life, placement_map
from hybridzoo.studies.limits import limits
from hybridzoo.studies.page import page
from hybridzoo.studies.results import write_json
from hybridzoo.studies.sentences import (
    between,
    between_rows,
    curve_rows,
    headline,
    level_rows,
    pair_rows,
    place_of,
)
from hybridzoo.studies.style import looks, styled
from hybridzoo.studies.verdict_tables import every_table
from hybridzoo.studies.verdicts import (
    all_orders,
    budget_orders,
    grids,
    hybrid_orders,
    level_optima,
    mixer_pairs,
    optima,
    parts,
    ranking,
)

BUDGETS = ("params", "inference_bytes")


def findings_of(score=None, **words):
    return gather(*(made_up(**words) if score is None else made_up(score, **words)))


def rows(findings, stem):
    return list(csv.DictReader(io.StringIO(every_table(findings)[stem].to_csv())))


def bowl(task, family, ratio, place, budget):
    """Best at 0.3 of attention whatever the task, by far."""
    return 0.9 - (ratio - 0.3) ** 2 if task == "recall" else 2 + (ratio - 0.3) ** 2


def level(task, family, ratio, place, budget):
    return 0.8


def rising(task, family, ratio, place, budget):
    return 0.3 + ratio / 2


@pytest.mark.parametrize(
    ("score", "ratios", "said"),
    [
        (bowl, (0.0, 0.125, 0.25, 0.5, 1.0), r"Fitted, the best ratio is .* attention; 95 % interval: .* to .*\."),
        (level, (0.0, 0.125, 0.25, 0.5, 1.0), r"no ratio is told from the best, so flat"),
        (rising, (0.0, 0.125, 0.25, 0.5, 1.0), r"at the edge of the range, 100 % attention; 95 % interval: "),
        (rising, (0.0, 0.125, 0.25, 0.5), r"at the edge of the range, 50 % attention, and may lie beyond it"),
    ],
)
def test_a_best_ratio_stands_with_its_interval_or_not_at_all(score, ratios, said):
    findings = findings_of(score, families=("carve",), ratios=ratios, noise=0.003)
    words = " ".join(headline(findings, "recall"))
    assert re.search(said, words)
    assert words.count("best ratio") == len(re.findall(r"best ratio.*?95 % interval", words))
    for row in rows(findings, "optima"):
        told = row["verdict"] in ("inside", "edge")
        assert all((row[name] != "") == told for name in ("best_ratio", "low_95", "high_95", "best_measured_ratio"))
        if told:
            assert float(row["low_95"]) <= float(row["best_ratio"]) <= float(row["high_95"])
            assert float(row["low_95"]) <= float(row["best_measured_ratio"]) <= float(row["high_95"])


def test_with_two_seeds_no_best_ratio_is_given(make_results):
    findings = gather(*make_results())
    assert "No best ratio is fitted: two seeds are too few to bound it." in headline(findings, "recall")
    assert {row["verdict"] for row in rows(findings, "optima")} == {"unknown"}


def test_the_comparisons_are_one_a_stack_but_the_best_and_only_far_ones_are_told_apart():
    findings = findings_of()
    table = [row for row in rows(findings, "comparisons") if row["task"] == "recall"]
    assert len(table) == len(findings.plan.stacks) - 1
    best = ranking(findings.comparable("recall"), maximise=True).cells[0].stack.label
    assert {row["best"] for row in table} == {best}
    for row in table:
        assert float(row["p"]) <= float(row["p_holm"]) <= 1
        assert (row["told_apart"] == "True") == (float(row["p_holm"]) < 0.05)
    told = {row["stack"] for row in table if row["told_apart"] == "True"}
    assert {f"{family} alone" for family in FAMILIES} >= told


def test_hybrids_are_ordered_against_the_mixers_they_are_made_of():
    alike = hybrid_orders(findings_of(noise=0.0001), "recall")
    assert [order.second for order in alike] == ["12.5 % attention", "25 % attention", "50 % attention"]
    for order in alike:
        assert set(order.stacks) == {f"{family} alone" for family in FAMILIES}
        assert (order.correlation.tau, order.correlation.low, order.correlation.high) == (1, 1, 1)

    def turned(task, family, ratio, place, budget):
        rank = FAMILIES.index(family) if family in FAMILIES else 0
        return 0.5 + 0.1 * rank * (1 if ratio == 0 else -1)

    assert {order.correlation.tau for order in hybrid_orders(findings_of(turned, noise=0.0001), "recall")} == {-1}
    assert hybrid_orders(findings_of(families=("carve", "gdn2")), "recall") == []  # two have no order to speak of


def test_budgets_are_compared_on_the_stacks_that_both_have():
    findings = findings_of(budgets=BUDGETS)
    (order,) = budget_orders(parts(findings), "text")
    assert (order.first, order.second) == BUDGETS
    assert order.correlation.n == len(findings.plan.of_budget("params"))
    assert order.correlation.low <= order.correlation.tau <= order.correlation.high
    assert {budget for budget, _ in all_orders(findings)} == {"", *BUDGETS}
    words = " ".join(between(findings, "text"))
    places = {curve: two for curve, *two in between_rows(findings, "text")}
    assert set(places) == set(FAMILIES)
    for name, place in zip(BUDGETS, places["carve"], strict=True):
        part = findings.at(name)
        assert place == place_of(optima(part, "text")["carve"])
    assert "The order of 13 stacks at equal parameters against that at equal inference memory: Kendall's tau" in words


def test_the_stacks_that_are_not_told_from_the_best_are_named_or_the_few_that_are():
    def three_apart(task, family, ratio, place, budget):
        return 0.2 if ratio == 0 else 0.9

    words = " ".join(headline(findings_of(three_apart, noise=0.0005), "recall"))
    assert re.search(r"these seeds separate ((carve|gdn2|mamba2) alone(, | and |)){3}, and none of the others\.", words)
    words = " ".join(headline(findings_of(rising, families=("carve",), noise=0.0005), "recall"))
    assert "do not separate" not in words


def test_the_best_ratio_is_found_at_every_difficulty():
    """What is best at the trained difficulty may be worst at another."""
    plan, results = made_up(rising, families=("carve",), noise=0.001)
    levels = ((32, "accuracy"), (64, "accuracy_64"))
    plan = replace(plan, shown={**plan.shown, "recall": replace(plan.shown["recall"], levels=levels)})
    for result in results:
        if "accuracy" in result["metrics"]:
            result["metrics"]["accuracy_64"] = 1 - result["metrics"]["accuracy"]
    findings = gather(plan, results)
    found = level_optima(findings, "recall")
    assert found[32] == optima(findings, "recall")
    assert (found[32]["carve"].measured, found[64]["carve"].measured) == (1, 0)
    assert level_rows(findings, "recall") == [["carve", *(place_of(found[level]["carve"]) for level in (32, 64))]]
    assert level_optima(findings, "text") == {}
    table = [row for row in rows(findings, "optima") if row["task"] == "recall"]
    assert [(row["level"], row["best_measured_ratio"]) for row in table] == [("", "1.0"), ("32", "1.0"), ("64", "0.0")]
    assert "recall: the best ratio (95 % interval) by" in page(findings, {}, every_table(findings), [])
    del results[0]["metrics"]["accuracy_64"]
    partly = gather(plan, results)
    assert set(level_optima(partly, "recall")) == {32}
    assert level_rows(partly, "recall") == [["carve", place_of(found[32]["carve"]), "–"]]
    few = [result for result in results if result["seed"] < 2]
    assert level_rows(gather(plan, few), "recall") == []  # two seeds bound nothing


def test_every_two_mixers_are_compared_over_the_ratios_that_both_have():
    findings = findings_of(noise=0.002)
    pairs = mixer_pairs(findings, "recall")
    assert [(pair.first, pair.second) for pair in pairs] == [("carve", "gdn2"), ("carve", "mamba2"), ("gdn2", "mamba2")]
    cells = {cell.stack.label: cell for cell in findings.comparable("recall")}
    labels = ("alone", "0.125", "0.25", "0.5")
    for pair in pairs:
        assert pair.shares == (0.0, 0.125, 0.25, 0.5)
        one, other = ([cells[f"{name} {label}"] for label in labels] for name in (pair.first, pair.second))
        assert pair.apart.mean == pytest.approx(sum(a.mean - b.mean for a, b in zip(one, other, strict=True)) / 4)
        assert pair.apart.n == 3
        assert pair.p <= pair.adjusted < 0.05
        assert not pair.tied
    assert [row[:2] for row in pair_rows(findings, "recall")] == [[pair.first, pair.second] for pair in pairs]
    # Of bits a byte fewer are better, and the words say which of two is.
    bits, said = mixer_pairs(findings, "text")[0].apart, pair_rows(findings, "text")[0]
    assert bits.mean < 0 < float(said[3])
    assert said[4] == f"{-bits.high:+.3f} to {-bits.low:+.3f}"
    assert all(pair.tied for pair in mixer_pairs(findings_of(level), "recall"))
    assert len(rows(findings, "mixers")) == 6
    assert mixer_pairs(findings_of(seeds=(0, 1)), "recall") == []  # two seeds tell nothing


def test_mixers_are_compared_where_their_attention_stands_alike():
    def placed(task, family, ratio, place, budget):
        return 0.5 + 0.08 * (place == "last") + 0.02 * (family == "gdn2")

    findings = findings_of(placed, families=("carve", "gdn2"), places=("first", "last"), noise=0.0005)
    pairs = mixer_pairs(findings, "recall")
    assert [(pair.first, pair.second) for pair in pairs] == [
        (f"carve (placement={place})", f"gdn2 (placement={place})") for place in ("first", "last")
    ]
    assert all(pair.apart.mean == pytest.approx(-0.02, abs=0.002) and not pair.tied for pair in pairs)


def test_where_nothing_was_learnt_no_ratio_is_compared():
    def lost(task, family, ratio, place, budget):
        return 0.03

    findings = findings_of(lost, budgets=BUDGETS)
    assert between(findings, "recall") == between_rows(findings, "recall") == []
    assert curve_rows(findings.at("params"), "recall") == []
    assert {row["task"] for row in rows(findings, "optima")} == {"text"}
    assert len(curve_rows(findings.at("params"), "text")) == len(FAMILIES)  # where guessing has no score


def test_each_budget_has_its_own_optimum():
    def moved(task, family, ratio, place, budget):
        return 0.9 - (ratio - (0.2 if budget == "params" else 0.6)) ** 2

    for budget, part in parts(findings_of(moved, budgets=BUDGETS, noise=0.001)).items():
        for found in optima(part, "recall").values():
            assert found.low <= (0.2 if budget == "params" else 0.6) <= found.high
            assert (found.ratio < 0.4) == (budget == "params")


def test_placements_make_a_map_where_both_are_varied():
    placed = findings_of(families=("carve", "gdn2"), places=("first", "even"))
    assert set(grids(placed, "recall")) == {"carve", "gdn2"}
    assert len(grids(placed, "recall")["carve"]) == 6
    assert grids(findings_of(), "recall") == {}
    assert grids(findings_of(places=("first", "even"), ratios=(0.0, 0.25, 1.0)), "recall") == {}


@pytest.fixture(scope="module")
def pictures():
    findings = findings_of(families=("carve", "gdn2"), places=("first", "even"), budgets=BUDGETS)
    with styled():
        figures = draw_all(findings)
        for figure in figures.values():
            figure.draw_without_rendering()
    return findings, figures


def test_every_budget_has_every_picture_and_the_ratio_is_drawn_of_all(pictures):
    findings, figures = pictures
    kinds = ["ratio", "placement-recall", "placement-text", "frontier", "learning-recall", "learning-text"]
    kinds += ["gates-recall", "gates-text", "parameters"]
    expected = [f"between--{task}" for task in findings.plan.shown]
    expected += [f"{budget}--{kind}" for budget in BUDGETS for kind in kinds]
    expected.remove("inference_bytes--frontier")  # all stacks keep the same there
    assert list(figures) == expected
    assert all(len(figures[f"between--{task}"].axes) == 4 for task in findings.plan.shown)  # each with its optima


def test_nothing_of_a_picture_lies_outside_it_and_no_legends_overlap_axes(pictures):
    for stem, figure in pictures[1].items():
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, stem
            for axes in figure.axes:
                assert not axes.get_visible() or not box.overlaps(axes.get_tightbbox()), stem
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box is None or (box.x0 >= -1 and box.x1 <= figure.bbox.width + 1), stem


def test_a_map_says_every_mean_and_frames_the_best(pictures):
    findings, figures = pictures
    part = findings.at("params")
    for axes, grid in zip(figures["params--placement-recall"].axes, grids(part, "recall").values(), strict=False):
        said = " ".join(text.get_text() for text in axes.texts)
        assert all(f"{100 * cell.mean:.1f} %" in said for cell in grid.values())
        solid = [box for box in axes.patches if box.get_linestyle() in ("-", "solid")]
        best = max(grid.values(), key=lambda cell: cell.mean)
        columns = sorted({share for _, share in grid})
        assert len(solid) == 1
        assert round(solid[0].get_x() + 0.47) == columns.index(best.stack.attention)


def test_only_where_memory_may_differ_a_frontier_is_told():
    findings = findings_of(families=("carve",), budgets=BUDGETS)
    said = {budget: " ".join(headline(findings.at(budget), "recall")) for budget in BUDGETS}
    assert "on the frontier" in said["params"]
    assert "frontier" not in said["inference_bytes"]


def test_the_frames_of_a_map_are_explained_in_the_picture(pictures):
    _, figures = pictures
    for stem in (stem for stem in figures if "--placement-" in stem):
        (legend,) = figures[stem].legends
        frames = [box for axes in figures[stem].axes for box in axes.patches if isinstance(box, Rectangle)]
        keys = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_patches(), strict=True))
        assert {key.get_edgecolor() for key in keys.values()} == {box.get_edgecolor() for box in frames}
        dashed = [box for box in frames if box.get_linestyle() not in ("-", "solid")]
        assert list(keys) == ["best cell of a map", *(["not told from it by these seeds"] if dashed else [])]
        assert b'id="legend_1"' in image_of(figures[stem], "svg")


def test_a_map_without_ties_has_no_key_for_them():
    def apart(task, family, ratio, place, budget):
        return rising(task, family, ratio, place, budget) + 0.1 * (place == "first")

    findings = findings_of(apart, families=("carve",), places=("first", "even"), noise=1e-5)
    with styled():
        (legend,) = placement_map(findings, "recall").legends
    assert [text.get_text() for text in legend.get_texts()] == ["best cell of a map"]


def test_a_stack_looks_like_its_curve_and_like_no_other_stack():
    plan, _ = made_up(places=("first", "even", "last"))
    drawn = looks(plan.stacks)
    assert len({(look.colour, look.mark, look.fill) for look in drawn.values()}) == len(plan.stacks)
    for stack in plan.stacks:
        if stack.attention < 1:
            assert drawn[stack.label].colour == drawn[f"{stack.family} alone"].colour
            assert drawn[stack.label].curve == stack.family


def test_a_half_life_is_the_tokens_after_which_half_is_left():
    assert half_life(0.5) == pytest.approx(1)
    assert half_life(0.5 ** (1 / 40)) == pytest.approx(40)
    assert half_life(1.0) == 1e6
    assert half_life(0.0) < 0.02


def test_limits_name_flat_curves_edges_and_rates_at_the_edge_of_their_grid(tmp_path):
    flat = " ".join(limits(findings_of(level, families=("carve",))))
    assert "On recall, which ratio of attention is best is not shown for carve: it is flat." in flat
    cut = " ".join(limits(findings_of(rising, families=("carve",), ratios=(0.0, 0.125, 0.25, 0.5))))
    assert "On recall, the best ratio for carve is the last that was tried: beyond it is not shown." in cut
    whole = " ".join(limits(findings_of(rising, families=("carve",))))
    assert "beyond it" not in whole
    assert "same learning rate" in whole
    assert "Ratios tried: 0 %, 12.5 %, 25 %, 50 % and 100 %" in whole
    plan, _ = made_up(families=("carve",))
    write_json(tmp_path / "study.json", plan.to_dict())
    row = {"budget": "", "task": "recall", "stack": "carve alone", "lr": 0.01, "scores": {"0.003": None, "0.01": 0.5}}
    write_json(tmp_path / "tuned.json", [{**row, "edge": True}, {**row, "stack": "attention", "edge": False}])
    assert "A grid of so few rates is all edges" in " ".join(limits(read_findings(tmp_path)))
    row["scores"]["0.001"] = 0.4
    write_json(tmp_path / "tuned.json", [{**row, "edge": True}, {**row, "stack": "attention", "edge": False}])
    tuning = replace(plan, study={**plan.study, "tune": {"lr": [0.003, 0.01], "seeds": [0]}})
    assert "these rates are not here" in " ".join(limits(gather(tuning, [])))
    tuned = " ".join(limits(read_findings(tmp_path)))
    assert "the best of 3 learning rates, 0.001 to 0.01" in tuned
    assert "Of 2 choices 1 lie at the edge of that grid" in tuned
    assert "carve alone on recall (0.01)" in tuned
    assert "same learning rate" not in tuned
    assert "0.01 (edge of the grid)" in page(read_findings(tmp_path), {}, {}, [])
    write_json(tmp_path / "tuned.json", [{"odd": 1}])
    with pytest.raises(CorruptResultError, match=r"tuned\.json: cannot be read"):
        read_findings(tmp_path)


def test_the_table_of_gates_holds_every_row_of_every_result():
    plan, results = made_up(families=("carve",))
    table = rows(gather(plan, results), "gates")
    assert len(table) == sum(len(result["gates"]) for result in results)
    assert {row["gate"] for row in table} == {"decay", "erase", "content", "correct"}
    assert all(float(row["q05"]) < float(row["median"]) < float(row["q95"]) for row in table)
