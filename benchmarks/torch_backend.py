"""The `torch` backend beside transformers' chunked PyTorch code for Gated DeltaNet, on this machine's CPU.

Both sides run the same inputs in one process and in turn, and must agree before they are timed. What both do is timed:
L2 norm of q and k, the recurrence from an empty state, the gradients of q, k, v, the decay and the write gate.

    python benchmarks/torch_backend.py                  # prints, and writes benchmarks/results/torch_backend.json

Shapes: B batch, T time, H heads, D head dim.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import environment, in_turn, record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hybridzoo.kernels import gated_delta_rule

SHAPES = ((1, 2048, 4, 64), (8, 512, 4, 64))  # B, T, H, D
# transformers wraps the function to pick a kernel where one is installed; its PyTorch code is what a CPU runs.
theirs = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)


def hybridzoo_side(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gated DeltaNet as a row of flags; q, k, v `[B, T, H, D]`, g and beta `[B, T, H]`."""
    return gated_delta_rule(q, k, v, log_decay=g, correct=beta, write=beta, qk_l2norm=True, backend="torch")[0]


def transformers_side(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The same by transformers."""
    return theirs(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def measure(B: int, T: int, H: int, D: int, rounds: int) -> dict[str, Any]:
    """Time both sides on one shape, in float32."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(B, T, H, D) for _ in range(4))
    g, beta = -torch.rand(B, T, H), torch.rand(B, T, H)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    sides: dict[str, Callable[..., Tensor]] = {"hybridzoo": hybridzoo_side, "transformers": transformers_side}

    def train(side: Callable[..., Tensor]) -> list[Tensor]:
        out = side(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]

    for ours, peers in zip(train(hybridzoo_side), train(transformers_side), strict=True):
        torch.testing.assert_close(ours, peers, rtol=1e-3, atol=1e-3)

    def forward(side: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            side(*inputs)

    result: dict[str, Any] = {"shape": {"B": B, "T": T, "H": H, "D": D}}
    for what, run in (("forward", forward), ("forward_backward", train)):
        calls = {name: (lambda run=run, side=side: run(side)) for name, side in sides.items()}
        times = in_turn(calls, rounds)
        result[what] = {**times, "ratio": round(times["transformers"]["median"] / times["hybridzoo"]["median"], 2)}
    return result


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="timings of each side and shape")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    console = Console()
    table = Table("B T H D", "pass", "hybridzoo ms", "transformers ms", "times faster", title="median of both in turn")
    results = []
    for shape in SHAPES:
        with console.status(f"timing {shape}"):
            results.append(measure(*shape, rounds=options.rounds))
        for what in ("forward", "forward_backward"):
            ours, peer, ratio = (results[-1][what][key] for key in ("hybridzoo", "transformers", "ratio"))
            table.add_row(" ".join(map(str, shape)), what, f"{ours['median']}", f"{peer['median']}", f"{ratio}")
    console.print(table)
    found = {"environment": environment("transformers"), "dtype": "float32", "results": results}
    console.print(f"written to {record('torch_backend', found, options.out)}")


if __name__ == "__main__":
    main()
