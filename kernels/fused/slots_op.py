"""Attention from one token a row to the slots of a cache, as an operator without a gradient.

Imports triton when it first runs. Nothing here waits for the device, and how long rows are is read there, so a CUDA
graph can capture it.

Shapes: N rows, H query heads, H_kv key heads, G = H / H_kv, D head dim, C slots, P parts of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.derivatives import has_tangent, in_transform
from hybridzoo.kernels.fused.config import options, power
from hybridzoo.kernels.fused.launch import MODES, Launch
from hybridzoo.kernels.fused.support import DTYPES, MAX_HEAD, device_refusal
from hybridzoo.kernels.operators import define, dense_like

# Programs that fill a GPU of 132 multiprocessors some times over; fewer slots than LEAST are no part of their own.
PROGRAMS, LEAST, MOST_PARTS = 528, 256, 64


class SlotsConfig(NamedTuple):
    """How the slots of a row are cut: slots of a part, parts, slots at a time, and how those are worked on."""

    span: int
    parts: int
    block: int
    num_warps: int
    num_stages: int


def slots_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a call cannot run on Triton, as the rest of a sentence that begins with the backend's name; or None."""
    if k.dtype not in DTYPES or v.dtype != k.dtype:
        return f"takes caches of bfloat16, float16 and float32, got {k.dtype} and {v.dtype}"
    if q.shape[-1] > MAX_HEAD:
        return f"takes heads of up to {MAX_HEAD}, got {q.shape[-1]}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no gradient here"
    if in_transform() or has_tangent((q, k, v)):
        return "goes through no transform of torch.func and no forward mode"
    return device_refusal(q.device.type, q.device.index)


def fused_attend_slots(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Attend from one token a row to the slots that its row has filled.

    Args:
        q: `[N, 1, H, D]`.
        k, v: `[N, H_kv, C, D]`, the new token in its slot; head j of q reads head `j // G`.
        length: int32 `[N]`, the tokens before the new one; slots 0 to `min(length, C - 1)` are seen.
        scale: of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        `[N, 1, H, D]` in q's dtype. Scores, softmax and sums are float32.
    """
    o: Tensor = _slots_op(q, k, v, length, float(scale), 0.0 if softcap is None else float(softcap))
    return o


@functools.lru_cache(maxsize=512)
def launches_of(
    shape: tuple[int, ...], H: int, kinds: tuple[torch.dtype, ...], scale: float, softcap: float
) -> tuple[SlotsConfig, list[Launch]]:
    """The cut and the launches for `k` of a shape, with H query heads and dtypes of q, k and v."""
    from hybridzoo.kernels.fused.slots import join_kernel, slots_kernel

    N, HKV, C, D = shape
    G = H // HKV
    dtype = kinds[1]
    config = slots_config(N * HKV, G, C, D, dtype.itemsize)
    numbers = {"scale": scale, "cap": softcap, "HKV": HKV, "G": G, "D": D, "C": C, "span": config.span}
    constants = {
        "BG": power(G),
        "BN": config.block,
        "BD": power(D),
        "CAPPED": softcap > 0,
        "WHOLE": config.parts == 1,
        "MODE": MODES[dtype][0],
        "STAGES": config.num_stages,
    }
    schedule = options(config.num_warps, config.num_stages)
    launches = [Launch(slots_kernel, (N * HKV, config.parts), numbers, constants, schedule, kinds)]
    if config.parts > 1:
        joined = {"G": G, "D": D, "P": config.parts}
        constants = {"BP": power(config.parts), "BD": power(D)}
        launches.append(Launch(join_kernel, (N * HKV, G), joined, constants, options(4), kinds))
    return config, launches


def slots_config(heads: int, G: int, C: int, D: int, itemsize: int) -> SlotsConfig:
    """The cut for so many rows' key heads: 8 KiB of keys and of values at a time, two of each ahead, which leaves room
    for six programs on a multiprocessor."""
    size = power(D) * itemsize
    block = max(16, min(128, 8192 // size))
    parts = max(1, min(MOST_PARTS, -(-PROGRAMS // max(1, heads)), C // LEAST))
    span = -(-C // (parts * block)) * block
    return SlotsConfig(
        span=span,
        parts=max(1, -(-C // span)),
        block=block,
        num_warps=8 if power(G) * power(D) > 4096 else 4,
        num_stages=2 if size > 512 else 3,
    )


@without_autocast
def _attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float, softcap: float) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o = torch.empty_like(q)
    config, launches = launches_of(tuple(k.shape), q.shape[2], (q.dtype, k.dtype, v.dtype), scale, softcap)
    found = {"q": q, "k": k, "v": v, "length": length, "o": o, "tops": None, "sums": None}
    if config.parts > 1:
        N, _, H, D = q.shape
        room = torch.empty(N * H * config.parts * (D + 2), dtype=torch.float32, device=q.device)
        of_parts, tops, sums = room.split([N * H * config.parts * size for size in (D, 1, 1)])
        launches[0].start(q.device, found | {"o": of_parts, "tops": tops, "sums": sums})
        launches[1].start(q.device, {"parts_o": of_parts, "tops": tops, "sums": sums, "o": o})
    else:
        launches[0].start(q.device, found)
    return o


_slots_op = define(
    "fused_attend_slots(Tensor q, Tensor k, Tensor v, Tensor length, float scale, float softcap) -> Tensor",
    _attend,
    lambda q, *rest: dense_like(q),
)
