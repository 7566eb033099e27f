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
