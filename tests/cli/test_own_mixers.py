"""A user's own mixer on the command line: brought by --import wherever stacks are built, unknown without it."""

import json

import pytest
from own_code import OWN, forgotten

QUICK = ["--steps", "2", "--batch-size", "2", "task.length=32", "task.examples=4", "task.quick_examples=2"]
STUDY = """name: mine
spec:
  d_model: 16
  mixers: {m: {type: mine, n_heads: 2, head_dim: 8, content_chunk: 16, content_rank: 2}}
  layers: m
  ffn: {type: swiglu, width: 16}
tasks:
  recall: {type: mqar, pairs: 4, keys: 8, values: 8, examples: 4}
train: {steps: 2, batch_size: 2}
"""


@pytest.fixture
def own(tiny):
    """A spec whose first mixer is registered by own.py, which lies beside it."""
    folder = tiny.parent
    (folder / "own.py").write_text(OWN.format(name="mine"))
    tiny.write_text(tiny.read_text().replace("type: carve", "type: mine, turns: 5"))
    return folder


def test_own_mixers_are_listed_and_shown(run, own):
    with forgotten():
        assert "CARVE under another name" in run("list", "mine", "--import", "own.py").stdout
    with forgotten():
        assert "mine" in [entry["name"] for entry in json.loads(run("list", "-i", "own.py", "--json").stdout)]
    with forgotten():
        assert "turns=5" in run("show", "mine.yaml", "-i", "own.py").stdout


def test_several_files_may_be_imported(run, own):
    (own / "more.py").write_text(OWN.format(name="yours"))
    with forgotten():
        run("show", "mine.yaml", "layers=c yours[n_heads=2]", "-i", "own.py", "-i", "more.py")


def test_an_own_mixer_trains_and_speaks(run, own):
    (own / "text").mkdir()
    for n in range(8):
        (own / "text" / f"{n}.py").write_text("x = 1\n" * 40)
    with forgotten():
        run("train", "mine.yaml", *QUICK, "task.folder=text", "--out", "runs/own", "-i", "own.py")
    with forgotten():
        run("generate", "runs/own", "-n", "2", "-i", "own.py")
    with forgotten():
        result = run("generate", "runs/own", "-n", "2", ok=False)
    assert result.exit_code == 2
    assert "unknown mixer 'mine'" in result.stderr
    assert "--import" in result.stderr


def test_a_study_of_an_own_mixer_runs_in_worker_processes(run, own):
    (own / "study.yaml").write_text(STUDY)
    with forgotten():
        done = json.loads(run("study", "run", "study.yaml", "-i", "own.py", "--processes", "1", "--json").stdout)
    assert (done["finished"], done["failed"]) == (1, {})


def test_code_that_fails_is_named_with_its_error(run, own):
    (own / "own.py").write_text("1 / 0\n")
    with forgotten():
        result = run("show", "mine.yaml", "--import", "own.py", ok=False)
    assert result.exit_code == 2
    assert result.stderr == "error: own.py:1: ZeroDivisionError: division by zero\n"
