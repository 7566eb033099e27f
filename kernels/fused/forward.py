"""The forward pass: `prepare` and `scan`, window after window.

A block of tokens does the same to any state, so all blocks of a window are prepared at once, and little is serial. A
sequence is one window; with a content gate a window is one content chunk, since only the outputs of a chunk say what
decays the next one has.

Shapes: HV value heads, V value dim, C slots in a block, N sequences, L content chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import cuts_of
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.launch import Launch, on_device, window
from hybridzoo.kernels.fused.room import n_chunks, n_rows
from hybridzoo.kernels.fused.scan import scan_kernel
from hybridzoo.kernels.fused.scratch import Tensors, inputs, new_blocks, prepare, scan, window_blocks
from hybridzoo.kernels.recurrence_op import Call


class Plan(NamedTuple):
    """How the pass goes: tokens of a block, blocks of a sequence in a window, windows, and the two launches."""

    C: int
    span: int
    windows: int
    ahead: Launch
    scan: Launch


def run(call: Call, form: Form, room: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence on a contiguous `call`: o, S, o_sum and o_mean, and with `save` a full `room`."""
    o, S, o_sum, o_mean = (torch.empty_like(x) for x in (call.v, call.S, call.o_sum, call.o_mean))
    with on_device(call.q.device):
        the = plan(form, save)
        found = tensors(call, form, the, room, save)
        found |= {"o": o, "S1": S, "sum1": o_sum, "mean1": o_mean}
        prepare_window, scan_window = the.ahead.starter(found), the.scan.starter(found)
        goes_on: dict[str, Tensor] = {}
        for at in range(the.windows):
            place = window(at * the.span, the.span)
            prepare_window(**place)
            scan_window(**place, **goes_on)
            goes_on = {"S0": S, "sum0": o_sum, "mean0": o_mean} if at == 0 else {}  # where the window before ended
    return o, S, o_sum, o_mean


@functools.lru_cache(maxsize=512)
def plan(form: Form, save: bool) -> Plan:
    """The plan of every call of a form."""
    cut = cuts_of(form, save)
    span, windows = -(-form.T // cut.block), 1
    if form.chunk:
        span, windows = form.chunk // cut.block, n_chunks(form)
    ahead = prepare(form, cut, span, keep=save, again=False)
    return Plan(cut.block, span, windows, ahead, scan(scan_kernel, form, cut, {"WRITE": form.write, "SAVE": save}))


def tensors(call: Call, form: Form, the: Plan, room: list[Tensor], save: bool) -> Tensors:
    """What the kernels read, scratch memory, and what they keep."""
    states, news, inverses, readouts = room
    C = the.C
    found = inputs(call, form, C)
    blocks = window_blocks(form, C, the.span)
    if not save:
        inverses = states.new_empty(blocks if form.correct else 0, form.HV, C, C)
        if form.chunk:
            readouts = call.q.new_empty(n_rows(form), form.HV, form.V + form.K, dtype=torch.float32)
    if found["rows"] is not None:
        readouts[found["rows"], :, : form.V] = call.o_mean
    return {
        **found,
        **new_blocks(call, form, C, blocks),
        "X": inverses if form.correct else None,
        "S0": call.S,
        "sum0": call.o_sum,
        "mean0": call.o_mean,
        "states": states,
        "news": news,
        "readouts": readouts if form.chunk else None,
    }
