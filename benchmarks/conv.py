"""The small operations around the recurrence on one GPU, in bfloat16, each beside a plain copy of what it must move.

The short convolution with SiLU by its Triton kernels, in PyTorch operations, by torch.compile and, where it is
installed, by fla; and gated RMSNorm and the decay gate, which are PyTorch operations, eager and by torch.compile. A
copy reads as many tensors as the operation must and writes as many: no form of it can take less.

    python benchmarks/conv.py                 # prints, and writes benchmarks/results/conv.json

Shapes: B batch, T time, C channels, W taps, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recording import environment, record
from torch import Tensor
from turns import gpu_in_turn, installed

from hybridzoo.kernels.norms import gated_rms_norm
from hybridzoo.kernels.short_conv import short_conv
from hybridzoo.mixers.gates import Gates

B, T, C, W, H, D = 8, 4096, 2048, 4, 16, 128
LENGTHS = (1, 5000, 300, 8192, 12000, 7, 7000, 268)  # of the packed sequences, B * T together
Side = Callable[[], Tensor]


class Job(NamedTuple):
    """One operation: what it differentiates, the ways to run it, and copies of the bytes it must move."""

    leaves: list[Tensor]
    sides: dict[str, Side]
    copy: Callable[[], object]  # of a forward pass
    copy_backward: Callable[[], object]  # of a backward pass


def convolution(packed: bool, device: str) -> Job:
    """Forward: read x, write y. Backward: read x and dy, write dx. What is as small as the taps is left out."""
    rows, tokens = (1, B * T) if packed else (B, T)
    x = torch.randn(rows, tokens, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(C, W, device=device) / W**0.5).to(torch.bfloat16).requires_grad_()
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], device=device) if packed else None

    def pytorch() -> Tensor:
        return short_conv(x, weight, cu_seqlens=bounds, backend="torch").y

    sides: dict[str, Side] = {
        "hybridzoo": lambda: short_conv(x, weight, cu_seqlens=bounds, backend="triton").y,
        "pytorch": pytorch,
    }
    if not packed:  # torch 2.11 fails on its own kernel there, while it tunes it
        sides["pytorch, compiled"] = torch.compile(pytorch)
    if importlib.util.find_spec("fla") is not None:
        sides["fla"] = lambda: _fla(x, weight, bounds)
    return Job([x, weight], sides, x.detach().clone, lambda: torch.add(x.detach(), x.detach()))


def _fla(x: Tensor, weight: Tensor, bounds: Tensor | None) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d

    y: Tensor = causal_conv1d(x, weight, activation="silu", cu_seqlens=bounds)[0]
    return y


def norm(device: str) -> Job:
    """Forward: read x and the gate, write y. Backward: read those and dy, write the gradients of both."""
    x, gate = (torch.randn(B * T * H, D, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(D, device=device, dtype=torch.bfloat16, requires_grad=True)

    def run() -> Tensor:
        return gated_rms_norm(x, gate, weight)

    def back() -> object:
        return torch.add(x.detach(), gate.detach()), x.detach().clone()

    sides = {"pytorch": run, "pytorch, compiled": torch.compile(run)}
    return Job([x, gate, weight], sides, lambda: torch.add(x.detach(), gate.detach()), back)


def decay(device: str) -> Job:
    """A rate a head and a step a key channel, as kda has it. Forward 16 bits to 32; backward 16 and 32 to 16."""
    f = torch.randn(B, T, H, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    gates = Gates((H,), H * D, None).to(device)
    gates.reset_parameters()
    wide = torch.zeros(B, T, H, D, device=device)

    def run() -> Tensor:
        made: Tensor = gates(f, H, 0)[0]
        return made

    def back() -> object:
        return torch.add(f.detach(), wide, out=torch.empty_like(f))

    sides = {"pytorch": run, "pytorch, compiled": torch.compile(run)}
    return Job([f, *gates.parameters()], sides, lambda: f.detach().float(), back)


JOBS: dict[str, Callable[[str], Job]] = {
    "short convolution": lambda device: convolution(False, device),
    "short convolution, packed": lambda device: convolution(True, device),
    "gated RMSNorm": norm,
    "decay gate": decay,
}


def apart(job: Job) -> dict[str, float]:
    """How far the output of each side and the gradients of its leaves are from the first side's, of their norms."""
    results = {}
    for name, side in job.sides.items():
        y = side()
        results[name] = [y.detach(), *torch.autograd.grad(y, job.leaves, y.detach())]
    first, *others = results
    distances = {}
    for name in others:
        pairs = zip(results[name], results[first], strict=True)
        distances[name] = max(((x.float() - truth.float()).norm() / truth.float().norm()).item() for x, truth in pairs)
    return {name: round(distance, 5) for name, distance in distances.items()}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Check that the sides agree, then time them and the copies in turn: medians, milliseconds."""
    job = JOBS[name]("cuda")
    found: dict[str, Any] = {"operation": name, "apart": apart(job)}
    d_out = torch.randn_like(next(iter(job.sides.values()))())

    def forward(side: Side) -> None:
        with torch.no_grad():
            side()

    def train(side: Side) -> None:
        torch.autograd.grad(side(), job.leaves, d_out)

    def copy_both() -> None:
        job.copy()
        job.copy_backward()

    for what, run, copy in (("forward", forward, job.copy), ("forward_backward", train, copy_both)):
        runs: dict[str, Callable[[], object]] = {}
        for side_name, side in job.sides.items():
            runs[side_name] = lambda side=side, run=run: run(side)
        found[what] = gpu_in_turn({**runs, "copy": copy}, rounds, warmup=3)
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS, help="which operations")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each side")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    found = []
    for name in options.jobs:
        found.append(measure(name, options.rounds))
        print(json.dumps(found[-1]), flush=True)
        torch.cuda.empty_cache()
    sizes = {"B": B, "T": T, "C": C, "W": W, "H": H, "D": D, "packed_lengths": LENGTHS}
    whole = {
        "environment": environment("triton"),
        "fla-core": installed("fla-core"),
        "dtype": "bfloat16",
        "sizes": sizes,
    }
    print(f"written to {record('conv', {**whole, 'results': found}, options.out)}")


if __name__ == "__main__":
    main()
