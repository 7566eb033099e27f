"""A study may hold several budgets: each has stacks and findings of its own, and nothing joins two of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest

from hybridzoo.architectures import Spec, account
from hybridzoo.mixers import SpecError
from hybridzoo.studies import Execution, gather, make_plan, read_findings, run_study, study_from, write_report
from hybridzoo.studies.display import Display, PlainDisplay
from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.findings import families, on_frontier
from hybridzoo.studies.limits import limits
from hybridzoo.studies.plan import Plan
from hybridzoo.studies.runner import preview_study
from hybridzoo.studies.solve import BUDGET_WORDS

ALL = {"params": "largest", "train_flops": "largest", "inference_bytes": "smallest"}


def study(**keys):
    data = {
        "name": "small",
        "spec": {
            "d_model": 8,
            "mixers": {
                "a": {"type": "attention", "n_heads": 1},
                "d": {"type": "delta_net", "n_heads": 1, "head_dim": 8, "conv_size": 0},
            },
            "ffn": {"type": "gelu", "width": 32, "multiple_of": 1},
        },
        "stacks": {"attention": {"layers": "a*2"}, "mixed": {"layers": "d a"}, "delta": {"layers": "d*2"}},
        "hold": {**ALL, "tolerance": 0.02},
        "context": 64,
        "tasks": {
            "recall": {
                "type": "mqar",
                "pairs": 2,
                "keys": 4,
                "values": 4,
                "examples": 8,
                "quick_examples": 8,
                "train": {"steps": 2, "batch_size": 2, "eval_every": 1, "log_every": 1},
            }
        },
    }
    return study_from({**data, **keys})


@pytest.fixture(scope="module")
def plan():
    return make_plan(study())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run under three budgets, and its report."""
    folder = tmp_path_factory.mktemp("budgets")
    run_study(study(), folder, Execution(processes=0), display=Display())
    write_report(folder)
    return folder


def test_every_stack_is_solved_once_for_each_budget(plan):
    assert plan.budgets == ("params", "train_flops", "inference_bytes")
    for budget in plan.budgets:
        stacks = plan.of_budget(budget)
        left_out = [label for name, label, _ in plan.excluded if name == budget]
        assert [stack.label for stack in stacks] + left_out == ["attention", "mixed", "delta"]
        for stack in stacks:
            assert plan.held(stack) == pytest.approx(plan.targets[budget], rel=0.02)
            assert f"against {plan.targets[budget]:,}" in stack.solved
    assert plan.stacks == tuple(itertools.chain.from_iterable(plan.of_budget(budget) for budget in plan.budgets))


def test_what_is_held_is_what_the_spec_costs(plan):
    for stack in plan.stacks:
        cost = account(Spec.from_dict(stack.specs["recall"], "x"), context=64)
        trained = account(Spec.from_dict(stack.specs["recall"], "x"), context=plan.lengths["recall"])
        held = {"params": cost.parameters, "train_flops": trained.train_flops_per_token}
        assert plan.held(stack) == held.get(stack.budget, cost.state_bytes)


def test_words_for_targets_are_of_the_stacks_as_declared(plan):
    free = make_plan(study(hold=None))
    assert plan.targets == {
        "params": max(stack.parameters["recall"] for stack in free.stacks),
        "train_flops": max(stack.train_flops["recall"] for stack in free.stacks),
        "inference_bytes": min(stack.state_bytes for stack in free.stacks),
    }
    largest = make_plan(study(hold={"inference_bytes": "largest", "tolerance": 0.5}))
    assert largest.targets == {"inference_bytes": max(stack.state_bytes for stack in free.stacks)}


def test_without_a_budget_parameters_are_held_and_within_one_percent():
    hold = study(hold={}).hold
    assert hold is not None
    assert (hold.asked, hold.tolerance) == ({"params": "largest"}, 0.01)
    assert study(hold={"inference_bytes": 4096}).hold.asked == {"inference_bytes": 4096}


def test_under_equal_memory_parameters_are_those_asked_for_or_as_declared():
    declared = {stack.label: stack.parameters["recall"] for stack in make_plan(study(hold=None)).stacks}
    alone = make_plan(study(hold={"inference_bytes": "smallest"}))
    for stack in alone.stacks:
        assert stack.parameters["recall"] == pytest.approx(declared[stack.label], rel=0.01)
    both = make_plan(study(hold={"inference_bytes": "smallest", "params": 3000}))
    for stack in both.of_budget("inference_bytes"):
        assert stack.parameters["recall"] == pytest.approx(3000, rel=0.01)


def test_an_equal_spec_under_two_budgets_is_one_trial(plan):
    keys = {}
    for trial in plan.trials:
        keys.setdefault(trial.key, []).append(trial)
    shared = [trials for trials in keys.values() if len(trials) > 1]
    assert shared
    for first, *others in shared:
        for other in others:
            assert other.budget != first.budget
            assert (other.stack, other.file_name) == (first.stack, first.file_name)
            assert {**other.spec, "name": ""} == {**first.spec, "name": ""}
    assert {trial.key for trial in plan.distinct} == set(keys)
    assert len(plan.distinct) == len(keys)


def test_a_budget_is_in_no_key(plan):
    for trial in plan.trials:
        assert replace(trial, budget="other").key == trial.key
        assert plan.titles([trial])[trial.key] == f"{trial.title} · {trial.budget}"


def test_where_there_is_one_budget_no_title_names_it_and_files_are_those_of_any_number_of_budgets(plan):
    one = make_plan(study(hold={"params": "largest", "tolerance": 0.02}))
    none = make_plan(study(hold=None))
    for single in (one, none):
        assert set(single.titles(single.trials).values()) == {trial.title for trial in single.trials}
        assert not any(word in title for title in single.titles(single.trials).values() for word in ALL)
    assert [trial.file_name for trial in one.trials] == [trial.file_name for trial in plan.at("params").trials]
    assert {trial.file_name: trial.key for trial in one.trials}.items() <= {
        trial.file_name: trial.key for trial in plan.trials
    }.items()


def test_a_run_under_several_budgets_goes_on_under_one_and_says_titles_without_it(folder, tmp_path):
    kept = shutil.copytree(folder, tmp_path / "kept")
    one = study(hold={"params": "largest", "tolerance": 0.02})
    victim = make_plan(one).trials[0]
    (kept / "trials" / victim.file_name).unlink()
    said = io.StringIO()
    done = run_study(one, kept, Execution(processes=0), display=PlainDisplay(said), estimate=0)
    assert (done.finished, done.reused) == (1, 2)
    assert f"[3/3] {victim.title}: " in said.getvalue()
    assert (kept / "trials" / victim.file_name).exists()


def test_a_part_of_a_plan_is_of_one_budget_alone(plan):
    for budget in plan.budgets:
        part = plan.at(budget)
        assert (part.budgets, set(part.targets)) == ((budget,), {budget})
        assert part.stacks == plan.of_budget(budget)
        assert {trial.budget for trial in part.trials} == {budget}
        assert {name for name, _, _ in part.excluded} <= {budget}
        assert part.at(budget) == part
    with pytest.raises(ValueError, match="no budget 'flops' in this study, which has: params, train_flops, inference"):
        plan.at("flops")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_budget_that_no_stack_meets_is_named():
    with pytest.raises(
        SpecError,
        match=r"^study: hold\.inference_bytes: no stack can meet the budget \(attention: 136 bytes against 1 ",
    ):
        make_plan(study(hold={"params": "largest", "inference_bytes": 1}))


def test_stacks_that_a_budget_makes_equal_are_trained_once_and_said_to_be():
    words = {"stacks": {"attention": {"layers": "a*2"}}, "axes": {"mixers.a.window": [16, 24]}}
    plan = make_plan(study(hold={"inference_bytes": 392}, **words))
    assert [stack.label for stack in plan.stacks] == ["attention, window=16", "attention, window=24"]
    assert len(plan.distinct) == 1
    assert (
        "at equal inference memory, one stack, trained once: attention, window=16; attention, window=24" in plan.repeats
    )


def test_windows_that_no_sequence_of_training_reaches_are_named():
    plan = make_plan(study(hold={"inference_bytes": 1000, "tolerance": 0.1}))
    (note,) = plan.notes
    assert note.startswith("at equal inference memory, on recall, whose sequences of training have 6 tokens, ")
    assert note.endswith(": attention; mixed")
    assert not make_plan(study(hold={"inference_bytes": 200, "tolerance": 0.1}, stacks={"a": {"layers": "a*2"}})).notes


def test_what_meets_a_budget_makes_no_other_kind_of_stack():
    plan = make_plan(study(hold={"inference_bytes": 1000, "tolerance": 0.1}))
    windows = {stack.specs["recall"]["mixers"]["a"]["window"] for stack in plan.stacks if stack.attention}
    assert len(windows) > 1  # a window for each ratio
    kinds = {json.dumps(stack.kind.attention) for stack in plan.stacks if stack.attention}
    assert len(kinds) == 1


def test_a_run_trains_what_differs_and_lists_it_under_each_budget(folder):
    findings = read_findings(folder)
    plan = findings.plan
    assert not findings.missing
    assert len(list((folder / "trials").glob("*.json"))) == len(plan.distinct) < len(plan.trials)
    for stack in plan.stacks:
        assert findings.cell("recall", stack).seeds == (0,)
    again = run_study(study(), folder, Execution(processes=0), display=Display())
    assert (again.finished, again.reused) == (0, len(plan.distinct))
    fewer = run_study(
        study(hold={"train_flops": "largest", "tolerance": 0.02}), folder, Execution(processes=0), display=Display()
    )
    assert fewer.finished == 0  # what another budget trained is there for this one too
    run_study(study(), folder, Execution(processes=0), display=Display())


def test_specs_are_saved_for_each_budget(folder):
    plan = read_findings(folder).plan
    names = {f"{stack.label}--{stack.budget.replace('_', '-')}.yaml" for stack in plan.stacks}
    assert {path.name for path in (folder / "specs").iterdir()} == names


class Notes(Display):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def test_of_a_large_study_a_run_says_how_many_stacks_and_which_were_left_out(tmp_path):
    def said(most):
        notes = Notes()
        axes = {"ffn.width": list(range(8, 8 + most)), "mixers.a.window": [4, 8]}
        stacks = {"delta": {"layers": "d*2"}, "deep": {"layers": "d*12"}}
        large = study(stacks=stacks, axes=axes, hold={"params": 2000})
        preview_study(large, tmp_path, Execution(processes=0), display=notes, estimate=0.01)
        return notes.texts

    few, many = said(2), said(13)
    assert sum(text.startswith("delta, width=") for text in few) == 2
    assert not any(text.startswith("delta, width=") for text in many)
    assert sum(text.startswith("13 stacks are at equal parameters; how each was brought there") for text in many) == 1
    assert sum(text.startswith("left out, since it cannot meet equal parameters: deep, width=") for text in many) == 13


def test_whoever_starts_a_run_hears_what_was_solved(tmp_path):
    notes = Notes()
    run_study(study(hold={"params": 2000}), tmp_path, Execution(processes=0), display=notes)
    assert any(
        re.match(r"delta, at equal parameters: FFN 32 -> \d+: [12],\d+ parameters against 2,000", t)
        for t in notes.texts
    )


def test_tables_name_the_budget_of_every_row(folder):
    findings = read_findings(folder)
    for stem in ("stacks", "trials", "levels", "learning"):
        with open(folder / "tables" / f"{stem}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["budget"] for row in rows} <= set(findings.plan.budgets)
        if stem == "stacks":
            assert [(row["budget"], row["stack"]) for row in rows] == [
                (s.budget, s.label) for s in findings.plan.stacks
            ]
            assert [row["solved"] for row in rows] == [stack.solved for stack in findings.plan.stacks]


def test_findings_of_several_budgets_are_compared_one_budget_at_a_time(folder):
    findings = read_findings(folder)
    for compare in (findings.ranked, findings.comparable):
        with pytest.raises(ValueError, match=r"several budgets \(params, train_flops, inference_bytes\).*at\(\)"):
            compare("recall")
    for budget in findings.plan.budgets:
        part = findings.at(budget)
        assert {cell.stack.budget for cell in part.ranked("recall")} == {budget}
        assert len(part.of("recall")) == len(findings.plan.of_budget(budget))


def test_a_report_has_sections_and_pictures_for_each_budget(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("equal parameters", "equal training FLOPs", "equal inference memory"):
        assert f"<h2>What was found ({words})</h2>" in page
        assert f"<h2>The numbers ({words})</h2>" in page
    assert "3 stacks, 3 budgets, 1 task, 1 seed" in page
    stems = {path.stem for path in (folder / "figures").iterdir()}
    for budget in read_findings(folder).plan.budgets:
        assert {f"{budget}--ratio", f"{budget}--parameters"} <= stems


def test_quality_is_not_weighed_against_a_memory_that_is_held_equal(folder):
    findings = read_findings(folder)
    drawn = {path.stem.removesuffix("--frontier") for path in (folder / "figures").glob("*--frontier.*")}
    assert drawn == {"params", "train_flops"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    starts = [text.index(f"<h2>Quality against memory (equal {words})</h2>") for words in BUDGET_WORDS.values()]
    sections = [text[start : text.index("</section>", start)] for start in starts]
    said = "Not drawn: all stacks keep the same at inference, within the tolerance, so there is no memory to weigh"
    assert [said in section for section in sections] == [False, False, True]
    assert ["<img" in section for section in sections] == [True, True, False]
    with open(folder / "tables" / "stacks.csv", encoding="utf-8", newline="") as file:
        column = {(row["budget"], row["on_frontier"]) for row in csv.DictReader(file)}
    assert ("inference_bytes", "") in column
    assert {budget for budget, value in column if value == "True"} == {"params", "train_flops"}
    assert len([budget for budget, _ in column if budget == "inference_bytes"]) == 1
    assert not on_frontier(findings.at("inference_bytes").of("recall"), True)


@pytest.fixture
def doubled(make_results):
    """Made-up results of the same stacks under two budgets, the second with scores of its own."""
    plan, results = make_results()
    other = [replace(stack, budget="train_flops", state_bytes=stack.state_bytes + 8) for stack in plan.stacks]
    trials = [replace(trial, budget="train_flops", code="other") for trial in plan.trials]
    pairs = zip(trials, results, strict=True)
    return gather(
        replace(
            plan,
            budgets=("params", "train_flops"),
            targets={**plan.targets, "train_flops": 900_000},
            stacks=(*plan.stacks, *other),
            trials=(*plan.trials, *trials),
        ),
        [*results, *({**result, "key": trial.key} for trial, result in pairs)],
    )


def test_no_curve_and_no_frontier_joins_two_budgets(doubled):
    cells = doubled.of("recall")
    assert {cell.stack.budget for cell in cells} == {"params", "train_flops"}
    curves = families(cells)
    assert all(len({cell.stack.budget for cell in curve}) == 1 for curve in curves.values())
    assert sum(len(curve) for curve in curves.values()) == 2 * sum(
        len(curve) for curve in families(doubled.at("params").of("recall")).values()
    )
    both = on_frontier(cells, True)
    for budget in ("params", "train_flops"):
        alone = on_frontier(doubled.at(budget).of("recall"), True)
        assert [cell for cell in both if cell.stack.budget == budget] == alone


def test_pictures_are_drawn_for_each_budget_alike(doubled):
    drawn = draw_all(doubled)
    pictures = {stem: figure for stem, figure in drawn.items() if not stem.startswith("between--")}
    assert set(drawn) - set(pictures) == {"between--recall", "between--text"}
    stems = {stem.partition("--")[2] for stem in pictures}
    assert set(pictures) == {f"{budget}--{stem}" for budget in ("params", "train_flops") for stem in stems}
    one, two = (pictures[f"{budget}--ratio"].legends[0] for budget in ("params", "train_flops"))
    looks = [
        [(line.get_color(), line.get_marker()) for line in legend.legend_handles if hasattr(line, "get_marker")]
        for legend in (one, two)
    ]
    assert looks[0] == looks[1]


def test_limits_name_the_budgets_that_were_not_asked_for(doubled):
    words = " ".join(limits(doubled))
    assert "Parameters were made equal by the width of the FFN" in words
    assert "Training FLOPs were made equal by the width of the FFN" in words
    assert "Equal inference memory would be another comparison, with another answer." in words


def test_placements_have_curves_of_their_own_that_end_alike(make_results):
    rows = [("none", "carve", 0.0, 0.4, 2.4), ("all", "attention", 1.0, 0.9, 2.5)]
    rows += [(f"{share} {place}", "carve", share, 0.7, 2.4) for share in (0.25, 0.5) for place in ("even", "first")]
    plan, results = make_results(rows=rows)
    stacks = tuple(
        replace(stack, placement=stack.label.partition(" ")[2]) if " " in stack.label else stack
        for stack in plan.stacks
    )
    curves = families(gather(replace(plan, stacks=stacks), results).of("recall"))
    assert set(curves) == {"carve (placement=even)", "carve (placement=first)"}
    for name in ("even", "first"):
        labels = [cell.stack.label for cell in curves[f"carve (placement={name})"]]
        assert labels == ["none", f"0.25 {name}", f"0.5 {name}", "all"]
