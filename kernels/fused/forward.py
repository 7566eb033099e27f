"""The forward pass: `prepare` and `scan`, a launch each.

A block of tokens does the same to any state, so all blocks are prepared at once, and little is serial. With a content
gate only the outputs of a chunk say what decays the next one has: one launch goes from chunk to chunk (content.py).

Shapes: HV value heads, K key dim, V value dim, C slots in a block, N sequences, L content chunk.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import block_of, cuts_of
from hybridzoo.kernels.fused.content import forward_kernel
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.launch import Launch, on_device
from hybridzoo.kernels.fused.room import n_rows, row_size
from hybridzoo.kernels.fused.scan import scan_kernel
from hybridzoo.kernels.fused.scratch import (
    Tensors,
    chunk_blocks,
    chunks,
    inputs,
    inverse,
    new_blocks,
    new_counters,
    prepare,
    scan,
    window_blocks,
)
from hybridzoo.kernels.recurrence_op import Call


def run(call: Call, form: Form, room: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence on a contiguous `call`: o, S, o_sum and o_mean, and with `save` a full `room`."""
    o, S, o_sum, o_mean = (torch.empty_like(x) for x in (call.v, call.S, call.o_sum, call.o_mean))
    with on_device(call.q.device):
        found = tensors(call, form, room, save)
        found |= {"o": o, "S1": S, "sum1": o_sum, "mean1": o_mean}
        for launch in plan(form, save):
            launch.starter(found)()
    return o, S, o_sum, o_mean


@functools.lru_cache(maxsize=512)
def plan(form: Form, save: bool) -> list[Launch]:
    """The launches of every call of a form."""
    cut = cuts_of(form, save)
    if form.chunk:
        own = {**inverse(form), "D": cut.prepare_k, "SAVE": save}
        return [chunks(forward_kernel, form, cut, None, own)]
    span = -(-form.T // cut.block)
    ahead = prepare(form, cut, span, keep=save, again=False)
    return [ahead, scan(scan_kernel, form, cut, span, {"WRITE": form.write, "SAVE": save})]


def tensors(call: Call, form: Form, room: list[Tensor], save: bool) -> Tensors:
    """What the kernels read, scratch memory, and what they keep."""
    states, news, inverses, readouts = room
    C = block_of(form, save)
    blocks = chunk_blocks(form, C) if form.chunk else window_blocks(form, C, -(-form.T // C))
    if not save:
        inverses = states.new_empty(blocks if form.correct else 0, form.HV, C, C)
        if form.chunk:
            readouts = call.q.new_empty(n_rows(form), form.HV, row_size(form), dtype=torch.float32)
    return {
        **inputs(call, form, C, owned=not form.chunk),
        **new_blocks(call, form, C, blocks),
        "X": inverses if form.correct else None,
        "S0": call.S,
        "sum0": call.o_sum,
        "mean0": call.o_mean,
        "states": states,
        "news": news,
        "readouts": readouts if form.chunk else None,
        "counters": new_counters(form, call.q.device) if form.chunk else None,
    }
