"""`hybridzoo study run`: which folders it takes, and what it says of trials that fail."""

import json
import shutil

import pytest

from hybridzoo import studies
from hybridzoo.studies import Run
from hybridzoo.studies.engines import WorkerStartError
from hybridzoo.studies.results import ResultFiles, read_result, write_result
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
        def run_study(study, folder, execution):
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
    said = "train.device: 'cuda' is asked for, but torch sees no GPU here (for tasks.recall)\n"
    assert result.stderr.endswith(f"error: override 'train.device=cuda': {said}")
    own = "tasks.recall.train.device=cuda"
    assert run("study", "run", study, own, ok=False).stderr.endswith(f"error: override '{own}': {said}")
    study.write_text(study.read_text().replace("batch_size: 2}", "batch_size: 2, device: cuda}"))
    assert run("study", "run", study, ok=False).stderr.endswith(f"error: {study}: {said}")


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_ray_that_is_not_installed_is_missed_before_anything_is_planned(run, study, monkeypatch, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("study", "run", study, "--engine", "ray", *words, ok=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: this needs ray")
    assert not (study.parent / "runs").exists()


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


def test_a_report_reads_each_result_once(run, study, monkeypatch):
    run("study", "run", study, "--processes", "0")
    read = []
    once = ResultFiles.read
    monkeypatch.setattr(ResultFiles, "read", lambda files, key: read.append(key) or once(files, key))
    run("study", "report", "runs/mine")
    assert len(read) == len(set(read)) == 2


def test_a_finished_study_says_where_its_report_is(run, study):
    done = json.loads(run("study", "run", study, "--processes", "0", "--json").stdout)
    assert (done["finished"], done["failed"]) == (2, {})
    assert done["report"] == "runs/mine/report.html"


def test_two_studies_are_set_side_by_side_on_the_terminal_as_data_and_as_a_page(run, study):
    run("study", "run", study, "--processes", "0", "--out", "runs/x")
    run("study", "run", study, "name=other", "train.lr=0.1", "--processes", "0", "--out", "runs/y")
    shown = run("study", "compare", "runs/x", "runs/y").stdout
    assert "recurrent" in shown
    assert "settings that differ: tasks.recall.train.lr" in shown
    page = study.parent / "runs" / "x-and-y.html"
    assert shown.endswith("page: runs/x-and-y.html\n")
    assert page.read_text().startswith("<!doctype html>")
    data = json.loads(run("study", "compare", "runs/x", "runs/y", "--json").stdout)
    assert data["studies"] == ["mine", "other"]
    assert {pair["stack"] for pair in data["pairs"]} == {"recurrent", "softmax"}
    result = run("study", "compare", "runs/x", "runs/none", ok=False)
    assert result.exit_code == 2
    assert "runs/none: no study.json here" in result.stderr


def test_a_study_that_was_kept_is_compared_and_reported_elsewhere(run, study):
    run("study", "run", study, "--processes", "0", "--out", "runs/x")
    kept = study.parent / "kept"
    shutil.copytree(study.parent / "runs" / "x" / "tables", kept / "tables")
    shutil.copy(study, kept)
    shown = run("study", "compare", "kept", "runs/x")
    assert "The first study was kept as study.yaml and tables" in shown.stderr
    assert shown.stdout.endswith("page: kept-and-x.html\n")
    assert {
        pair["difference"] for pair in json.loads(run("study", "compare", "kept", "runs/x", "--json").stdout)["pairs"]
    } == {0}
    assert run("study", "report", "kept", "--out", "again").stdout == "again/report.html\n"
    for words, said in (
        (("kept",), "kept: holds a study that was kept without its trials, and a report would replace"),
        (("kept", "--out", "runs/x"), "runs/x: holds a study, whose report would be replaced"),
        (("none",), "none: no study.json here, as a run has, and no study.yaml beside tables/trials.csv"),
    ):
        result = run("study", "report", *words, ok=False)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_label_keeps_its_words_in_a_narrow_table(run, study):
    study.write_text(study.read_text().replace("recurrent:", "recurrent-with-a-name-of-30-ch:"))
    run("study", "run", study, "--processes", "0", "--out", "runs/x")
    shown = run("study", "compare", "runs/x", "runs/x").stdout
    assert "recurrent-with-a-name-of-30-ch" in shown


def test_a_dry_run_lists_every_trial_with_its_cost_and_trains_none(run, study):
    words = ("study", "run", study, "seeds=[0, 1]", "--engine", "here", "--dry-run")
    shown = run(*words).stdout
    assert not (study.parent / "runs").exists()
    for title in ("recurrent · recall · seed 0", "softmax · recall · seed 1"):
        assert title in shown
    assert " FLOPs; about " in shown.splitlines()[-2]
    assert shown.splitlines()[-1] == "no results are there yet"
    data = json.loads(run(*words, "--json").stdout)
    assert [(one["stack"], one["seed"]) for one in data["trials"]] == [
        ("recurrent", 0),
        ("softmax", 0),
        ("recurrent", 1),
        ("softmax", 1),
    ]
    assert data["flops"] == sum(one["flops"] for one in data["trials"])
    assert data["seconds"] == pytest.approx(sum(one["seconds"] for one in data["trials"]))
    assert all(one["parameters"] > 0 and one["timed"] for one in data["trials"])


def test_a_dry_run_of_a_tuned_study_counts_its_pilots(run, study):
    words = ("study", "run", study, "tune={lr: [1e-3, 1e-2]}", "seeds=[0, 1]", "--engine", "here")
    data = json.loads(run(*words, "--dry-run", "--json").stdout)
    assert [one["pilot"] for one in data["trials"]] == [True] * 4 + [False] * 2
    assert {one["lr"] for one in data["trials"] if one["pilot"]} == {1e-3, 1e-2}
    shown = run(*words, "--dry-run").stdout
    assert "pilot: recurrent" in shown
    assert "After the pilots, each stack trains with its own best rate." in shown
    run(*words)
    assert run(*words, "--dry-run").stdout == "nothing to run: 6 results are there already\n"


def test_a_run_says_what_it_will_take_before_it_starts_and_what_was_expected_after(run, study):
    done = run("study", "run", study, "--engine", "here")
    before = done.stderr.partition("[1/2]")[0]
    assert "for 2 trials: timed a few steps of" in before
    assert "(estimated, with planning: " in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "here", "--processes", "3"), "--engine here runs one trial at a time, in this process, not 3"),
        (("--engine", "processes", "--processes", "0"), "0 means this process, which is --engine here"),
        (("--engine", "ray", "--processes", "0"), "0 means this process, which is --engine here and not ray"),
    ],
)
def test_an_engine_that_cannot_be_had_as_asked_for_is_refused_plainly(run, study, words, said):
    result = run("study", "run", study, *words, ok=False)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Error" not in result.stderr


@pytest.mark.parametrize("name", ["carve-tiny", "stack.yaml"])
def test_a_spec_is_no_study_and_is_said_to_be_one(run, tmp_path, name):
    (tmp_path / "stack.yaml").write_text("d_model: 16\nvocab_size: 256\nlayers: gla[n_heads=2]\n")
    result = run("study", "run", name, ok=False)
    assert result.exit_code == 2
    assert f"'{name}' is a spec, one stack: use `hybridzoo train {name}`" in result.stderr
