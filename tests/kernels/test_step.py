"""Decoding on Triton without a GPU: the kernel is right under Triton's interpreter, and compiles without a spill."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from hybridzoo.kernels import gated_delta_rule, gated_delta_rule_flops
from hybridzoo.kernels.fused.step_op import Step, launches_of, memory_of

pytest.importorskip("triton", reason="triton is not installed; its wheels are for Linux")

import interpreted
import interpreted_step
from compiled import usage
from registry_cases import flag_rows

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def interpreter() -> dict[str, dict[str, Any]]:
    return interpreted.run_apart("interpreted_step")


@pytest.mark.xdist_group("interpreter of steps")
@pytest.mark.parametrize("name", interpreted_step.CASES)
def test_a_step_is_the_recurrence(interpreter: dict[str, Any], name: str) -> None:
    found = interpreter["cases"][name]
    assert isinstance(found, dict), found
    wrong = {quantity: f"{error:.1e}" for quantity, error in found.items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.xdist_group("interpreter of steps")
@pytest.mark.parametrize("name", interpreted_step.CHECKS)
def test_under_the_interpreter_it_holds_that(interpreter: dict[str, Any], name: str) -> None:
    raised = interpreter["checks"][name]
    assert raised is None, raised


ROWS = flag_rows()
SIZES = {"64": (64, 64), "128": (128, 128), "64x128": (64, 128), "96x48": (96, 48), "16": (16, 16), "256": (256, 256)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EVERY = [
    (row, size, dtype, capability, rank)
    for row in ROWS
    for size in SIZES
    for dtype in DTYPES
    for capability in (80, 90, 100)
    for rank in ((16, 32, 64) if ROWS[row]["erase"] == "content" else (0,))
]
# What the suite compiles; the rest takes minutes, and is asked for by HYBRIDZOO_COMPILE=all.
FEW = [
    ("gdn2", "128", "bf16", 90, 0),
    ("gdn2", "256", "fp32", 80, 0),
    ("mamba2", "64", "bf16", 100, 0),
    ("kda", "96x48", "fp32", 90, 0),
    ("carve", "128", "bf16", 90, 32),
    ("carve", "64x128", "fp32", 100, 64),
    ("carve", "256", "bf16", 80, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, size, dtype, capability, rank", EVERY if os.environ.get("HYBRIDZOO_COMPILE") == "all" else FEW
)
def test_a_step_compiles_without_a_spill(row: str, size: str, dtype: str, capability: int, rank: int) -> None:
    step = _step(ROWS[row], *SIZES[size], DTYPES[dtype], rank)
    in_place = size != "256"
    for planned in launches_of(step, in_place, early=capability >= 90):
        takes = usage(planned, memory_of(step, step.v, step.state if rank else (step.S,), in_place), capability)
        assert takes.stack == 0, takes
        assert takes.registers <= planned.options["maxnreg"], takes
        assert takes.shared <= 48 * 1024, takes


def _step(flags: dict[str, Any], K: int, V: int, dtype: torch.dtype, rank: int, N: int = 8, heads: int = 16) -> Step:
    """A step with these five flags."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def single(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.float32)

    def gate(flag: str, dim: int) -> torch.Tensor | None:
        return {"scalar": empty(N, 1, heads), "channel": empty(N, 1, heads, dim)}.get(flags[flag])

    tail = V if rank else 0
    return Step(
        q=empty(N, 1, heads, K),
        k=empty(N, 1, heads, K),
        v=empty(N, 1, heads, V),
        log_decay=gate("decay", K),
        erase_logits=None if flags["erase"] == "none" else empty(N, 1, heads, K),
        down=single(heads, rank, V) if rank else None,
        up=single(heads, K, rank) if rank else None,
        correct=gate("correct", K),
        write=gate("write", V),
        S=single(N, heads, K, V),
        o_sum=single(N, heads, tail),
        o_mean=single(N, heads, tail),
        count=empty(N, dtype=torch.int32),
        stored=flags["predict"] == "stored",
        norm=True,
        scale=K**-0.5,
        chunk=64 if rank else 0,
    )


def test_one_token_counts_the_flops_of_the_recurrence_itself() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(3, 1, 2, 16, device="meta")
    for gates in ({}, {"correct": x}):
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule(x, x, x, **gates, backend="triton")
        expected = gated_delta_rule_flops(3, 2, 16, 16, corrected=bool(gates), decode=True)
        assert counter.get_total_flops() == expected
