"""What the forward kernel keeps for the backward one: how much, and where a sequence's part of it begins.

A tile or content chunk belongs to one sequence. How many a sequence has is data, where lengths are packed and where
earlier calls left a content chunk open; so its part begins at a bound that follows from shapes and from the token at
which it starts, and some places stay unused.

Shapes: T time, HV value heads, K key dim, V value dim, C tokens in a tile (16) or block, L content chunk,
N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.fused import way
from hybridzoo.kernels.fused.config import staged_config
from hybridzoo.kernels.fused.support import TILE
from hybridzoo.kernels.recurrence_op import Call


def room(call: Call, save: bool) -> list[Tensor]:
    """Memory for the states at tiles' starts, N, (I + A)^-1, and the means that content chunks read.

    `[tiles, HV, K, V]`, `[tiles, HV, C, V]` and `[tiles, HV, C, C]` (the two of no tiles without a correction), and
    `[chunks, HV, V]`. The staged way, without content, keeps them at its blocks' starts, the states transposed, and N
    in any case. bf16 stays bf16; fp16, whose range is too small for a state, becomes float32.
    """
    if way.staged(call):
        return _staged_room(call, save)
    (K, (HV, V)), (tiles, chunks) = (call.q.shape[3], call.v.shape[2:]), (0, 0)
    if save:
        tiles, chunks = n_tiles(call), n_chunks(call)
    corrected = 0 if call.correct is None else tiles
    kept = call.q.dtype if call.q.dtype == torch.bfloat16 else torch.float32
    return [
        call.q.new_empty(tiles, HV, K, V, dtype=kept),
        call.q.new_empty(corrected, HV, TILE, V, dtype=kept),
        call.q.new_empty(corrected, HV, TILE, TILE, dtype=torch.float32),
        call.q.new_zeros(chunks, HV, V, dtype=torch.float32),  # an unused row meets a zero gradient, and must be finite
    ]


def _staged_room(call: Call, save: bool) -> list[Tensor]:
    (K, (HV, V)), C = (call.q.shape[3], call.v.shape[2:]), staged_config(call, True).block
    blocks = n_blocks(call, C) if save else 0
    corrected = 0 if call.correct is None else blocks
    kept = call.q.dtype if call.q.dtype == torch.bfloat16 else torch.float32
    return [
        call.q.new_empty(blocks, HV, V, K, dtype=kept),
        call.q.new_empty(blocks, HV, C, V, dtype=kept),
        call.q.new_empty(corrected, HV, C, C, dtype=kept),
        call.q.new_empty(0, HV, V, dtype=torch.float32),
    ]


def n_blocks(call: Call, C: int) -> int:
    """A bound on the blocks of C tokens of all sequences; the kernels hold where each sequence's begin."""
    N, T = call.S.shape[0], call.q.shape[1]
    return N * -(-T // C) if call.cu_seqlens is None else T // C + N


def n_tiles(call: Call) -> int:
    """A bound on the tiles of all sequences; the kernels hold where each sequence's begin (`tile_base`)."""
    N, T, content = call.S.shape[0], call.q.shape[1], call.chunk > 0
    if call.cu_seqlens is None:
        return N * (-(-T // TILE) + content)
    return T // TILE + N * (1 + content)


def n_chunks(call: Call) -> int:
    """A bound on the content chunks of all sequences, one that has not begun at each end included."""
    N, T, L = call.S.shape[0], call.q.shape[1], call.chunk
    if not L:
        return 0
    return N * _chunks_of_equals(T, L) if call.cu_seqlens is None else T // L + 2 * N


def chunk_starts(call: Call) -> Tensor:
    """Where each sequence's content chunks begin: int32 `[N]`."""
    N, T, L = call.S.shape[0], call.q.shape[1], call.chunk
    order = torch.arange(N, device=call.q.device, dtype=torch.int32)
    if call.cu_seqlens is None:
        return order * _chunks_of_equals(T, L)
    return (call.cu_seqlens[:-1] // L + 2 * order).int()


def _chunks_of_equals(T: int, L: int) -> int:
    return -(-T // L) + 1
