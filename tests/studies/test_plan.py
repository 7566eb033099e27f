"""A plan is a study made concrete: every stack at the budget, counted, and crossed with tasks and seeds."""

from __future__ import annotations

import json

import pytest

from hybridzoo.architectures import Spec, account
from hybridzoo.mixers import SpecError
from hybridzoo.studies import make_plan, study_from
from hybridzoo.studies.plan import Plan


def study(**keys):
    data = {
        "name": "small",
        "spec": {
            "d_model": 16,
            "mixers": {
                "a": {"type": "attention", "n_heads": 2},
                "c": {"type": "carve", "n_heads": 2, "head_dim": 8},
                "g": {"type": "gdn2", "n_heads": 2, "head_dim": 8},
            },
            "ffn": {"type": "swiglu", "width": 64},
        },
        "stacks": {
            "attention": {"layers": "a*4"},
            "mixed": {"layers": "a c*3"},
            "token": {"layers": "c[erase=token]*4"},
            "beside": {"layers": "(a+g)*2"},
        },
        "hold": {"tolerance": 0.02},
        "seeds": [0, 1],
        "tasks": {
            "recall": {"type": "mqar", "pairs": 2, "keys": 8, "values": 8, "train": {"steps": 2}},
            "more": {"type": "mqar", "pairs": 2, "keys": 64, "values": 64, "train": {"steps": 2}},
        },
    }
    return study_from({**data, **keys})


def test_every_stack_meets_the_budget_on_every_task():
    plan = make_plan(study())
    for task in plan.shown:
        counts = [stack.parameters[task] for stack in plan.stacks]
        assert max(counts) / min(counts) < 1.02
    assert plan.target is not None
    assert all(abs(stack.parameters["recall"] / plan.target - 1) <= 0.02 for stack in plan.stacks)


def test_the_largest_stack_is_the_budget_unless_a_number_is_given():
    free = make_plan(study(hold=None))
    assert free.target is None
    assert make_plan(study()).target == max(stack.parameters["recall"] for stack in free.stacks)
    assert make_plan(study(hold={"params": 40_000})).target == 40_000


def test_a_stack_that_cannot_meet_the_budget_is_listed_and_the_rest_go_on():
    # Between what the narrowest FFN leaves of the gated stacks and of the plain one.
    wide = {"attention": {"layers": "a"}, "deep": {"layers": "g*12"}}
    plan = make_plan(study(stacks=wide, hold={"params": 6_000}))
    assert [stack.label for stack in plan.stacks] == ["attention"]
    ((label, why),) = plan.excluded
    assert label == "deep"
    assert "at an FFN width of 1" in why
    assert {trial.stack for trial in plan.trials} == {"attention"}


def test_a_budget_that_nothing_meets_is_an_error_that_lists_every_stack():
    with pytest.raises(SpecError, match=r"no stack can meet the budget \(attention: .*; mixed: .*; token: "):
        make_plan(study(hold={"params": 10}))


def test_costs_are_those_of_the_resolved_spec():
    for stack in make_plan(study(context=128)).stacks:
        for task in ("recall", "more"):
            cost = account(Spec.from_dict(stack.specs[task], "x"), context=128)
            assert stack.parameters[task] == cost.parameters
            assert stack.train_flops[task] == cost.train_flops_per_token
            assert (stack.state_bytes, stack.kv_bytes) == (cost.state_bytes, cost.kv_bytes)


def test_a_stack_says_its_family_and_its_share_of_attention():
    said = {stack.label: (stack.family, stack.attention) for stack in make_plan(study()).stacks}
    assert said == {
        "attention": ("attention", 1.0),
        "mixed": ("carve", 0.25),
        "token": ("carve[erase=token]", 0.0),
        "beside": ("gdn2", 0.5),
    }


def test_trials_cross_stacks_tasks_and_seeds_with_seeds_outermost():
    plan = make_plan(study())
    assert [(t.seed, t.task, t.stack) for t in plan.trials] == [
        (seed, task, stack.label) for seed in (0, 1) for task in ("recall", "more") for stack in plan.stacks
    ]
    assert len({trial.key for trial in plan.trials}) == len(plan.trials)
    assert len({trial.file_name for trial in plan.trials}) == len(plan.trials)
    assert all(trial.train["seed"] == trial.seed for trial in plan.trials)


def test_a_plan_reads_back_from_json_as_it_was():
    plan = make_plan(study())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_key_changes_with_what_decides_a_result_and_with_nothing_else():
    def keys(**changes):
        return {trial.key for trial in make_plan(study(seeds=[0], **changes)).trials}

    same = keys()
    assert keys(name="renamed", about="other words", context=99) == same
    relabelled = {"A": {"layers": "a*4"}, "B": {"layers": "a c*3"}, "C": {"layers": "c[erase=token]*4"}}
    assert keys(stacks={**relabelled, "D": {"layers": "(a+g)*2"}}) == same
    assert not keys(train={"lr": 0.5}) & same
    assert not keys(hold={"params": 40_000}) & same


def test_a_spec_beside_the_study_is_found_from_anywhere(tmp_path, monkeypatch):
    from hybridzoo.studies import load_study

    (tmp_path / "base.yaml").write_text(
        "name: base\nd_model: 16\nvocab_size: 32\nlayers: a\nmixers: {a: {type: attention, n_heads: 2}}\n"
        "ffn: {type: gelu, width: 8}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nspec: base.yaml\ntasks: {r: {type: mqar, pairs: 2, keys: 8, values: 8}}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (stack,) = make_plan(load_study(tmp_path / "mine.yaml")).stacks
    assert stack.label == "base"
    assert stack.attention == 1.0
