"""Two studies side by side: what both have is compared in pairs, what one has is named, and order turns the signs."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from made_up_study import cliff, made_up

from hybridzoo.mixers import SpecError
from hybridzoo.studies import compare_studies, write_comparison
from hybridzoo.studies.compare_page import grouped, outcome, summary
from hybridzoo.studies.results import write_json, write_result

SMALL = {"families": ("carve", "gdn2"), "ratios": (0.0, 0.25, 0.5, 1.0)}


@pytest.fixture
def put(tmp_path):
    """Write a made-up run into a folder, and return the folder."""

    def write(name, plan, results):
        folder = tmp_path / name
        write_json(folder / "study.json", plan.to_dict())
        names = {trial.key: trial.file_name for trial in plan.trials}
        for result in results:
            write_result(folder / "trials" / names[result["key"]], result)
        return folder

    return write


def better(task, family, ratio, place, budget):
    """As `cliff`, but the pure recurrent stacks recall far more."""
    return cliff(task, family, ratio, place, budget) + (0.3 if (task, ratio) == ("recall", 0.0) else 0.0)


def test_differences_are_those_of_the_seeds_that_pair(put):
    plan, results = made_up(**SMALL, noise=0.002, name="one")
    other, more = made_up(better, **SMALL, noise=0.002, seeds=(1, 2, 3, 4), name="two")
    side = compare_studies(put("a", plan, results), put("b", other, more))
    scores = [{(r["task"], r["stack"], r["seed"]): r["metrics"] for r in each} for each in (results, more)]
    assert len(side.pairs) == len(plan.stacks) * 2
    for pair in side.pairs:
        metric = plan.shown[pair.task].metric
        label = pair.first.stack.label
        expected = [
            scores[1][pair.task, label, seed][metric] - scores[0][pair.task, label, seed][metric] for seed in (1, 2)
        ]
        assert pair.apart.values == pytest.approx(expected)
        assert pair.change == pytest.approx(sum(expected) / 2)
        assert math.isnan(pair.p)  # two seeds pair: no test
        assert pair.verdict == "untested"


def test_what_differs_is_told_and_what_does_not_is_not(put):
    one = put("a", *made_up(**SMALL, noise=0.002, name="one"))
    two = put("b", *made_up(better, **SMALL, noise=0.002, name="two"))
    side = compare_studies(one, two)
    shown = side.findings[0].shown("recall")
    told = {pair.first.stack.label for pair in side.pairs if outcome(shown, pair) == "better"}
    assert told == {"carve alone", "gdn2 alone"}
    (said,) = summary(side, grouped(side)["", "recall"])
    assert said.startswith("Of 7 stacks with three paired seeds or more, 2 better in two")


def test_the_other_way_round_is_the_same_with_signs_turned(put):
    one = put("a", *made_up(**SMALL, name="one"))
    two = put("b", *made_up(better, **SMALL, name="two"))
    forth, back = compare_studies(one, two), compare_studies(two, one)
    turned = {(pair.task, pair.first.stack.label): pair for pair in back.pairs}
    for pair in forth.pairs:
        other = turned[pair.task, pair.first.stack.label]
        assert other.change == pytest.approx(-pair.change)
        assert (other.apart.low, other.apart.high) == pytest.approx((-pair.apart.high, -pair.apart.low))
        assert other.adjusted == pytest.approx(pair.adjusted)
    assert forth.only == back.only[::-1]


def test_a_study_beside_itself_differs_in_nothing(put):
    folder = put("a", *made_up(**SMALL))
    side = compare_studies(folder, folder)
    assert all(pair.change == 0 and pair.verdict == "tied" for pair in side.pairs)
    assert side.only == ((), ())
    assert side.changed == side.notes == ()


def test_what_only_one_has_is_named_and_a_renamed_stack_is_found_by_its_make(put):
    plan, results = made_up(**SMALL, name="one")
    other, more = made_up(families=("carve", "mamba2"), ratios=(0.0, 0.25, 0.5, 1.0), name="two")
    renamed = [replace(s, label="softmax" if s.label == "attention" else s.label) for s in other.stacks]
    trials = [replace(t, stack="softmax" if t.stack == "attention" else t.stack) for t in other.trials]
    other = replace(other, stacks=tuple(renamed), trials=tuple(trials))
    side = compare_studies(put("a", plan, results), put("b", other, more))
    (match,) = [pair for pair in side.pairs if pair.second.stack.label == "softmax" and pair.task == "recall"]
    assert match.first.stack.label == "attention"
    assert "stack gdn2 0.25 (on recall, text)" in side.only[0]
    assert "stack mamba2 alone (on recall, text)" in side.only[1]
    assert not any("carve" in thing or "attention" in thing for things in side.only for thing in things)


def test_stacks_of_one_label_that_are_made_otherwise_are_told(put):
    plan, results = made_up(**SMALL, name="one")
    other = {"gdn2 0.25": "moved", "carve 0.5": "changed"}
    stacks = []
    for stack in plan.stacks:
        kind = replace(stack.kind, recurrent={**stack.kind.recurrent, "gdn2.n_heads": 2})
        change = {"moved": {"pattern": "another"}, "changed": {"kind": kind}}.get(other.get(stack.label), {})
        stacks.append(replace(stack, **change))
    side = compare_studies(put("a", plan, results), put("b", replace(plan, stacks=tuple(stacks)), results))
    told = [note for note in side.to_dict()["notes"] if "not the same" in note]
    assert told == [
        "The stack carve 0.5 is not the same in the two studies: recurrent.gdn2.n_heads – and 2.",
        "The stack gdn2 0.25 is not the same in the two studies: layers gdn2 0.25  and another.",
    ]


def test_settings_that_differ_are_listed_with_both_values(put):
    plan, results = made_up(**SMALL, name="one")
    changed = replace(plan, study={**plan.study, "name": "two", "context": 128, "train": {"lr": 0.1}})
    side = compare_studies(put("a", plan, results), put("b", changed, results))
    assert {key: (a, b) for key, a, b in side.changed} == {"context": ("4096", "128"), "train": ("–", '{"lr": 0.1}')}


def test_what_only_one_study_has_is_said_once(put):
    plan, results = made_up(**SMALL, name="one")
    study = {**plan.study, "tasks": {"recall": {"pairs": 8, "train": {"lr": 0.1}}}, "spec": {"mixers": {"a": {}}}}
    more = {
        **study,
        "tasks": {"recall": {"pairs": 8, "train": {"lr": 0.2}}, "mine": {"pairs": 3, "train": {"steps": 5, "lr": 1.0}}},
        "spec": {"mixers": {"a": {}, "g": {"type": "gdn2", "n_heads": 2}}},
    }
    shown = {**plan.shown, "mine": plan.shown["recall"]}
    first = put("a", replace(plan, study=study), results)
    second = put("b", replace(plan, study={**more, "name": "two"}, shown=shown), results)
    side = compare_studies(first, second)
    assert [key for key, *_ in side.changed] == ["spec.mixers.g", "tasks.recall.train.lr"]
    assert side.only == ((), ("task mine",))


def test_seeds_do_not_pair_where_the_data_differ(put):
    plan, results = made_up(**SMALL, name="one")
    moved = [replace(trial, fingerprint={"task": trial.task, "text": "other"}) for trial in plan.trials]
    keys = {old.key: new.key for old, new in zip(plan.trials, moved, strict=True)}
    other = replace(plan, trials=tuple(moved))
    side = compare_studies(put("a", plan, results), put("b", other, [{**r, "key": keys[r["key"]]} for r in results]))
    assert all(pair.apart is None and pair.verdict == "untested" for pair in side.pairs)
    assert any("seeds do not pair" in note for note in side.notes)


def test_budgets_are_matched_by_name(put):
    both = put("a", *made_up(**SMALL, budgets=("params", "train_flops"), name="one"))
    one = put("b", *made_up(**SMALL, budgets=("train_flops", "inference_bytes"), name="two"))
    side = compare_studies(both, one)
    assert {pair.budget for pair in side.pairs} == {"train_flops"}
    assert "budget params" in side.only[0]
    assert "budget inference_bytes" in side.only[1]


def test_the_page_loads_nothing_and_shows_both_scores_and_the_difference(put, tmp_path):
    one = put("a", *made_up(**SMALL, name="<one>"))
    two = put("b", *made_up(better, **SMALL, name="two"))
    text = write_comparison(compare_studies(one, two), tmp_path / "page.html").read_text()
    assert "<one>" not in text
    assert "&lt;one&gt;" in text
    assert not re.search(r"<script|url\(|@import|https?://", text)
    assert text.count("data:image/png;base64") == 2
    assert 'id="pairs.csv"' in text
    assert re.search(r"\+\d+\.\d points \(\+\d+\.\d to \+\d+\.\d\)", text)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match=r"no study\.json here"):
        compare_studies(tmp_path, tmp_path)
