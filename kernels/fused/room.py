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
from hybridzoo.kernels.fused.form import Form, form_of
from hybridzoo.kernels.recurrence_op import Call


def room(call: Call, save: bool) -> list[Tensor]:
    """Memory for the states at blocks' starts, transposed, N, (I + A)^-1, and what content chunks read.

    `[blocks, HV, V, K]`, `[blocks, HV, C, V]`, `[blocks, HV, C, C]` (no blocks without a correction), and `[rows, HV,
    V + K + 2 r]`: a chunk's mean, the readout of it, and the `tanh` that leads to it with its slope; zeros where no
    chunk is. bf16 stays bf16; fp16, whose range is too small for a state, becomes float32.
    """
    form = form_of(call)
    K, HV, V, C = form.K, form.HV, form.V, block_of(form, True)
    blocks = n_blocks(form, C) if save else 0
    corrected = blocks if form.correct else 0
    return [
        call.q.new_empty(blocks, HV, V, K, dtype=form.kept),
        call.q.new_empty(blocks, HV, C, V, dtype=form.kept),
        call.q.new_empty(corrected, HV, C, C, dtype=form.kept),
        call.q.new_zeros(n_rows(form) if save else 0, HV, row_size(form), dtype=torch.float32),
    ]


def n_blocks(form: Form, C: int) -> int:
    """A bound on the blocks of C tokens of all sequences; `places.sequence` says where each sequence's begin."""
    N, T, spare = form.N, form.T, 1 if form.chunk else 0
    return T // C + N * (1 + spare) if form.packed else N * (-(-T // C) + spare)


def n_rows(form: Form) -> int:
    """A bound on the rows of what content chunks read; `places.chunk_row` says where each sequence's begin."""
    return (form.B * form.T) // form.chunk + 2 * form.N if form.chunk else 0


def row_size(form: Form) -> int:
    """How many numbers a row of what content chunks read has."""
    return form.V + form.K + 2 * form.rank
