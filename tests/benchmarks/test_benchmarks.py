"""Benchmarks run: the layer's on this machine at tiny sizes, and processes that prepare together measure in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*words: object) -> str:
    places = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_layers_are_timed_and_counted_on_a_cpu(tmp_path: Path) -> None:
    words = ("--small", "--device", "cpu", "--ways", "eager", "--rounds", 2, "--out", tmp_path)
    out = run(BENCHMARKS / "layer.py", *words)
    found = json.loads((tmp_path / "layer.json").read_text())
    assert [result["mixer"] for result in found["results"]] == ["carve", "carve[erase=token]", "gdn2", "kda"]
    for result in found["results"]:
        parts = result["parameters"]
        assert parts.pop("all") == sum(parts.values())
        assert result["ms"]["eager"] > 0
        assert result["mixer"] in out
    assert set(found["carve_over_gdn2"]) == {"parameters", "ms eager"}


OPERATIONS = """
import conv, torch
conv.B, conv.T, conv.H, conv.D = 1, 5, 2, 8
for job in (conv.norm("cpu"), conv.decay("cpu")):
    y = job.sides["pytorch"]()
    assert all(d.shape == x.shape for d, x in zip(torch.autograd.grad(y.sum(), job.leaves), job.leaves, strict=True))
    job.copy(), job.copy_backward()
"""


def test_the_small_operations_run_on_a_cpu() -> None:
    run("-c", OPERATIONS)


REFUSED = """
import triton_backend

def refuse():
    raise RuntimeError("wrong results on this Triton (see #640).\\nUpgrade it")

def fail():
    raise RuntimeError("out of memory")

assert triton_backend.refusal(lambda: None) is None
assert triton_backend.refusal(refuse) == "wrong results on this Triton (see #640). Upgrade it"
try:
    triton_backend.refusal(fail)
except RuntimeError as error:
    print(error)
"""


def test_only_a_backward_that_fla_itself_refuses_is_left_out() -> None:
    assert run("-c", REFUSED).strip() == "out of memory"


TURNS = """
import time
from turns import measured_in_turn

def prepare(name, path):
    if name == "bad":
        raise ValueError("cannot prepare")

def measure(name, path):
    with open(path, "a") as log:
        print(name, "begins", file=log, flush=True)
        time.sleep(0.2)
        print(name, "ends", file=log, flush=True)
    yield {"name": name}

if __name__ == "__main__":
    import sys
    measured_in_turn([(name, "log") for name in sys.argv[1:]], prepare, measure)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True], ids=["all well", "one fails"])
def test_processes_measure_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(TURNS)
    names = ["a", "b", *(["bad"] if bad else [])]
    results = [json.loads(line) for line in run("script.py", *names).splitlines()]
    measured = {result["name"]: result["quiet"] for result in results if "name" in result}
    assert measured.keys() == {"a", "b"}
    assert all(quiet for quiet in measured.values()) or bad
    assert [result for result in results if "error" in result] == (
        [{"job": "bad", "error": "ValueError: cannot prepare"}] if bad else []
    )
    lines = [line.split() for line in Path("log").read_text().splitlines()]
    assert [word for _, word in lines] == ["begins", "ends"] * 2
    assert lines[0][0] == lines[1][0]


def test_attention_is_timed_on_a_cpu_by_what_trains_there(tmp_path: Path) -> None:
    words = ("--small", "--device", "cpu", "--rounds", 2, "--backends", "sdpa", "reference", "flash", "--out", tmp_path)
    out = run(BENCHMARKS / "attention.py", *words)
    found = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert set(found) == {"full", "window", "packed", "decoding"}
    for name, result in found.items():
        assert set(result["ms"]) == ({"forward"} if name == "decoding" else {"forward", "forward_backward"})
        assert set(result["ms"]["forward"]) == {"sdpa", "reference"}
        assert "CUDA device" in result["without"]["flash"]
        assert result["auto"] == "sdpa"
        assert max(result["apart"].values()) < 1e-5
        assert name in out


@pytest.mark.slow
def test_decoding_of_whole_models_is_timed_on_a_cpu(tmp_path: Path) -> None:
    run(BENCHMARKS / "inference.py", "--small", "--device", "cpu", "--rounds", 1, "--batch", 2, "--out", tmp_path)
    found = json.loads((tmp_path / "inference.json").read_text())["results"]
    models = ["transformer-tiny", "carve-hybrid-tiny", "carve-tiny", "transformers Llama"]
    assert [(r["model"], r["context"]) for r in found] == [(name, C) for name in models for C in (8, 40)]
    assert all(r["tokens_per_s"]["eager"] > 0 and "errors" not in r for r in found)
    held = {(r["model"], r["context"]): r["bytes_a_sequence"] for r in found}
    assert held["carve-tiny", 40] == held["carve-tiny", 8]
    assert held["transformer-tiny", 40] > 4 * held["transformer-tiny", 8]
