"""`hybridzoo study run`: which folders it takes, and what it says of trials that fail."""

import json

import pytest

from hybridzoo import studies
from hybridzoo.studies import Run
from hybridzoo.studies.pool import WorkerStartError
from hybridzoo.studies.results import read_result, write_result
from hybridzoo.studies.runner import Stopped

STUDY = """name: mine
spec:
  d_model: 16
  mixers: {m: {type: gla, n_heads: 2, head_dim: 8}, a: {type: attention, n_heads: 2}}
  layers: m
  ffn: {type: swiglu, width: 16}
stacks: {recurrent: {layers: m}, softmax: {layers: a}}
tasks:
  recall: {type: mqar, pairs: 4, keys: 8, values: 8, examples: 4}
train: {steps: 2, batch_size: 2}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def ends_with(monkeypatch):
    """Let the study end with these trials finished and failed, or with this error, and training never begin."""

    def install(finished=0, failed=(), error=None):
        def run_study(study, folder, **options):
            if error is not None:
                raise error
            return Run(folder, finished, 0, tuple(failed), (), 1.0)

        def write_report(folder):
            return folder / "report.html"

        monkeypatch.setattr(studies, "run_study", run_study)
        monkeypatch.setattr(studies, "write_report", write_report)

    return install


def test_where_every_trial_fails_the_errors_are_said_and_no_report_is_promised(run, study, ends_with):
    failed = [(f"stack · recall · seed {n}", f"ValueError: {n % 5}") for n in range(10)]
    ends_with(failed=failed)
    result = run("study", "run", study, "--out", "runs/x", ok=False)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: 10 trials failed:\n  ValueError: 0\n  ValueError: 1\n  ValueError: 2\n  and 2 more\n"
        "no report was written, and runs/x/trials holds each one's error; the same command tries them again\n"
    )
    assert "report" not in result.stdout


def test_one_finished_trial_among_many_failures_has_a_report(run, study, ends_with):
    ends_with(finished=1, failed=[(str(n), "ValueError: no") for n in range(3)])
    result = run("study", "run", study, "--out", "runs/x", ok=False)
    assert "report: runs/x/report.html" in result.stdout
    assert "3 trials failed:\n  ValueError: no\nthe report shows them" in result.stderr


def test_a_trained_model_s_folder_takes_no_study(run, study):
    for name in ("model.safetensors", "run.json"):
        folder = study.parent / "runs" / name.partition(".")[0]
        folder.mkdir(parents=True)
        (folder / name).touch()
        result = run("study", "run", study, "--out", folder, ok=False)
        assert result.exit_code == 2
        assert "holds a trained model; give the study a folder of its own with --out" in result.stderr
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_folder_that_another_process_runs_a_study_in_is_refused_plainly(run, study):
    fcntl = pytest.importorskip("fcntl")
    folder = study.parent / "runs" / "busy"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("study", "run", study, "--out", folder, ok=False)
    assert result.exit_code == 2
    assert "another process is running a study in this folder" in result.stderr
    assert "RuntimeError" not in result.stderr


def test_another_study_does_not_take_a_run_s_folder(run, study):
    run("study", "run", study, "--processes", "0", "--out", "runs/x")
    result = run("study", "run", study, "name=other", "--processes", "0", "--out", "runs/x", ok=False)
    assert result.exit_code == 2
    assert "runs/x: holds a run of the study 'mine', so 'other' needs a folder of its own" in result.stderr


def test_a_worker_that_cannot_start_is_a_failure(run, study, ends_with):
    ends_with(error=WorkerStartError("a worker process could not start"))
    assert run("study", "run", study, ok=False).exit_code == 1


def test_a_study_that_fails_for_want_of_a_gpu_names_the_key(run, study, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("study", "run", study, "train.device=cuda", ok=False)
    assert result.exit_code == 2
    assert result.stderr.endswith("error: train.device: 'cuda' is asked for, but torch sees no GPU here\n")


def test_an_interrupted_study_says_it_once(run, study, ends_with):
    ends_with(error=Stopped())
    result = run("study", "run", study, ok=False)
    assert (result.exit_code, result.stderr) == (130, "")


def test_where_every_trial_fails_no_trials_are_counted(run, study, ends_with):
    ends_with(failed=[("s", "ValueError: no")])
    assert run("study", "run", study, ok=False).stdout == ""


def test_a_report_of_a_part_says_on_the_terminal_what_is_missing(run, study):
    run("study", "run", study, "seeds=[0, 1, 2]", "--processes", "0")
    assert run("study", "report", "runs/mine").stderr == ""
    files = sorted((study.parent / "runs" / "mine" / "trials").iterdir())
    files[0].unlink()
    files[1].write_text("{")
    result = read_result(files[2])
    write_result(files[2], {**result, "status": "failed", "metrics": {}, "error": "ValueError: no"})
    assert run("study", "report", "runs/mine").stderr == (
        "1 of 6 trials damaged and not used; the next run of the study replaces them\n"
        "1 of 6 trials failed; the next run of the study tries them again\n"
        "1 of 6 trials without a result yet\n"
    )


def test_a_finished_study_says_where_its_report_is(run, study):
    done = json.loads(run("study", "run", study, "--processes", "0", "--json").stdout)
    assert (done["finished"], done["failed"]) == (2, {})
    assert done["report"] == "runs/mine/report.html"
