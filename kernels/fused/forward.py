"""The forward pass: `prepare` and `scan`, a launch each.

A block of tokens does the same to any state, so all blocks are prepared at once, and little is serial. With a content
gate only the outputs of a chunk say what decays the next one has: one launch goes from chunk to chunk (content.py).

Shapes: HV value heads, K key dim, V value dim, C slots in a block, N sequences, L content chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import block_of, cuts_of
from hybridzoo.kernels.fused.content import forward_kernel
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.launch import Launch, queue_of
from hybridzoo.kernels.fused.memory import Layout, Memory, layout
from hybridzoo.kernels.fused.room import kept, new_room, readouts
from hybridzoo.kernels.fused.scan import scan_kernel
from hybridzoo.kernels.fused.scratch import (
    chunk_blocks,
    chunks,
    inputs,
    inverse,
    new_counters,
    prepare,
    prepared,
    scan,
    window_blocks,
)
from hybridzoo.kernels.recurrence_op import Call, parted


class Plan(NamedTuple):
    """How the pass goes: what is launched, and the layouts of scratch memory and of what is kept."""

    launches: list[Launch]
    scratch: Layout
    kept: Layout


def run(call: Call, form: Form, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the recurrence on a contiguous `call`: o, what is asked for of S, o_sum and o_mean, and what is kept."""
    the = plan(form, save)
    o, ends = torch.empty_like(call.v), call.new_ends()
    room = new_room(call, form, the.kept) if save else []
    with queue_of(call.q.device) as queue:
        memory = memory_of(call, form, the, o, ends, room)
        for launch in the.launches:
            launch.starter(memory, queue)()
    return o, ends, room


@functools.lru_cache(maxsize=512)
def plan(form: Form, save: bool) -> Plan:
    """The plan of every call of a form."""
    cut = cuts_of(form, save)
    C, span = cut.block, -(-form.T // cut.block)
    if form.chunk:
        own = {**inverse(form), "D": cut.prepare_k, "SAVE": save}
        launches, blocks = [chunks(forward_kernel, form, cut, None, own)], chunk_blocks(form, C)
    else:
        own = {"WRITE": form.write, "SAVE": save}
        launches, blocks = [prepare(form, cut, span, keep=save, again=False)], window_blocks(form, C, span)
        launches.append(scan(scan_kernel, form, cut, span, own))
    parts = prepared(form, C, blocks)
    if not save:  # else it is kept
        parts["X"] = ((blocks, form.HV, C, C), form.kept) if form.correct else None
        parts["readouts"] = (readouts(form), torch.float32) if form.chunk else None
    return Plan(launches, layout(parts), kept(form))


def memory_of(call: Call, form: Form, the: Plan, o: Tensor, ends: list[Tensor], room: list[Tensor]) -> Memory:
    """What the kernels read, scratch memory, and what they write; of what is kept nothing if there is no room."""
    S1, sum1, mean1 = parted(ends)
    given = {
        **inputs(call, form, block_of(form, bool(room)), owned=not form.chunk),
        "S0": call.S,
        "sum0": call.o_sum,
        "mean0": call.o_mean,
        "o": o,
        "S1": S1,
        "sum1": sum1,
        "mean1": mean1,
        "counters": new_counters(form, call.q.device) if form.chunk else None,
    }
    scratch = (the.scratch, the.scratch.new(call.q))
    if not room:
        return Memory({**given, "states": None, "news": None}, scratch)
    return Memory({**given, "readouts": room[1] if form.chunk else None}, scratch, (the.kept, room[0]))
