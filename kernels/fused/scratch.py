"""Scratch memory of a window: what `prepare` says of its blocks, and the launch that writes it.

Shapes: H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, options, power
from hybridzoo.kernels.fused.launch import MODES, Launch, flags, kind, rank, sizes
from hybridzoo.kernels.fused.prepare import prepare_kernel
from hybridzoo.kernels.fused.room import first_rows, n_blocks
from hybridzoo.kernels.recurrence_op import Call


class Blocks(NamedTuple):
    """What `prepare` says of every block, `[blocks, HV, ...]`: `[C, K]`, `[C, V]`, `[C, K]` twice, `[C, C]`, `[K]`."""

    W: Tensor | None
    U: Tensor | None
    qE: Tensor
    kZ: Tensor
    P: Tensor
    total: Tensor | None


class Places(NamedTuple):
    """What kernels find a block's place by: each packed block's sequence, the bounds, counts, and rows of readouts."""

    owners: Tensor | None
    cu: Tensor | None
    count0: Tensor
    rows: Tensor | None

    def of_sequences(self) -> dict[str, Tensor | None]:
        """What a kernel with a program for each sequence takes."""
        return {"cu": self.cu, "count0": self.count0, "rows": self.rows}


def places(call: Call, C: int) -> Places:
    """Where the blocks of a call are."""
    rows = first_rows(call) if call.chunk else None
    return Places(None if call.chunk else _owners(call, C), call.cu_seqlens, call.count, rows)


def window_blocks(call: Call, C: int, span: int) -> int:
    """How many blocks a launch over `span` blocks of every sequence has."""
    if call.cu_seqlens is not None and not call.chunk:
        return n_blocks(call, C)
    return call.S.shape[0] * span


def new_blocks(call: Call, cuts: Cuts, blocks: int, U: Tensor | None) -> Blocks:
    """Unwritten scratch memory for so many blocks."""
    HV, K, C = call.v.shape[2], call.q.shape[3], cuts.block
    kept = call.q.dtype if call.q.dtype == torch.bfloat16 else torch.float32

    def new(*shape: int, dtype: torch.dtype = kept) -> Tensor:
        return call.q.new_empty(blocks, HV, *shape, dtype=dtype)

    decays = call.log_decay is not None or call.erase_logits is not None
    return Blocks(
        W=None if call.correct is None else new(C, K),
        U=U,
        qE=new(C, K),
        kZ=new(C, K),
        P=new(C, C),
        total=new(K, dtype=torch.float32) if decays else None,
    )


def prepare(
    call: Call,
    cuts: Cuts,
    where: Places,
    made: Blocks,
    X: Tensor | None,
    readouts: Tensor,
    span: int,
    *,
    keep: bool,
    again: bool,
) -> Launch:
    """The launch that fills `made` for windows of `span` blocks."""
    _, exact = MODES[call.q.dtype]
    arguments: dict[str, Any] = {
        **key_inputs(call),
        "v": call.v,
        "w": call.write,
        "down": call.down,
        "up": call.up,
        **where._asdict(),
        **made._asdict(),
        "readouts": readouts if call.chunk else None,
        "X": X,
        "scale": float(call.scale),
        **window(0, span),
        **sizes(call, "T", "H", "HV", "K", "V"),
    }
    constants = {
        **flags(call),
        **rank(call),
        "C": cuts.block,
        "BK": power(call.q.shape[3]),
        "BV": power(call.v.shape[3]),
        "D": cuts.prepare_k,
        "WRITE": kind(call.write),
        "KEEP": keep,
        "AGAIN": again,
        "EXACT": exact,
        # Beside bf16 products one pass of tf32 is exact enough for what joins two inverses of 16.
        "MERGE": "tf32" if call.q.dtype == torch.bfloat16 else exact,
    }
    grid = (window_blocks(call, cuts.block, span), call.v.shape[2])
    return Launch(prepare_kernel, grid, arguments, constants, options(cuts.prepare_warps))


def key_inputs(call: Call) -> dict[str, Tensor | None]:
    """The tensors on the key side, as kernels name them."""
    return {"q": call.q, "k": call.k, "g": call.log_decay, "z": call.erase_logits, "e": call.correct}


def window(first: int, count: int) -> dict[str, int]:
    """A window of `count` blocks of every sequence from `first` on, with scratch memory of its own."""
    return {"first": first, "count": count, "origin": first, "span": count}


def _owners(call: Call, C: int) -> Tensor | None:
    """The sequence of each block of a packed row: int32 `[blocks]`; None where rows are of one length."""
    cu = call.cu_seqlens
    if cu is None:
        return None
    N = cu.numel() - 1
    first = cu[:-1] // C + torch.arange(N, device=cu.device)
    blocks = torch.arange(n_blocks(call, C), device=cu.device)
    return (torch.searchsorted(first, blocks, right=True) - 1).int()
