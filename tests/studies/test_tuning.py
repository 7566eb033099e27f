"""Learning rates: every stack gets the best of the grid, pilots are trials, and one that diverges is an answer."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.mixers import SpecError
from hybridzoo.studies import (
    Execution,
    make_plan,
    preview_study,
    read_plan,
    read_trials,
    read_tuned,
    rounds,
    run_study,
    runner,
    study_from,
    write_report,
)
from hybridzoo.studies.display import Display
from hybridzoo.studies.engines import Here
from hybridzoo.studies.results import CorruptResultError
from hybridzoo.studies.tuning import choose, pilots, with_rates

RATES = [1e-3, 1e-2, 3e-2]
STUDY = {
    "name": "tuned",
    "spec": {"d_model": 8, "mixers": {"a": {"type": "attention", "n_heads": 1}}, "ffn": {"type": "gelu", "width": 8}},
    "stacks": {"one": {"layers": "a"}, "two": {"layers": "a*2"}},
    "seeds": [0, 1],
    "tune": {"lr": RATES, "seeds": [0]},
    "tasks": {
        "recall": {
            "type": "mqar",
            "pairs": 2,
            "keys": 4,
            "values": 4,
            "examples": 8,
            "train": {"steps": 2, "batch_size": 2},
        }
    },
}


class Recorder(Display):
    def __init__(self):
        self.ran = []

    def ended(self, trial, result):
        self.ran.append((trial.stack, trial.seed, trial.train["lr"]))


def run(folder, data=STUDY, **words):
    display = Recorder()
    execution = Execution(engine="here", **words)
    return run_study(study_from(data), folder, execution, display=display, estimate=0), display.ran


def made_up(plan, score):
    """Results of all pilots, each with the score that `score(trial)` gives; None is a failure."""
    results = {}
    for trial in pilots(plan):
        value = score(trial)
        results[trial.key] = (
            {"status": "failed", "metrics": {}, "error": "DivergedError: step 1"}
            if value is None
            else {"status": "finished", "metrics": {"accuracy": value}, "error": ""}
        )
    return results


PLAN = make_plan(study_from({**STUDY, "tune": {"lr": RATES, "seeds": [0, 5]}}))


def test_pilots_cross_stacks_rates_and_their_own_seeds():
    found = {(trial.stack, trial.seed, trial.train["lr"], trial.train["seed"]) for trial in pilots(PLAN)}
    assert found == {(stack, seed, rate, seed) for stack in ("one", "two") for seed in (0, 5) for rate in RATES}
    assert pilots(make_plan(study_from({**STUDY, "tune": None}))) == ()


def test_a_pilot_that_stacks_share_has_the_label_of_the_first_as_its_trial_has():
    plan = make_plan(study_from({**STUDY, "stacks": {"first": {"layers": "a*2"}, "again": {"layers": "a a"}}}))
    assert {trial.stack for trial in pilots(plan)} == {trial.stack for trial in plan.distinct} == {"first"}


@given(st.lists(st.none() | st.floats(0, 1), min_size=6, max_size=6))
def test_the_best_mean_wins_the_smaller_rate_wins_ties_and_divergence_loses(scores):
    by_place = {(seed, rate): scores[3 * i + j] for i, seed in enumerate((0, 5)) for j, rate in enumerate(RATES)}
    chosen = choose(PLAN, made_up(PLAN, lambda trial: by_place[trial.seed, trial.train["lr"]]))
    assert [(one["stack"], one["task"], one["budget"]) for one in chosen] == [
        ("one", "recall", ""),
        ("two", "recall", ""),
    ]
    for one in chosen:
        means = {}
        for rate in RATES:
            pair = [by_place[seed, rate] for seed in (0, 5)]
            means[rate] = None if None in pair else math.fsum(pair) / 2
        assert {float(rate): mean for rate, mean in one["scores"].items()} == means
        best = max((mean for mean in means.values() if mean is not None), default=None)
        assert one["lr"] == min(rate for rate in RATES if means[rate] == best)
        assert one["edge"] == (one["lr"] in (RATES[0], RATES[-1]))


def test_where_less_is_better_the_least_wins():
    from dataclasses import replace

    plan = replace(PLAN, shown={"recall": replace(PLAN.shown["recall"], maximise=False)})
    chosen = choose(plan, made_up(plan, lambda trial: abs(trial.train["lr"] - 1e-2)))
    assert [(one["lr"], one["edge"]) for one in chosen] == [(1e-2, False)] * 2


def test_trials_train_with_their_own_stack_s_rate_and_all_else_stays():
    best = {"one": 1e-3, "two": 3e-2}
    chosen = choose(PLAN, made_up(PLAN, lambda trial: -abs(trial.train["lr"] - best[trial.stack])))
    plan = with_rates(PLAN, chosen)
    assert {(trial.stack, trial.train["lr"]) for trial in plan.trials} == set(best.items())
    assert [{**trial.train, "lr": 0} for trial in plan.trials] == [{**trial.train, "lr": 0} for trial in PLAN.trials]


def test_a_run_tunes_then_trains_and_a_pilot_with_a_trial_s_seed_is_that_trial(tmp_path):
    done, ran = run(tmp_path)
    assert len(ran) == done.finished == 2 * 3 + 2
    assert [place[:2] for place in ran[6:]] == [("one", 1), ("two", 1)]
    chosen = read_tuned(tmp_path)
    rates = {one["stack"]: one["lr"] for one in chosen}
    plan = read_plan(tmp_path)
    assert all(trial.train["lr"] == rates[trial.stack] for trial in plan.trials)
    results, faults = read_trials(tmp_path, plan)
    assert (len(results), faults) == (4, [])
    means = {rate: mean for rate, mean in chosen[0]["scores"].items() if mean is not None}
    mine = next(one for one in results if (one["stack"], one["seed"]) == ("one", 0))
    assert mine["metrics"]["accuracy"] == means[json.dumps(rates["one"])] == max(means.values())
    again, ran = run(tmp_path)
    assert (again.finished, again.reused, ran) == (0, 8, [])
    assert read_tuned(tmp_path) == chosen


def test_a_run_stopped_among_its_pilots_goes_on_with_the_rest(tmp_path):
    class Impatient(Display):
        ended_trials = 0

        def ended(self, trial, result):
            self.ended_trials += 1
            if self.ended_trials == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study_from(STUDY), tmp_path, Execution(engine="here"), display=Impatient(), estimate=0)
    assert read_tuned(tmp_path) == []
    preview = preview_study(study_from(STUDY), tmp_path, Execution(engine="here"), display=Display())
    assert preview.estimate is not None
    assert (len(preview.pilots), len(preview.estimate.costs), preview.reused) == (2, 4, 4)
    done, ran = run(tmp_path)
    assert (done.finished, done.reused) == (4, 4)
    assert len(ran) == 4
    assert len(read_tuned(tmp_path)) == 2


def test_a_pilot_that_diverges_loses_and_is_not_tried_again(tmp_path):
    data = {**STUDY, "tune": {"lr": [1e-2, 1e30]}, "train": {"warmup": 0, "clip": 0, "schedule": "constant"}}
    done, ran = run(tmp_path, data)
    assert len(ran) == 4 + 2
    assert done.failed == ()
    assert [(one["lr"], one["scores"]["1e+30"]) for one in read_tuned(tmp_path)] == [(1e-2, None)] * 2
    again, ran = run(tmp_path, data)
    assert (again.finished, again.failed, ran) == (0, (), [])


def failing(monkeypatch, fails):
    """Make the trials for which `fails(trial, attempt)` says so run out of memory."""
    made, attempts = rounds.run_job, Counter()

    def run_job(job, send):
        attempts[job.trial.key] += 1
        if fails(job.trial, attempts[job.trial.key]):
            raise MemoryError("too much")
        return made(job, send)

    monkeypatch.setattr(rounds, "run_job", run_job)


def test_a_pilot_that_fails_once_without_diverging_is_run_again_and_counts(tmp_path, monkeypatch):
    failing(monkeypatch, lambda trial, attempt: trial.stack == "two" and attempt == 1)
    done, ran = run(tmp_path, {**STUDY, "seeds": [0]})
    assert (done.finished, done.reused, done.failed) == (6, 0, ())
    assert len(ran) == 6 + 3
    assert all(None not in one["scores"].values() for one in read_tuned(tmp_path))


def test_a_pilot_that_fails_without_diverging_chooses_no_rate_and_is_reported(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, lambda trial, _: trial.stack == "two" and trial.train["lr"] == RATES[1])
        done, ran = run(tmp_path)
    assert done.failed == ((f"two · recall · seed 0 · lr {RATES[1]:g}", "MemoryError: too much"),)
    assert (done.finished, done.reused) == (5 + 1, 0)
    assert [place[:2] for place in ran[6:]] == [("two", 0), ("one", 1)]  # the pilot once more, then trials
    assert [one["stack"] for one in read_tuned(tmp_path)] == ["one"]
    assert {trial.stack for trial in read_plan(tmp_path).trials} == {"one"}
    text = write_report(tmp_path).read_text()
    assert "A pilot failed" in text
    left, ran = run(tmp_path, retry_failed=False)
    assert (left.finished, left.reused, left.failed, ran) == (0, 7, (), [])
    healed, ran = run(tmp_path)
    assert (healed.finished, healed.reused, healed.failed) == (2, 6, ())
    assert [place[:2] for place in ran] == [("two", 0), ("two", 1)]
    assert "A pilot failed" not in write_report(tmp_path).read_text()


def test_a_report_is_written_where_no_stack_has_a_rate(tmp_path, monkeypatch):
    failing(monkeypatch, lambda trial, _: trial.train["lr"] == RATES[1])
    done, _ = run(tmp_path)
    assert (done.finished, len(done.failed)) == (4, 2)
    assert "A pilot failed" in write_report(tmp_path).read_text()


def test_where_every_rate_diverges_no_pilot_is_trained_twice_and_the_failures_are_counted_once(tmp_path):
    data = {**STUDY, "tune": {"lr": [1e29, 1e30]}, "train": {"warmup": 0, "clip": 0, "schedule": "constant"}}
    done, ran = run(tmp_path, data)
    assert len(ran) == len(set(ran)) == 4 + 2
    assert (done.finished, done.reused, len(done.failed)) == (0, 0, 4)
    assert all("DivergedError" in error for _, error in done.failed)
    again, ran = run(tmp_path, data)
    assert {place[1] for place in ran} == {1}
    assert (again.finished, again.reused, len(again.failed)) == (0, 2, 4)  # what failed before is no result


def test_a_damaged_result_of_a_tuned_trial_is_kept_aside_even_where_pilots_come_first(tmp_path):
    data = {**STUDY, "train": {"warmup": 0, "clip": 0, "schedule": "constant"}}
    run(tmp_path, data)
    trial = next(one for one in read_plan(tmp_path).trials if one.seed == 1)
    victim = tmp_path / "trials" / trial.file_name
    victim.write_text("{")
    run(tmp_path, {**data, "tune": {"lr": [*RATES, 1e30], "seeds": [0]}})  # one more, which diverges and so loses
    assert victim.with_suffix(".corrupt").read_text() == "{"
    assert trial.key in {one["key"] for one in read_trials(tmp_path, read_plan(tmp_path))[0]}


@pytest.mark.parametrize(("seeds", "most"), [([0, 1, 2, 3, 4, 5], 10), ([0], 6)])
def test_the_engine_is_as_wide_as_the_larger_of_its_rounds_asks(tmp_path, monkeypatch, seeds, most):
    asked = []

    def start(*_, jobs, **__):
        asked.append(jobs)
        return Here(threads=1)

    monkeypatch.setattr(runner, "make_engine", start)
    run(tmp_path, {**STUDY, "seeds": seeds})
    assert asked == [most]


def test_a_study_that_no_longer_tunes_keeps_no_rates(tmp_path):
    run(tmp_path)
    run(tmp_path, {**STUDY, "tune": None})
    assert read_tuned(tmp_path) == []


def test_a_larger_grid_trains_only_what_is_new(tmp_path):
    run(tmp_path, {**STUDY, "seeds": [0], "tune": {"lr": RATES[:2]}})
    _, ran = run(tmp_path, {**STUDY, "seeds": [0]})
    assert ran == [("one", 0, RATES[2]), ("two", 0, RATES[2])]


def test_rates_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "tuned.json").write_text('[{"stack": 1}]')
    with pytest.raises(CorruptResultError, match=r"tuned\.json: cannot be read .*running the study again"):
        read_tuned(tmp_path)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"lr": [1e-3]}, "study: tune.lr: must be two or more distinct finite rates above 0"),
        ({"lr": [1e-3, 1e-3]}, "study: tune.lr: must be two or more distinct finite rates"),
        ({"lr": [0, 1e-3]}, "study: tune.lr: must be two or more distinct finite rates above 0"),
        ({"lr": [1e-2, 1e-3], "seeds": []}, "study: tune.seeds: must be distinct"),
        ({"lr": [1e-2, 1e-3], "seed": 1}, "did you mean 'seeds'"),
    ],
)
def test_a_grid_that_cannot_be_is_an_error(tune, said):
    with pytest.raises(SpecError, match=said):
        study_from({**STUDY, "tune": tune})
