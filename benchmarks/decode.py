"""One token a call on one GPU: a step of the `triton` backend in place, beside a plain copy of the same state.

A step must read the state and write it, as the copy does, so the copy's time is the floor. Both run in one process and
in turn: captured in a CUDA graph, where the device alone counts, and eagerly, where a call also waits for the host.

    python benchmarks/decode.py                 # prints, and writes benchmarks/results/decode.json

Shapes: B sequences, H heads, D head dim, L content chunk, r content rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import ContentGate, DeltaState, gated_delta_rule

# Decay, erase, correct and write: none, one value a head, or one a channel; what the correction reads; L; unit keys.
ROWS: dict[str, tuple[str, str, str, str, str, int, bool]] = {
    "gdn2": ("channel", "none", "channel", "channel", "decayed", 0, True),
    "kda": ("channel", "none", "scalar", "scalar", "decayed", 0, True),
    "carve": ("channel", "channel", "scalar", "scalar", "stored", 64, True),
    "mamba2": ("scalar", "none", "none", "scalar", "decayed", 0, False),
}
RANK = 16
STEPS = 20  # in a captured graph, and between two looks at the clock


def decoding(row: str, B: int, H: int, D: int) -> tuple[Callable[[], Tensor], Tensor]:
    """A function that takes one step in place, and the state matrix it goes over."""
    decay, erase, correct, write, predict, chunk, unit = ROWS[row]

    def draw(kind: str, of: Callable[[Tensor], Tensor]) -> Tensor | None:
        shape = {"scalar": (B, 1, H), "channel": (B, 1, H, D)}.get(kind)
        return None if shape is None else of(torch.rand(*shape, device="cuda")).to(torch.bfloat16)

    q, k, v = (torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    gates = {
        "log_decay": draw(decay, lambda x: -0.2 * x),
        "erase_logits": draw(erase, lambda x: x - 5),
        "correct": draw(correct, lambda x: x),
        "write": draw(write, lambda x: x),
    }
    if correct == write == "scalar":  # tied
        gates["write"] = gates["correct"]
    content = None
    if chunk:  # one pair for all heads
        down, up = torch.randn(1, RANK, D, device="cuda") / D**0.5, torch.randn(1, D, RANK, device="cuda") / 10
        content = ContentGate(down.expand(H, -1, -1), up.expand(H, -1, -1), chunk)
    state = DeltaState.zeros(B, H, D, D, content is not None, "cuda")
    state.count.copy_(torch.arange(B) % max(chunk, 1))  # sequences end their content chunks at different steps

    def step() -> Tensor:
        o, _ = gated_delta_rule(
            *(q, k, v),
            **gates,
            content=content,
            predict=predict,
            qk_l2norm=unit,
            state=state,
            inplace_state=True,
            backend="triton",
        )
        return o

    return step, state.S


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """STEPS runs as one CUDA graph."""
    run()  # compiled by now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            run()
    return graph.replay


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """STEPS runs, one call after another."""

    def several() -> None:
        for _ in range(STEPS):
            run()

    return several


def timed(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """For each side, in turn: microseconds of one step on the device, and until the host had queued it (medians)."""
    device: dict[str, list[float]] = {name: [] for name in sides}
    host: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before = time.perf_counter()
            start.record()
            side()
            end.record()
            host[name].append(1e6 * (time.perf_counter() - before) / STEPS)
            end.synchronize()
            device[name].append(1e3 * start.elapsed_time(end) / STEPS)
    return {
        name: {key: round(statistics.median(us[name][2:]), 2) for key, us in (("device", device), ("host", host))}
        for name in sides
    }


def measure(row: str, B: int, H: int, D: int, rounds: int) -> dict[str, Any]:
    """Time a row's step beside the copy, captured and eager."""
    step, S = decoding(row, B, H, D)
    source, target = torch.randn_like(S), torch.empty_like(S)

    def copy() -> Tensor:
        return target.copy_(source)

    with torch.no_grad():
        graphs = timed({"step": captured(step), "copy": captured(copy)}, rounds)
        eager = timed({"step": repeated(step), "copy": repeated(copy)}, rounds)
    if not torch.isfinite(S).all():
        raise RuntimeError(f"{row}: the state did not stay finite")
    copied = graphs["copy"]["device"]
    return {
        "mixer": row,
        "shape": {"B": B, "H": H, "D": D},
        "graph": graphs,
        "eager": eager,
        "of_the_copy": round(graphs["step"]["device"] / copied, 3),
        "copy_tb_per_s": round(2 * S.nbytes / copied / 1e6, 2),
    }


def main() -> None:
    """Measure, print and record."""
    from recording import environment, record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, help="which mixers")
    parser.add_argument("--batch", nargs="*", type=int, default=[256, 1], help="how many sequences")
    parser.add_argument("--rounds", type=int, default=20, help=f"timings of {STEPS} steps of each side")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for B in options.batch:
        for row in options.rows:
            found.append(measure(row, B, 16, 128, options.rounds))
            print(json.dumps(found[-1]), flush=True)
            torch.cuda.empty_cache()
    whole = {
        "environment": environment("triton"),
        "dtype": "bfloat16, the state float32",
        "unit": "microseconds a step",
        "results": found,
    }
    print(f"written to {record('decode', whole, options.out)}")


if __name__ == "__main__":
    main()
