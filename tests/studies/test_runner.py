"""A study goes on where it stopped, however it stopped, and one bad trial or file costs no other."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from small_study import DIVERGING, SMALL, run, scores

from hybridzoo.architectures import account, load_spec
from hybridzoo.mixers import SpecError
from hybridzoo.studies import code as code_module
from hybridzoo.studies import (
    make_plan,
    read_findings,
    read_plan,
    read_trials,
    study_from,
    write_report,
)
from hybridzoo.studies import rounds as rounds_module
from hybridzoo.studies import trial as trial_module
from hybridzoo.studies.display import LiveDisplay, PlainDisplay, format_seconds
from hybridzoo.studies.results import read_result
from hybridzoo.studies.tasks import Mqar
from hybridzoo.training.lock import only_one


def test_a_second_call_trains_nothing_and_changes_nothing(folder, finished):
    before = {path: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    again, display = run(SMALL, folder)
    assert (again.finished, again.reused) == (0, 4)
    assert not display.ran
    assert {path: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()} == before
    assert scores(folder) == finished


def test_workers_and_this_process_find_the_same_scores(tmp_path, finished):
    done, _ = run(SMALL, tmp_path, processes=2, threads=1)
    assert done.finished == 4
    assert scores(tmp_path).keys() == finished.keys()
    for trial, metrics in scores(tmp_path).items():
        assert metrics == pytest.approx(finished[trial])


def test_a_run_and_its_report_say_what_results_they_leave_out(folder):
    def left_out(**words):
        _, display = run({**SMALL, **words}, folder)
        return [note for note in display.notes if note.startswith("left out")], read_findings(folder).others

    assert left_out() == ([], 0)
    (said,), number = left_out(seeds=[0])
    assert number == 2
    assert said.endswith("settings, seeds or code: 2 results in this folder")
    assert "2 results in the folder left out" in write_report(folder).read_text(encoding="utf-8")
    assert left_out() == ([], 0)


def test_pilots_are_no_results_of_other_settings(tmp_path):
    tune = {"lr": [1e-2, 2e-2], "seeds": [0]}
    for _ in range(2):
        _, display = run({**SMALL, "tune": tune}, tmp_path)
        assert read_findings(tmp_path).others == 0
        assert not any(note.startswith("left out") for note in display.notes)


def test_results_of_other_code_are_not_reused(folder, monkeypatch):
    monkeypatch.setattr(code_module, "_zoo_digest", lambda: "of other code")
    done, _ = run(SMALL, folder)
    assert (done.finished, done.reused) == (4, 0)
    assert len(list((folder / "trials").glob("*.json"))) == 8  # nothing is lost


def test_only_what_is_new_in_a_changed_study_is_trained(folder):
    more = {**SMALL, "seeds": [0, 1, 2]}
    done, display = run(more, folder)
    assert (done.finished, done.reused) == (2, 4)
    assert display.ran == ["attention · recall · seed 2", "delta · recall · seed 2"]


def test_a_failing_trial_is_recorded_with_its_error_and_the_rest_run(tmp_path):
    done, _ = run(DIVERGING, tmp_path)
    assert done.finished == 2
    assert [title for title, _ in done.failed] == ["burst · recall · seed 0", "burst · recall · seed 1"]
    assert all("DivergedError: step 1 of 4" in error for _, error in done.failed)
    results, _ = read_trials(tmp_path, read_plan(tmp_path))
    failed = [result for result in results if result["status"] == "failed"]
    assert len(failed) == 2
    assert "Traceback" in failed[0]["traceback"]


@pytest.mark.parametrize(
    ("scored", "said"),
    [
        ({"accuracy": float("nan")}, "DivergedError: step 2 of 4: the score 'accuracy' is nan, not a finite number"),
        ({"accuracy": 0.5, "bits": float("inf")}, "DivergedError: step 2 of 4: the score 'bits' is inf"),
        ({"bits": 1.0}, "NoScoreError: step 4 of 4: the task is shown by the score 'accuracy', but gives: bits"),
        ({}, "but gives: none"),
    ],
    ids=["nan", "infinite", "another", "none"],
)
def test_a_score_that_cannot_be_kept_fails_its_trial_and_says_which_at_which_step(tmp_path, monkeypatch, scored, said):
    evaluate = Mqar.evaluate

    def of_the_deep(task, model, device, quick=False):
        deep = len([name for name, _ in model.named_parameters()]) > 20
        return dict(scored) if deep else evaluate(task, model, device, quick)

    monkeypatch.setattr(Mqar, "evaluate", of_the_deep)
    data = {**SMALL, "stacks": {"bad": {"layers": "a*4"}, "fine": {"layers": "a"}}, "seeds": [0]}
    done, _ = run(data, tmp_path, display=PlainDisplay(io.StringIO()))
    assert (done.finished, len(done.failed)) == (1, 1)
    assert said in done.failed[0][1]
    assert len(read_findings(tmp_path).failed) == 1


def test_a_result_that_cannot_be_written_fails_its_trial_alone(tmp_path, monkeypatch):
    made = rounds_module.run_job

    def broken(job, send):
        result = made(job, send)
        return {**result, "environment": {"cores": float("nan")}} if job.trial.stack == "delta" else result

    monkeypatch.setattr(rounds_module, "run_job", broken)
    done, display = run(SMALL, tmp_path)
    assert (done.finished, len(done.failed), len(display.ran)) == (2, 2, 4)
    assert all("ValueError: Out of range float values are not JSON compliant" in error for _, error in done.failed)


def test_gates_that_are_no_numbers_cost_no_trial_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "gate_statistics", lambda *_: [{"mean": float("nan")}])
    done, _ = run(SMALL, tmp_path)
    assert done.finished == 4
    results, _ = read_trials(tmp_path, read_plan(tmp_path))
    assert all(one["gates"] == [] and one["gates_error"].startswith("ValueError") for one in results)


def test_failed_trials_are_tried_again_unless_told_otherwise(tmp_path):
    run(DIVERGING, tmp_path)
    left, display = run(DIVERGING, tmp_path, retry_failed=False)
    assert (left.finished, left.reused, len(left.failed)) == (0, 2, 2)
    assert not display.ran
    again, display = run(DIVERGING, tmp_path)
    assert len(again.failed) == 2
    assert display.ran == ["burst · recall · seed 0", "burst · recall · seed 1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\x00" * 50),
        lambda path: path.write_text(path.read_text().replace('"accuracy": ', '"accuracy": 1')),
    ],
    ids=["cut short", "empty", "not text", "another score"],
)
def test_a_damaged_result_is_named_kept_aside_and_run_again(folder, finished, damage):
    victim = next((folder / "trials").glob("delta--recall--seed1--*.json"))
    damage(victim)
    damaged = victim.read_bytes()
    findings = read_findings(folder)
    assert len(findings.faults) == 1
    assert victim.name in findings.faults[0]
    assert findings.cells["recall"]["", "delta"].seeds == (0,)
    done, display = run(SMALL, folder)
    assert (done.finished, done.reused) == (1, 3)
    assert any(note.startswith("will be run again") and victim.name in note for note in display.notes)
    assert victim.with_suffix(".corrupt").read_bytes() == damaged
    assert scores(folder) == finished


def test_a_result_of_another_trial_under_this_name_is_not_taken_for_its_own(folder):
    one, two = (next((folder / "trials").glob(f"delta--recall--seed{seed}--*.json")) for seed in (0, 1))
    two.write_bytes(one.read_bytes())
    assert "the result of another trial" in read_findings(folder).faults[0]


def test_leftovers_of_a_killed_writer_go_and_the_plan_is_written_anew(folder):
    (folder / "trials" / ".half.json.abc.tmp").write_text('{"sta')
    (folder / "study.json").write_text('{"study": ')
    with pytest.raises(SpecError, match=r"study\.json: cannot be read .*running the study again"):
        read_plan(folder)
    done, _ = run(SMALL, folder)
    assert done.reused == 4
    assert not list((folder / "trials").glob(".*.tmp"))
    assert read_plan(folder) == make_plan(study_from(SMALL))


def test_a_folder_of_another_study_is_left_alone(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SpecError, match=r"run: holds a run of the study 'small', so 'other' needs a folder of its own"):
        run({**SMALL, "name": "other"}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_specs_of_stacks_that_are_gone_go_and_what_else_is_there_stays(folder):
    (folder / "specs" / "mine.yaml").write_text("a note\n")
    run({**SMALL, "stacks": {"attention": {"layers": "a"}}}, folder)
    assert sorted(path.name for path in (folder / "specs").iterdir()) == ["attention.yaml", "mine.yaml"]


def test_stacks_whose_labels_look_alike_in_a_file_name_keep_a_spec_each(tmp_path):
    run({**SMALL, "stacks": {"a+b": {"layers": "a"}, "a b": {"layers": "a*2"}}, "seeds": [0]}, tmp_path)
    specs = [load_spec(path) for path in (tmp_path / "specs").iterdir()]
    assert sorted(len(spec.layers) for spec in specs) == [1, 2]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(SpecError, match=r"no study\.json here"):
        write_report(tmp_path)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with only_one(_made(tmp_path), "running a study"), pytest.raises(RuntimeError, match="another process is running"):
        run(SMALL, tmp_path)
    assert run(SMALL, tmp_path)[0].finished == 4


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_every_stack_is_saved_as_a_spec_that_builds_the_same_model(folder):
    plan = read_plan(folder)
    for stack in plan.stacks:
        spec = load_spec(folder / "specs" / f"{stack.label}.yaml")
        assert account(spec).parameters == stack.parameters["recall"]


def test_a_result_says_what_it_was_made_with(folder):
    made = read_result(next((folder / "trials").glob("*.json")))["environment"]
    assert made["torch"] == torch.__version__
    assert made["device"] == "cpu"
    assert made["threads"] >= 1
    assert {"hybridzoo", "commit", "python", "device_name", "cores"} <= made.keys()


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(SMALL, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_plain_output_is_one_line_a_trial_without_control_codes(tmp_path):
    text = io.StringIO()
    run(SMALL, tmp_path, display=PlainDisplay(text))
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert all(" % in " in line for line in lines if line.startswith("["))
    text = io.StringIO()
    run(SMALL, tmp_path, display=PlainDisplay(text))
    assert "4 of 4 trials are already finished" in text.getvalue()


def test_a_terminal_sees_bars_and_every_trial_that_ended(tmp_path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140, height=30)
    run(DIVERGING, tmp_path, display=LiveDisplay(console))
    shown = text.getvalue()
    assert "\x1b[" in shown
    assert "all trials" in shown
    assert "4/4" in shown
    assert shown.count("✓") == 2
    assert shown.count("FAILED: DivergedError") == 2


def test_seconds_are_said_as_people_say_them():
    said = [format_seconds(seconds) for seconds in (0.4, 59.4, 59.6, 200, 3600, 7500)]
    assert said == ["0 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min"]
