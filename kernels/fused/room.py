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
from hybridzoo.kernels.fused.memory import Layout, layout
from hybridzoo.kernels.recurrence_op import Call


def room(call: Call) -> list[Tensor]:
    """Memory for all that is kept of a call."""
    form = form_of(call)
    return new_room(call, form, kept(form))


def new_room(call: Call, form: Form, parts: Layout) -> list[Tensor]:
    """Memory for what `kept` lays out, and with a content gate for what its chunks read.

    The latter is `[rows, HV, V + K + 2 r]`: a chunk's mean, the readout of it, and the `tanh` that leads to it with its
    slope; zeros where no chunk is.
    """
    memory = [parts.new(call.q)]
    if form.chunk:
        memory.append(call.q.new_zeros(*readouts(form), dtype=torch.float32))
    return memory


def kept(form: Form) -> Layout:
    """The states at blocks' starts, transposed, `[blocks, HV, V, K]`, N `[blocks, HV, C, V]`, and with a correction
    (I + A)^-1 `[blocks, HV, C, C]`."""
    K, HV, V, C = form.K, form.HV, form.V, block_of(form, True)
    blocks = n_blocks(form, C)
    return layout(
        {
            "states": ((blocks, HV, V, K), form.kept),
            "news": ((blocks, HV, C, V), form.kept),
            "X": ((blocks, HV, C, C), form.kept) if form.correct else None,
        }
    )


def readouts(form: Form) -> tuple[int, int, int]:
    """The shape of what content chunks read."""
    return n_rows(form), form.HV, form.V + form.K + 2 * form.rank


def n_blocks(form: Form, C: int) -> int:
    """A bound on the blocks of C tokens of all sequences; `places.sequence` says where each sequence's begin."""
    N, T, spare = form.N, form.T, 1 if form.chunk else 0
    return T // C + N * (1 + spare) if form.packed else N * (-(-T // C) + spare)


def n_rows(form: Form) -> int:
    """A bound on the rows of what content chunks read; `places.chunk_row` says where each sequence's begin."""
    return (form.B * form.T) // form.chunk + 2 * form.N if form.chunk else 0
