"""The backward pass: up to four windows of the sequence, from the last to the first.

In each what `prepare` made is made again, so that scratch memory is that of a window; then `scan_back`, and all other
gradients. With a content gate the gradient of what a chunk's decays read reaches the outputs of the chunk before, which
waits for it: one launch then goes from chunk to chunk (content.py).

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences,
L content chunk, r content rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, cuts_of, options, power
from hybridzoo.kernels.fused.content import backward_kernel
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.gradients import gradients_kernel
from hybridzoo.kernels.fused.launch import Launch, flags, numbers, on_device, window
from hybridzoo.kernels.fused.room import n_rows
from hybridzoo.kernels.fused.scan_back import scan_back_kernel
from hybridzoo.kernels.fused.scratch import (
    Tensors,
    chunk_blocks,
    chunks,
    inputs,
    new_blocks,
    new_counters,
    prepare,
    scan,
    window_blocks,
)
from hybridzoo.kernels.recurrence_op import Call

MOST_WINDOWS = 4
# Blocks of all heads that a window should have, for its kernels to fill a GPU.
LEAST_OF_A_WINDOW = 4096


# The gradients of o, S, o_sum and o_mean, dense; of the last two only with a content gate.
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Plan(NamedTuple):
    """How the pass goes: blocks of a sequence in a window, windows, the cut, and what is launched in each."""

    span: int
    windows: int
    cut: Cuts
    launches: list[Launch]


def run(call: Call, form: Form, room: list[Tensor], o: Tensor | None, d_results: Results) -> list[Tensor | None]:
    """Run the backward pass on a contiguous `call`: its first twelve fields' gradients, None where one is off."""
    with on_device(call.q.device):
        the = plan(form)
        found = tensors(call, form, the, room, o, d_results)
        counters = new_counters(form, call.q.device, the.windows) if form.chunk else None
        found |= {"counters": counters, "d_sum": torch.empty_like(call.o_sum), "dmean0": torch.empty_like(call.o_mean)}
        ahead, back, *steps = [launch.starter(found) for launch in the.launches]
        goes_on: dict[str, Tensor | None] = {}
        for at in reversed(range(the.windows)):
            place = window(at * the.span, the.span)
            ahead(**place)
            if counters is not None:
                goes_on["counters"] = counters[at]
            back(**place, **goes_on)
            for step in steps:
                step(**place)
            goes_on = {"dS1": found["dS0"]}  # where the window after ended
            if form.chunk:
                goes_on["dmean1"] = found["dmean0"]
        du_rows = found["du_rows"]
        d_down, d_up = (None, None) if du_rows is None else _content_gradients(form, room[3], du_rows)
        return [
            _joined(found["dq"], call.q),
            _joined(found["dk"], call.k),
            *(found["dv"], _added(found["dg"], call.log_decay), found["dz"], d_down, d_up),
            *(_added(found["de"], call.correct), found["dw"], found["dS0"], found["d_sum"], found["dmean0"]),
        ]


@functools.lru_cache(maxsize=512)
def plan(form: Form) -> Plan:
    """The plan of every call of a form."""
    cut = cuts_of(form, True)
    unit = max(1, form.chunk // cut.block)  # blocks that are in one window
    tokens = form.T + form.chunk - 1 if form.chunk else form.T  # with those of a chunk that was open
    blocks, windows = -(-tokens // (unit * cut.block)) * unit, 1
    if not form.packed:  # else a sequence's length is data
        windows = min(blocks, form.segments or min(MOST_WINDOWS, blocks * form.N * form.HV // LEAST_OF_A_WINDOW))
    span = max(1, -(-blocks // (unit * max(1, windows)))) * unit
    launches = [prepare(form, cut, span, keep=True, again=True)]
    if form.chunk:
        own = {"STATES_K": cut.states_k, "STATES_V": cut.states_v, "PAIRS_K": cut.pairs_k}
        launches += [chunks(backward_kernel, form, cut, span, own)]
    else:
        steps = [(True, False), (False, True)] if cut.apart else [(True, True)]
        launches += [scan(scan_back_kernel, form, cut, span, {})]
        launches += [_gradients(form, cut, span, *which) for which in steps]
    return Plan(span, max(1, -(-blocks // span)), cut, launches)


def _gradients(form: Form, cut: Cuts, span: int, of_states: bool, of_pairs: bool) -> Launch:
    """One step of the gradients, or both."""
    mine, D, warps = cut.states_k, cut.states_k, cut.states_warps
    if not of_states:
        mine, D, warps = power(form.K), cut.pairs_k, cut.pairs_warps
    constants = {
        **flags(form),
        "C": cut.block,
        "BK": power(form.K),
        "BV": power(form.V),
        "MINE": mine,
        "D": D,
        "DV": cut.states_v,
        "STATES": of_states,
        "PAIRS": of_pairs,
        "WRITE": form.write,
    }
    grid = (window_blocks(form, cut.block, span) * (power(form.K) // mine), form.HV)
    return Launch(gradients_kernel, grid, numbers(form, span), constants, options(warps), form.kinds)


def tensors(call: Call, form: Form, the: Plan, room: list[Tensor], o: Tensor | None, d_results: Results) -> Tensors:
    """What the kernels read, scratch memory, and the gradients that they write."""
    states, news, inverses, readouts = room
    d_o, d_S, d_sum, d_mean = d_results
    cut = the.cut
    C, blocks = cut.block, window_blocks(form, cut.block, the.span)
    made = new_blocks(call, form, C, blocks)
    joined = torch.float32 if form.H != form.HV else None  # summed over the value heads of a key head
    parts = power(form.K) // (cut.pairs_k if cut.apart else cut.states_k)

    def new(*shape: int, dtype: torch.dtype = form.kept) -> Tensor:
        return call.q.new_empty(blocks, form.HV, *shape, dtype=dtype)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty_like(x)

    def added(x: Tensor | None) -> Tensor | None:
        """Memory for the gradient of a gate; of one number a token it is a sum over key channels, left in parts."""
        if x is None or x.ndim == 4:
            return like(x)
        return x.new_empty(*x.shape, parts, dtype=torch.float32 if parts > 1 else x.dtype)

    return {
        **inputs(call, form, C),
        **made,
        **_content(call, form, the),
        "X": inverses if form.correct else None,
        "readouts": readouts if form.chunk else None,
        "states": states,
        "news": news,
        "o": o,
        "do": d_o,
        "dS1": d_S,
        "dsum1": d_sum,
        "dmean1": d_mean,
        "dstates": new(form.V, form.K),
        "dnews": new(C, form.V),
        # What the first step of the gradients leaves for the second, some of it where it was prepared.
        "d_qE": made["qE"] if cut.apart else None,
        "d_kZ": made["kZ"] if cut.apart else None,
        "d_eE": made["W"] if cut.apart else None,
        "d_total": made["total"] if cut.apart else None,
        "dP": new(C, C) if cut.apart else None,
        "dA": new(C, C) if cut.apart and form.correct else None,
        "along": new(2, C, dtype=torch.float32) if cut.apart and form.qk_norm else None,
        "dq": call.q.new_empty(form.B, form.T, form.HV, form.K, dtype=joined),
        "dk": call.q.new_empty(form.B, form.T, form.HV, form.K, dtype=joined),
        "dv": like(call.v),
        "dg": added(call.log_decay),
        "dz": like(call.erase_logits),
        "de": added(call.correct),
        "dw": like(call.write),
        "dS0": like(call.S),
    }


def _joined(d: Tensor | None, like: Tensor) -> Tensor | None:
    """Sum a gradient `[B, T, HV, K]` over the value heads that share a key head."""
    if d is None or d.shape == like.shape:
        return d
    return d.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def _added(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Add the parts of a gradient that is a sum over key channels."""
    if d is None or like is None or d.shape == like.shape:
        return d
    return d.squeeze(3) if d.shape[3] == 1 else d.sum(3).to(like.dtype)


def _content(call: Call, form: Form, the: Plan) -> Tensors:
    """Memory that only a content gate needs: gradients of a chunk's readout by block; of all, and of `tanh`, by row."""
    if not form.chunk:
        return {"du_blocks": None, "du_rows": None}

    def new(fill: Callable[..., Tensor], rows: int, size: int) -> Tensor:
        return fill(rows, form.HV, size, device=call.q.device, dtype=torch.float32)

    return {
        "du_blocks": new(torch.empty, chunk_blocks(form, the.cut.block), form.K),
        "du_rows": new(torch.zeros, n_rows(form), form.K + form.rank),
    }


def _content_gradients(form: Form, readouts: Tensor, du_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the content pair, `[HV, r, V]` and `[HV, K, r]`."""
    means, _, hidden, _ = readouts.transpose(0, 1).split((form.V, form.K, form.rank, form.rank), 2)
    du, d_hidden = du_rows.transpose(0, 1).split((form.K, form.rank), 2)
    return torch.bmm(d_hidden.mT, means), torch.bmm(du.mT, hidden)
