"""The `triton` backend beside fla's chunk kernels on one GPU: forward, forward + backward, and peak memory.

Both sides run the same bfloat16 inputs in one process and in turn: a call by itself, and calls in a row. fla tunes each
of its kernels when it first meets a head size, for minutes: one process a mixer and head size does that side by side,
and when all are ready they measure one after another. Without fla, or for mixers that it lacks, this side is measured
alone.

    python benchmarks/triton_backend.py                 # prints, and writes benchmarks/results/triton_backend.json

Shapes: B batch, T time, H heads, D head dim, L content chunk, r content rank.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording import environment, record
from torch import Tensor
from torch.nn.functional import normalize
from turns import gpu_in_turn, installed, measured_in_turn, peak_mib

from hybridzoo.kernels import ContentGate, gated_delta_rule

SHAPES = {"large": (8, 4096, 16, 128), "long": (1, 32768, 16, 128), "small": (8, 1024, 12, 64)}  # B, T, H, D
# Decay, erase, correct and write: none, one value a head, or one a channel; then what the correction reads, and L.
ROWS: dict[str, tuple[str, str, str, str, str, int]] = {
    "gdn2": ("channel", "none", "channel", "channel", "decayed", 0),
    "kda": ("channel", "none", "scalar", "scalar", "decayed", 0),
    "gla": ("channel", "none", "none", "none", "decayed", 0),
    "delta_net": ("none", "none", "scalar", "scalar", "decayed", 0),
    "gated_delta_net": ("scalar", "none", "scalar", "scalar", "decayed", 0),
    "mamba2": ("scalar", "none", "none", "scalar", "decayed", 0),
    "carve[erase=token]": ("channel", "channel", "scalar", "scalar", "stored", 0),
    "carve": ("channel", "channel", "scalar", "scalar", "stored", 64),
    "carve[content_chunk=128]": ("channel", "channel", "scalar", "scalar", "stored", 128),
}
RANK = 16
IN_A_ROW = 10


def inputs(row: str, B: int, T: int, H: int, D: int) -> dict[str, Tensor]:
    """Leaves of a call: unit keys and queries, weak decays, gates in (0, 1), a content gate's pair in float32."""
    decay, erase, correct, write, _, chunk = ROWS[row]

    def draw(kind: str, of: Callable[..., Tensor]) -> Tensor | None:
        shape = {"scalar": (B, T, H), "channel": (B, T, H, D)}.get(kind)
        return None if shape is None else of(*shape, device="cuda").to(torch.bfloat16)

    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    drawn = {
        "q": normalize(q, dim=-1),
        "k": normalize(k, dim=-1),
        "v": v,
        "log_decay": draw(decay, lambda *shape, device: -0.2 * torch.rand(*shape, device=device)),
        "erase_logits": draw(erase, lambda *shape, device: torch.randn(*shape, device=device) - 5),
        "correct": draw(correct, torch.rand),
        "write": draw(write, torch.rand),
    }
    if correct == write == "scalar":  # tied
        drawn["write"] = drawn["correct"]
    if chunk:
        drawn["down"] = torch.randn(H, RANK, D, device="cuda") / D**0.5
        drawn["up"] = torch.randn(H, D, RANK, device="cuda") / 10
    return {name: x.requires_grad_() for name, x in drawn.items() if x is not None}


def ours(row: str, x: dict[str, Tensor]) -> Tensor:
    """The row of flags by `gated_delta_rule`."""
    *_, predict, chunk = ROWS[row]
    gates = {name: value for name, value in x.items() if name not in ("down", "up")}
    content = ContentGate(x["down"], x["up"], chunk) if chunk else None
    # fla gives back no final state either unless asked.
    return gated_delta_rule(**gates, content=content, predict=predict, return_state=False, backend="triton")[0]


def fla_side(row: str, x: dict[str, Tensor]) -> Tensor:
    """The same by fla."""
    if row == "gdn2":
        from fla.ops.gdn2 import chunk_gdn2

        return chunk_gdn2(x["q"], x["k"], x["v"], x["log_decay"], x["correct"], x["write"])[0]
    if row == "kda":
        from fla.ops.kda import chunk_kda

        return chunk_kda(x["q"], x["k"], x["v"], x["log_decay"], x["correct"])[0]
    if row == "gla":
        from fla.ops.gla import chunk_gla

        return chunk_gla(x["q"], x["k"], x["v"], x["log_decay"])[0]
    if row == "gated_delta_net":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["log_decay"], x["correct"])[0]
    if row == "mamba2":
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(x["q"], x["k"], x["v"] * x["write"][..., None], x["log_decay"])[0]
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(x["q"], x["k"], x["v"], x["correct"])[0]


PEERS = ("gdn2", "kda", "gla", "delta_net", "gated_delta_net", "mamba2")
Side = Callable[[str, dict[str, Tensor]], Tensor]


def timed(row: str, shape: str, sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Check that the sides agree, then time them in turn, milliseconds of a call, and read GiB above the inputs."""
    x = inputs(row, *SHAPES[shape])
    d_out = torch.randn_like(x["v"])
    leaves = list({id(leaf): leaf for leaf in x.values()}.values())

    def forward(side: Side) -> Tensor:
        with torch.no_grad():
            return side(row, x)

    def train(side: Side) -> None:
        torch.autograd.grad(side(row, x), leaves, d_out)

    found: dict[str, Any] = {"mixer": row, "shape": dict(zip("BTHD", SHAPES[shape], strict=True))}
    outputs = {name: forward(side).float() for name, side in sides.items()}
    if "fla" in outputs:
        apart = (outputs["fla"] - outputs["hybridzoo"]).norm() / outputs["hybridzoo"].norm()
        found["apart"] = round(apart.item(), 5)
    del outputs
    forwards = {name: partial(forward, side) for name, side in sides.items()}
    found["forward"] = gpu_in_turn(forwards, rounds)
    found["forward_in_a_row"] = gpu_in_turn(forwards, rounds, calls=IN_A_ROW)
    if "fla" in sides and (why := refusal(partial(train, sides["fla"]))):
        found["fla_refuses_backward"] = why
        sides = {"hybridzoo": sides["hybridzoo"]}
    trains = {name: partial(train, side) for name, side in sides.items()}
    found["forward_backward"] = gpu_in_turn(trains, rounds)
    found["forward_backward_in_a_row"] = gpu_in_turn(trains, rounds, calls=IN_A_ROW)
    found["peak_gib"] = {name: round(peak_mib(partial(train, side)) / 1024, 2) for name, side in sides.items()}
    return found


def refusal(train: Callable[[], None]) -> str | None:
    """Why fla will not do it: it refuses a backward that a compiler is known to get wrong (its issue 640)."""
    try:
        train()
    except RuntimeError as error:
        if "640" not in str(error):
            raise
        return " ".join(str(error).split())
    return None


def sides_of(row: str, with_fla: bool) -> dict[str, Side]:
    """Who computes a row."""
    return {"hybridzoo": ours, "fla": fla_side} if with_fla and row in PEERS else {"hybridzoo": ours}


def prepare(row: str, shapes: list[str], with_fla: bool, rounds: int) -> None:
    """Compile and tune everything of one mixer and head size."""
    for shape in shapes:
        timed(row, shape, sides_of(row, with_fla), 1)


def measure(row: str, shapes: list[str], with_fla: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Time it."""
    for shape in shapes:
        yield timed(row, shape, sides_of(row, with_fla), rounds)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, help="which mixers")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each side and shape")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    with_fla = importlib.util.find_spec("fla") is not None
    jobs = [(row, names) for row in options.rows for names in (["large", "long"], ["small"])]
    jobs = [(row, [name for name in names if not ROWS[row][-1] or name != "long"]) for row, names in jobs]
    found = measured_in_turn([(*job, with_fla, options.rounds) for job in jobs], prepare, measure)
    whole = {
        "environment": environment("triton"),
        "fla-core": installed("fla-core"),
        "dtype": "bfloat16",
        "results": found,
    }
    print(f"written to {record('triton_backend', whole, options.out)}")


if __name__ == "__main__":
    main()
