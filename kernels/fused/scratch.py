"""What both passes are made of: scratch memory of a window, the launch that fills it, and that of a scan.

Shapes: H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, options, power
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.launch import MODES, Launch, common, flags, numbers
from hybridzoo.kernels.fused.prepare import prepare_kernel
from hybridzoo.kernels.fused.room import first_rows, n_blocks
from hybridzoo.kernels.recurrence_op import Call

Tensors = dict[str, Tensor | None]


def inputs(call: Call, form: Form, C: int) -> Tensors:
    """A call's tensors as kernels name them, and where they find a block's place: each packed block's sequence, the
    bounds, counts, and rows of readouts."""
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
        "owners": _owners(call, form, C) if form.packed and not form.chunk else None,
        "cu": call.cu_seqlens,
        "count0": call.count,
        "rows": first_rows(call) if form.chunk else None,
    }


def window_blocks(form: Form, C: int, span: int) -> int:
    """How many blocks a launch over `span` blocks of every sequence has."""
    return n_blocks(form, C) if form.packed and not form.chunk else form.N * span


def new_blocks(call: Call, form: Form, C: int, blocks: int) -> Tensors:
    """Unwritten scratch memory for what `prepare` says of so many blocks, `[blocks, HV, ...]`."""

    def new(*shape: int, dtype: torch.dtype = form.kept) -> Tensor:
        return call.q.new_empty(blocks, form.HV, *shape, dtype=dtype)

    return {
        "W": new(C, form.K) if form.correct else None,
        "qE": call.q if form.plain else new(C, form.K),
        "kZ": call.k if form.plain else new(C, form.K),
        "P": new(C, C),
        "total": new(form.K, dtype=torch.float32) if form.decays else None,
    }


def prepare(form: Form, cuts: Cuts, span: int, *, keep: bool, again: bool) -> Launch:
    """The launch that fills scratch memory for windows of `span` blocks."""
    _, exact = MODES[form.dtype]
    constants: dict[str, Any] = {
        **flags(form),
        **rank(form),
        "C": cuts.block,
        "BK": power(form.K),
        "BV": power(form.V),
        "D": cuts.prepare_k,
        "KEEP": keep,
        "AGAIN": again,
        "EXACT": exact,
        # Beside bf16 products one pass of tf32 is exact enough for what joins two inverses of 16.
        "MERGE": "tf32" if form.dtype == torch.bfloat16 else exact,
    }
    grid = (window_blocks(form, cuts.block, span), form.HV)
    return Launch(prepare_kernel, grid, numbers(form, span), constants, options(cuts.prepare_warps), form.dtypes)


def scan(kernel: Any, form: Form, cuts: Cuts, own: dict[str, Any]) -> Launch:
    """The launch of a kernel that takes a window block after block, with what only this one is told."""
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
    return Launch(kernel, grid, numbers(form), constants, schedule, form.dtypes)


def rank(form: Form) -> dict[str, int]:
    """The content gate's rank, for the kernels that read its pair."""
    r = max(1, form.rank)
    return {"RANK": r, "BR": power(r)}


def _owners(call: Call, form: Form, C: int) -> Tensor:
    """The sequence of each block of a packed row: int32 `[blocks]`."""
    cu = call.cu_seqlens
    assert cu is not None
    first = cu[:-1] // C + torch.arange(form.N, device=cu.device)
    blocks = torch.arange(n_blocks(form, C), device=cu.device)
    return (torch.searchsorted(first, blocks, right=True) - 1).int()
