"""What the forward pass keeps for the backward one: how much, and where a sequence's part of it begins.

A block or content chunk belongs to one sequence. How many a sequence has is data, where lengths are packed and where
earlier calls left a content chunk open; so its part begins at a bound that follows from shapes and from the token at
which it starts, and some places stay unused.

Shapes: T time, HV value heads, K key dim, V value dim, C tokens in a block, L content chunk, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import block_of
from hybridzoo.kernels.recurrence_op import Call


def room(call: Call, save: bool) -> list[Tensor]:
    """Memory for the states at blocks' starts, transposed, N, (I + A)^-1, and what content chunks read.

    `[blocks, HV, V, K]`, `[blocks, HV, C, V]`, `[blocks, HV, C, C]` (no blocks without a correction), and `[rows, HV,
    V + K]`: a chunk's mean and the readout of it, zeros where no chunk is. bf16 stays bf16; fp16, whose range is too
    small for a state, becomes float32.
    """
    (K, (HV, V)), C = (call.q.shape[3], call.v.shape[2:]), block_of(call, True)
    blocks = n_blocks(call, C) if save else 0
    corrected = 0 if call.correct is None else blocks
    kept = call.q.dtype if call.q.dtype == torch.bfloat16 else torch.float32
    return [
        call.q.new_empty(blocks, HV, V, K, dtype=kept),
        call.q.new_empty(blocks, HV, C, V, dtype=kept),
        call.q.new_empty(corrected, HV, C, C, dtype=kept),
        call.q.new_zeros(n_rows(call) if save else 0, HV, V + K, dtype=torch.float32),
    ]


def n_blocks(call: Call, C: int) -> int:
    """A bound on the blocks of C tokens of all sequences; `places.sequence` says where each sequence's begin."""
    N, T, spare = call.S.shape[0], call.q.shape[1], 1 if call.chunk else 0
    return N * (-(-T // C) + spare) if call.cu_seqlens is None else T // C + N * (1 + spare)


def n_chunks(call: Call) -> int:
    """A bound on the content chunks that a sequence has tokens in."""
    return max(0, call.q.shape[1] + call.chunk - 2) // call.chunk + 1


def n_rows(call: Call) -> int:
    """A bound on the rows of what content chunks read: a row for each chunk, and one for a chunk that is to begin."""
    N, T, L = call.S.shape[0], call.q.shape[1], call.chunk
    if not L:
        return 0
    return N * _rows_of_equals(T, L) if call.cu_seqlens is None else T // L + 2 * N


def first_rows(call: Call) -> Tensor:
    """Each sequence's first row: int32 `[N]`."""
    N, T, L = call.S.shape[0], call.q.shape[1], call.chunk
    order = torch.arange(N, device=call.q.device, dtype=torch.int32)
    if call.cu_seqlens is None:
        return order * _rows_of_equals(T, L)
    return (call.cu_seqlens[:-1] // L + 2 * order).int()


def _rows_of_equals(T: int, L: int) -> int:
    return -(-T // L) + 1
