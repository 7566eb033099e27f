"""Estimates: the arithmetic from a few timed steps to a whole study, and that what is timed is what will run."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.architectures import Spec, build_model
from hybridzoo.studies import Execution, StudyTask, make_plan, preview_study, run_study, study_from
from hybridzoo.studies.display import Display
from hybridzoo.studies.engines import Here
from hybridzoo.studies.estimate import (
    UNKNOWN,
    TrialCost,
    _from_the_ends,
    clock_time,
    estimate,
    scaled,
    scaling_error,
    total,
)
from hybridzoo.studies.plan import trained_sizes
from hybridzoo.studies.probe import (
    Probe,
    ProbeJob,
    _Counting,
    _evaluations,
    _mean_and_spread,
    _Sample,
    kind_of,
    run_probe,
)
from hybridzoo.studies.tasks import build_task
from hybridzoo.studies.trial import Job
from hybridzoo.training import TrainConfig
from hybridzoo.training.graph import WARM

TASK = {"type": "mqar", "pairs": 4, "keys": 8, "values": 4, "examples": 8, "quick_examples": 4}
STUDY = {
    "name": "small",
    "spec": {
        "d_model": 8,
        "mixers": {"a": {"type": "attention", "n_heads": 1}, "d": {"type": "delta_net", "n_heads": 1, "head_dim": 8}},
        "ffn": {"type": "gelu", "width": 8},
    },
    "stacks": {"attention": {"layers": "a"}, "delta": {"layers": "d"}},
    "seeds": [0, 1],
    "tasks": {"recall": {**TASK, "train": {"steps": 40, "batch_size": 2, "eval_every": 10}}},
}


class Echo(StudyTask):
    """A task with no data of its own, for evaluations that are made up."""

    vocab_size = 13


positive = st.floats(0.01, 100)


@given(st.lists(positive, min_size=1, max_size=30), st.integers(1, 40))
def test_the_clock_is_between_a_perfect_sharing_and_one_after_another(seconds, width):
    clock = clock_time(seconds, width)
    assert clock >= max(max(seconds), sum(seconds) / width) * (1 - 1e-9)
    # Graham's bound on handing out jobs in any order.
    assert clock <= sum(seconds) / width + max(seconds) * (1 - 1 / width) + 1e-9


def test_the_clock_counts_jobs_in_their_order():
    assert clock_time([3, 1, 1, 1], 2) == 3
    assert clock_time([1, 1, 1, 3], 2) == 4
    assert clock_time([], 2) == 0


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**9), min_size=2), positive, st.data())
def test_where_time_is_in_proportion_to_flops_scaling_is_exact(flops, rate, data):
    kinds = {name: ("one task", count) for name, count in flops.items()}
    known = data.draw(st.sets(st.sampled_from(sorted(flops)), min_size=1))
    times = {name: rate * flops[name] for name in known}
    assert scaled(kinds, times) == pytest.approx({name: rate * count for name, count in flops.items()})
    assert scaling_error(kinds, times) == pytest.approx(0 if len(known) > 2 else UNKNOWN)


def test_a_kind_is_scaled_from_its_own_task_and_a_known_one_not_at_all():
    kinds = {"a": ("short", 10), "b": ("short", 20), "c": ("long", 10), "d": ("long", 40)}
    assert scaled(kinds, {"a": 1.0, "c": 7.0}) == {"a": 1.0, "b": 2.0, "c": 7.0, "d": 28.0}
    assert scaled(kinds, {"a": 1.0})["d"] == 4.0
    assert scaled(kinds, {}) == {}
    # c is said by d to take 10, a by b 2, b by a 2, d by c 28.
    assert scaling_error(kinds, {"a": 1.0, "b": 4.0, "c": 7.0, "d": 40.0}) == pytest.approx(
        (1 + 0.5 + 3 / 7 + 12 / 40) / 4
    )
    assert scaling_error(kinds, {"a": 1.0, "b": 4.0}) == 1.0
    assert scaling_error(kinds, {"a": 1.0, "b": 2.0}) == UNKNOWN


@given(st.integers(1, 60))
def test_the_first_kinds_timed_are_the_ends_and_none_is_left_out(count):
    order = _from_the_ends([str(i) for i in range(count)])
    assert sorted(order, key=int) == [str(i) for i in range(count)]
    assert set(order[:2]) == {"0", str(count - 1)}


def test_the_first_step_is_not_timed_and_the_rest_say_how_far_apart_they_are():
    assert _mean_and_spread([9.0, 1.0, 3.0], warm=1) == (2.0, 0.5)
    assert _mean_and_spread([9.0], warm=1) == (9.0, 0.0)


@pytest.mark.parametrize("curriculum", [[], [{"pairs": 1, "steps": 20}]])
def test_steps_that_are_timed_of_a_graph_are_replays(curriculum):
    """A graph runs its first steps of each shape as they are, and captures at the next."""
    task = build_task({**TASK, "curriculum": curriculum})
    config = TrainConfig(steps=40, batch_size=2, device="cuda", graph=True)
    sample, seen = _Sample(task, config), {}
    for step in range(len(sample.steps)):
        shape = sample.batch(step, 2, torch.Generator().manual_seed(0)).ids.shape
        seen[shape] = seen.get(shape, 0) + 1
        assert step < sample.warm or seen[shape] > WARM + 1
    assert len(seen) == (2 if curriculum else 1)
    assert len(sample.steps) - sample.warm >= 3


def test_a_study_s_time_is_its_trials_and_its_error_their_own():
    plan = make_plan(study_from(STUDY))
    probes = {"attention": Probe(10.0, 0.1, 0.2, (), 1.0)}
    costs = [
        TrialCost(trial, 1, 100, 10.0 if trial.stack == "attention" else 30.0, trial.stack == "attention")
        for trial in plan.trials
    ]
    whole = total(costs, 1, probes, scaling=0.6)
    assert whole.seconds == 80.0
    assert whole.error == pytest.approx((20 * 0.2 + 60 * 0.6) / 80)
    assert (whole.flops, whole.kinds, whole.timed) == (400, 2, 1)
    assert str(whole) == (
        "about 1 min 20 s (± 50 %) for 4 trials: timed a few steps of 1 of 2 kinds, the others by their FLOPs"
    )
    assert total(costs, 2, probes, 0.6).seconds == clock_time([10, 30, 10, 30], 2)
    unscored = {"attention": Probe(10.0, 0.1, 0.2, ("evaluations", "compilation"), 1.0)}
    assert "; without evaluations and compilation, which could not be timed" in str(total(costs, 1, unscored, 0.6))


def test_nothing_timed_is_said_to_be_unknown():
    plan = make_plan(study_from(STUDY))
    whole = total([TrialCost(trial, 1, 100) for trial in plan.trials], 1, {}, 0.5)
    assert whole.seconds is None
    assert "no time could be estimated" in str(whole)


def test_seeds_and_rates_take_as_long_and_other_steps_do_not():
    plan = make_plan(study_from(STUDY))
    first, _, other_seed, _ = plan.trials
    assert kind_of(first) == kind_of(other_seed)
    longer = make_plan(study_from({**STUDY, "train": {"weight_decay": 0.5}})).trials[0]
    assert kind_of(first) != kind_of(longer)


def test_a_trial_trains_on_the_tokens_that_are_counted():
    task, config = build_task({**TASK, "curriculum": [{"pairs": 1, "steps": 5}]}), TrainConfig(steps=10, batch_size=4)
    generator = torch.Generator().manual_seed(3)
    seen = sum(task.batch(step, 4, generator).ids.numel() for step in range(10))
    assert trained_sizes(task, config)[0] == seen
    plan = make_plan(study_from(STUDY))
    trial = plan.trials[0]
    assert plan.tokens == {"recall": 40 * 2 * 12}
    assert plan.flops(trial) == plan.stacks[0].train_flops["recall"] * 960


def test_an_evaluation_is_counted_by_the_tokens_it_asks_about():
    task = build_task({**TASK, "levels": [2]})
    counting = _Counting(task.vocab_size)
    task.evaluate(counting, torch.device("cpu"))
    assert counting.tokens == {12: 8 * 12, 6: 8 * 6}


def test_a_task_that_asks_for_more_than_logits_or_takes_long_is_timed_without_its_evaluations():
    class Slow(Echo):
        def evaluate(self, model, device, quick=False):
            for _ in range(100):
                time.sleep(0.01)
                model(torch.zeros(1, 4, dtype=torch.long))
            return {"accuracy": 1.0}

    class Curious(Echo):
        def evaluate(self, model, device, quick=False):
            return {"accuracy": model.generate()}

    spec = Spec.from_dict(make_plan(study_from(STUDY)).trials[0].spec, "spec")
    ids = torch.zeros(2, 6, dtype=torch.long)
    for task in (Slow(None), Curious(None)):
        start = time.monotonic()
        found = _evaluations(build_model(spec), task, spec, ids, TrainConfig(device="cpu"), limit=0.05)
        assert found == (None, None)
        assert time.monotonic() - start < 5


def test_an_evaluation_is_timed_warm_and_in_the_precision_that_it_will_run_in():
    trial = make_plan(study_from(STUDY)).trials[0]
    spec, task = Spec.from_dict(trial.spec, "spec"), build_task(TASK)
    model, precisions = build_model(spec), []

    def first_is_slow(*_):
        precisions.append(torch.is_autocast_enabled("cpu"))
        time.sleep(0.5 if len(precisions) == 1 else 0.0)

    model.register_forward_pre_hook(first_is_slow)
    config = TrainConfig(device="cpu", amp="bf16")
    quick, full = _evaluations(model, task, spec, torch.zeros(2, 12, dtype=torch.long), config, limit=5.0)
    # 8 sequences of 12 tokens at 0.5 s for two of them would be two seconds.
    assert quick is not None
    assert full is not None
    assert quick < full < 1.0
    assert all(precisions)


def test_long_sequences_are_not_priced_by_the_overhead_of_short_ones():
    class Long(Echo):
        def evaluate(self, model, device, quick=False):
            model(torch.zeros(1, 12 if quick else 3072, dtype=torch.long))
            return {"accuracy": 1.0}

    spec = Spec.from_dict(make_plan(study_from(STUDY)).trials[0].spec, "spec")
    model = build_model(spec)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    quick, full = _evaluations(
        model, Long(None), spec, torch.zeros(2, 12, dtype=torch.long), TrainConfig(device="cpu"), 8
    )
    assert quick is not None
    assert full is not None
    assert quick < full < 1.0  # 0.02 s for 24 tokens would make 2.56 s of 3,072


def test_a_probe_of_a_trial_runs_its_steps_and_leaves_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    trial = make_plan(study_from(STUDY)).trials[0]
    probe = run_probe(ProbeJob(Job(trial), limit=10.0), print)
    assert torch.equal(torch.rand(2), expected)
    assert probe.without == ()
    assert probe.seconds > 40 * probe.step > 0


def test_kinds_are_timed_within_the_time_there_is_and_each_once():
    plan = make_plan(study_from(STUDY))
    flops = {trial.key: plan.flops(trial) for trial in plan.trials}
    whole = estimate(Here(1), plan.trials, flops, seconds=60)
    assert (whole.kinds, whole.timed) == (2, 2)
    assert len({cost.seconds for cost in whole.costs}) == 2  # seeds share their kind's time
    hurried = estimate(Here(1), plan.trials, flops, seconds=1e-9)
    assert hurried.timed == 1
    assert hurried.seconds is not None


def test_a_stack_that_cannot_be_timed_stops_neither_the_estimate_nor_the_run(tmp_path):
    study = study_from({**STUDY, "stacks": {"fine": {"layers": "a"}, "burst": {"layers": "a", "init.std": 1e39}}})
    preview = preview_study(study, tmp_path, Execution(engine="here"), display=Display())
    assert preview.estimate is not None
    assert {cost.trial.stack: cost.timed for cost in preview.estimate.costs} == {"fine": True, "burst": False}
    assert run_study(study, tmp_path, Execution(engine="here"), display=Display()).finished == 2


def test_a_preview_writes_nothing_and_lists_what_is_left(tmp_path):
    study = study_from(STUDY)
    preview = preview_study(study, tmp_path / "run", Execution(engine="here"), display=Display())
    assert not (tmp_path / "run").exists()
    assert preview.estimate is not None
    assert len(preview.estimate.costs) == 4
    done = run_study(study, tmp_path / "run", Execution(engine="here"), display=Display())
    assert done.estimated is not None
    again = preview_study(study, tmp_path / "run", Execution(engine="here"), display=Display())
    assert (again.estimate, again.reused) == (None, 4)
    assert run_study(study, tmp_path / "run", Execution(engine="here"), display=Display()).estimated is None
