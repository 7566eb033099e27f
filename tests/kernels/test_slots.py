"""Attention to a cache's slots on Triton without a GPU: right under the interpreter, compiled within bounds."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

from hybridzoo.kernels.fused.config import MOST_SHARED
from hybridzoo.kernels.fused.slots_op import MOST_PARTS, fused_attend_slots, launches_of, slots_config, slots_refusal

pytest.importorskip("triton", reason="triton is not installed; its wheels are for Linux")

import interpreted
import interpreted_slots
from compiled import usage

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def interpreter() -> dict[str, dict[str, Any]]:
    return interpreted.run_apart("interpreted_slots")


@pytest.mark.xdist_group("interpreter of slots")
@pytest.mark.parametrize("name", interpreted_slots.CASES)
def test_it_is_attention_to_what_a_row_has_seen(interpreter: dict[str, Any], name: str) -> None:
    found = interpreter["cases"][name]
    assert isinstance(found, dict), found
    wrong = {cut: f"{error:.1e}" for cut, error in found.items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.xdist_group("interpreter of slots")
@pytest.mark.parametrize("name", interpreted_slots.CHECKS)
def test_under_the_interpreter_it_holds_that(interpreter: dict[str, Any], name: str) -> None:
    raised = interpreter["checks"][name]
    assert raised is None, raised


def test_the_parts_cover_every_slot_and_none_is_without_one() -> None:
    for heads, C, D, itemsize in itertools.product(
        (1, 16, 300, 4096), (1, 31, 256, 1000, 65536), (16, 96, 256), (2, 4)
    ):
        config = slots_config(heads, 1, C, D, itemsize)
        assert (config.parts - 1) * config.span < C <= config.parts * config.span
        assert config.span % config.block == 0
        assert 1 <= config.parts <= MOST_PARTS


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {"one a key head": (16, 16), "four a key head": (32, 8), "all on one": (32, 1)}
EVERY = [
    (dtype, D, heads, capped, capability)
    for dtype in DTYPES
    for D in (32, 64, 96, 128, 192, 256)
    for heads in HEADS
    for capped in (False, True)
    for capability in (80, 90, 100)
]
# What the suite compiles; the rest is asked for by HYBRIDZOO_COMPILE=all.
FEW = [
    ("bf16", 128, "one a key head", False, 90),
    ("bf16", 64, "four a key head", True, 80),
    ("fp32", 256, "all on one", True, 80),
    ("fp16", 96, "four a key head", False, 100),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, D, heads, capped, capability", EVERY if os.environ.get("HYBRIDZOO_COMPILE") == "all" else FEW
)
def test_it_compiles_within_bounds(dtype: str, D: int, heads: str, capped: bool, capability: int) -> None:
    H, H_kv = HEADS[heads]
    kind = DTYPES[dtype]

    def empty(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    k = empty(1, H_kv, 4096, D)
    config, launches = launches_of(tuple(k.shape), H, (kind, kind, kind), 0.1, 30.0 if capped else 0.0)
    parts = empty(1, dtype=torch.float32)
    found = {"q": empty(1, 1, H, D), "k": k, "v": k, "length": empty(1, dtype=torch.int32), "o": parts}
    found |= {"tops": parts, "sums": parts, "parts_o": parts}
    assert len(launches) == 2
    assert config.parts > 1
    for launch in launches:
        takes = usage(launch, found, capability)
        assert takes.stack <= 64, takes
        assert takes.shared <= MOST_SHARED * 1024, takes


def test_what_it_does_not_take_is_said() -> None:
    q, k = torch.zeros(2, 1, 4, 16), torch.zeros(2, 2, 8, 16)
    assert "needs tensors on a CUDA device" in str(slots_refusal(q, k, k)) or "TRITON_INTERPRET" in os.environ
    assert "got torch.float64" in str(slots_refusal(q.double(), k.double(), k.double()))
    assert "heads of up to 256, got 272" in str(slots_refusal(*(torch.zeros(1, 1, 1, 272) for _ in "qkv")))
    assert "no gradient" in str(slots_refusal(q.requires_grad_(), k, k))
    with torch.no_grad():
        assert "no gradient" not in str(slots_refusal(q, k, k))


def test_what_would_lose_a_derivative_is_not_taken() -> None:
    q, k = torch.zeros(2, 1, 4, 16), torch.zeros(2, 2, 8, 16)
    found: list[str | None] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        found.append(slots_refusal(x, k, k))
        return x.clone()

    torch.vmap(ask)(q[None])
    torch.func.jvp(ask, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        ask(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))
    assert len(found) == 3
    assert all("no transform of torch.func" in str(why) for why in found)


def test_shapes_alone_go_through_it() -> None:
    q, k = torch.empty(3, 1, 4, 16, device="meta", dtype=torch.bfloat16), torch.empty(3, 2, 8, 16, device="meta")
    o = fused_attend_slots(q, k, k, torch.empty(3, device="meta", dtype=torch.int32), 0.1)
    assert (o.shape, o.dtype) == (q.shape, q.dtype)
