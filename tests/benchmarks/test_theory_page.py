"""The page on theory quotes a full run and one on a GPU: its verdicts and figures are those of the records."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
ON_A_GPU = " ".join(PAGE[PAGE.index("### On a GPU") :].split())


def record(*folders: str) -> dict[str, Any]:
    return dict(json.loads(ROOT.joinpath("docs", "theory", *folders, "theory.json").read_text(encoding="utf-8")))


RECORD = record("full")
PROBES: dict[str, dict[str, Any]] = {probe["name"]: probe for probe in RECORD["probes"]}


def measured(probe: str, text: str) -> str:
    """What was measured for the statement that begins so."""
    found = [one["measured"] for one in PROBES[probe]["statements"] if one["text"].startswith(text)]
    assert len(found) == 1, (probe, text)
    return str(found[0])


def row(probe: str) -> str:
    rows = re.findall(rf"^\| `{probe}` \| (.+) \|$", PAGE[PAGE.index("## What a full run found") :], re.M)
    assert len(rows) == 1
    return str(rows[0])


def test_the_run_was_a_full_one_and_every_probe_has_its_verdict() -> None:
    assert RECORD["size"] == "full"
    minutes = sum(probe["seconds"] for probe in PROBES.values()) / 60
    assert f"{minutes:.0f} minutes" in PAGE
    for name, probe in PROBES.items():
        assert row(name).startswith(f"{probe['verdict']} | ")


def test_the_figures_are_those_of_the_record() -> None:
    assert "K = 16, V = 4: 16 pairs exactly" in measured("capacity", "A state of K by V")
    assert "K = 32, V = 8: 32 pairs exactly" in measured("capacity", "A state of K by V")
    assert measured("stability", "Every token").startswith("9 of 10 settings")
    assert "9 of 10" in row("stability")
    for text, said in (("|dS_T/dS_t| is at most", "34 of 66"), ("|dS_T/dS_t| is at least", "12 of 66")):
        assert said in measured("gradient", text)
    assert "34 of 66 rows, below it in 12" in row("gradient")
    assert "solves it to 1e-15" in measured("separation", "Token gates")
    assert "1e-15" in row("separation")
    told = [one for one in PROBES["separation"]["statements"] if one["text"].startswith("At equal parameters")]
    assert [one["verdict"] for one in told] == 4 * ["cannot be told"]
    shares = [float(share) for share in re.findall(r": ([\d.]+) %", measured("chunk", "It is 0.18"))]
    assert f"{min(shares)} to {max(shares)} % by inputs" in row("chunk")
    shut = next(one for one in PROBES["chunk"]["statements"] if "shut at the start" in one["text"])
    assert shut["verdict"] == "holds"
    assert "within 0.36 %" in shut["text"]
    off = re.search(r"no content gate at all: ([+-][\d.]+) %", shut["measured"])
    assert off
    assert abs(float(off[1])) < 0.36
    assert "costs -0.0 points where the gate started shut and +0.0 points" in PROBES["chunk"]["finding"]
    assert "3:1 comes out best in 88%" in PROBES["optimality"]["finding"]
    assert "88 % of redraws" in row("optimality")
    loop = measured("boundary", "Throughput then")
    for figure in ("92.9 times", "15.1 times"):
        assert figure in loop
        assert figure in row("boundary")


def times(probe: str) -> dict[tuple[str, ...], float]:
    """Seconds on the GPU by the columns that tell them apart."""
    path = ROOT / "docs" / "theory" / "h200" / probe / f"{probe}-time.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["device"] == "cuda"]
    key = ("T", "form") if probe == "boundary" else ("backend", "L")
    return {tuple(row[name] for name in key): float(row["seconds"]) for row in rows}


def test_on_a_gpu_a_solve_a_channel_is_no_slower_than_the_chunkwise_form_in_pytorch() -> None:
    run = record("h200", "boundary")
    assert (run["size"], run["environment"]["device_name"]) == ("full", "NVIDIA H200")
    seconds = times("boundary")
    fused, torch, solves, loop, key_loop = (
        seconds["1024", form]
        for form in (
            "key-axis, chunkwise (triton)",
            "key-axis, chunkwise (torch)",
            "value-axis, a solve a channel",
            "value-axis, token by token",
            "key-axis, token by token",
        )
    )
    assert (
        f"take {1000 * fused:.1f} ms for the key-axis erase by the backend `triton`, and\n{1000 * torch:.0f} ms" in PAGE
    )
    assert f"takes {1000 * solves:.0f} ms with a solve a value channel, and {loop:.1f} s token by token" in ON_A_GPU
    assert f"key-axis erase takes {key_loop:.1f} s" in ON_A_GPU
    (probe,) = run["probes"]
    verdicts = {one["text"]: one["verdict"] for one in probe["statements"]}
    assert verdicts["Throughput then collapses to that of the serial recurrence."] == "does not hold as printed"


def test_on_a_gpu_longer_chunks_take_less_time() -> None:
    (probe,) = record("h200", "chunk")["probes"]
    seconds = times("chunk")
    quoted = [f"{1000 * seconds['triton', L]:.1f} ms at L = {L}" for L in ("16", "64", "256")]
    assert f"{quoted[0]}, {quoted[1]} and {quoted[2]}" in ON_A_GPU
    assert f"{1000 * seconds['triton', '0']:.1f} ms are what no content gate takes" in ON_A_GPU
    statements = {one["text"]: one for one in probe["statements"]}
    best = statements["One chunk length is best for time and quality together."]["measured"]
    assert best.count(": over 4,096 (") == 4
    assert "open, topics of 64: 275 (" in best
    verdicts = [one["verdict"] for text, one in statements.items() if "chunks of 16 to 64 score as those" in text]
    assert verdicts == ["holds", "cannot be told"]
