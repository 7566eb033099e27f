"""What both passes are made of: their inputs, what scratch memory holds, the launch that fills it, that of a scan, and
with a content gate that of a group's kernel and what it counts on.

Shapes: H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, options, power
from hybridzoo.kernels.fused.content import COUNTER
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.launch import MODES, Launch, common, flags, numbers
from hybridzoo.kernels.fused.memory import Part
from hybridzoo.kernels.fused.prepare import prepare_kernel
from hybridzoo.kernels.fused.room import n_blocks
from hybridzoo.kernels.recurrence_op import Call


def inputs(call: Call, form: Form, C: int, *, owned: bool = True) -> dict[str, Tensor | None]:
    """A call's tensors as kernels name them, and where they find a block's place: each packed block's sequence (if
    `owned`), the bounds, and counts."""
    return {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "g": call.log_decay,
        "z": call.erase_logits,
        "e": call.correct,
        "w": call.write,
        "down": call.down,
        "up": call.up,
        "owners": _owners(call, form, C) if form.packed and owned else None,
        "cu": call.cu_seqlens,
        "count0": call.count,
        **({"qE": call.q, "kZ": call.k} if form.plain else {}),
    }


def window_blocks(form: Form, C: int, span: int) -> int:
    """How many blocks a launch over `span` blocks of every sequence has; of packed ones, which are data, over all."""
    return n_blocks(form, C) if form.packed else form.N * span


def chunk_blocks(form: Form, C: int) -> int:
    """How many blocks a content chunk of every sequence has."""
    return form.N * form.chunk // C


def prepared(form: Form, C: int, blocks: int) -> dict[str, Part]:
    """What `prepare` says of so many blocks, `[blocks, HV, ...]`; queries and keys stay the call's own where nothing
    becomes of them."""

    def each(*shape: int, dtype: torch.dtype = form.kept) -> Part:
        return (blocks, form.HV, *shape), dtype

    return {
        "W": each(C, form.K) if form.correct else None,
        **({} if form.plain else {"qE": each(C, form.K), "kZ": each(C, form.K)}),
        "P": each(C, C),
        "total": each(form.K, dtype=torch.float32) if form.decays else None,
    }


def new_counters(form: Form, device: torch.device, windows: int = 1) -> Tensor:
    """What the groups of a content gate's kernels count on, for each window: int32 `[windows, ...]`."""
    return torch.zeros(windows, (1 + form.N * form.HV) * COUNTER.value, dtype=torch.int32, device=device)


def prepare(form: Form, cuts: Cuts, span: int, *, keep: bool, again: bool) -> Launch:
    """The launch that fills scratch memory for windows of `span` blocks."""
    constants = {
        **flags(form),
        **inverse(form),
        "C": cuts.block,
        "BK": power(form.K),
        "D": cuts.prepare_k,
        "CONTENT": form.chunk,
        "RANK": form.rank,
        "KEEP": keep,
        "AGAIN": again,
    }
    grid = (window_blocks(form, cuts.block, span), form.HV)
    return Launch(prepare_kernel, grid, numbers(form, span), constants, options(cuts.prepare_warps), form.kinds)


def scan(kernel: Any, form: Form, cuts: Cuts, span: int, own: dict[str, Any], **more: float) -> Launch:
    """The launch of a kernel that goes through windows of `span` blocks, with what only this one is told: constants,
    and numbers."""
    constants = {
        **common(form),
        "C": cuts.block,
        "BK": power(form.K),
        "BV": cuts.scan_v,
        "DECAYS": form.decays,
        "CORRECT": form.correct > 0,
        "PLAIN": form.plain,
        "STAGES": cuts.scan_stages,
        **own,
    }
    grid = (form.N * form.HV, -(-form.V // cuts.scan_v))
    schedule = options(cuts.scan_warps, cuts.scan_stages)
    return Launch(kernel, grid, {**numbers(form, span), **more}, constants, schedule, form.kinds)


def chunks(kernel: Any, form: Form, cuts: Cuts, span: int | None, own: dict[str, Any], **more: float) -> Launch:
    """The launch of a kernel that goes from content chunk to content chunk, with what only this one is told: constants,
    and numbers."""
    constants = {
        **flags(form),
        "WRITE": form.write,
        "GROUP": cuts.group,
        "C": cuts.block,
        "BK": power(form.K),
        "BV": cuts.scan_v,
        "EVERY": power(form.V),
        "BR": power(form.rank),
        "RANK": form.rank,
        "CONTENT": form.chunk,
        "STAGES": cuts.scan_stages,
        **own,
    }
    grid = (form.N * form.HV * cuts.group,)
    return Launch(kernel, grid, {**numbers(form, span), **more}, constants, options(cuts.group_warps), form.kinds)


def inverse(form: Form) -> dict[str, str]:
    """The precisions of `(I + A)^-1`. Beside bf16 products one pass of tf32 is exact enough for what joins two inverses
    of 16."""
    _, exact = MODES[form.dtype]
    return {"EXACT": exact, "MERGE": "tf32" if form.dtype == torch.bfloat16 else exact}


def _owners(call: Call, form: Form, C: int) -> Tensor:
    """The sequence of each block of a packed row: int32 `[blocks]`."""
    cu = call.cu_seqlens
    assert cu is not None
    first = cu[:-1] // C + torch.arange(form.N, device=cu.device) * (2 if form.chunk else 1)  # as places.sequence says
    blocks = torch.arange(n_blocks(form, C), device=cu.device)
    return (torch.searchsorted(first, blocks, right=True) - 1).int()
