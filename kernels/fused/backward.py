"""The backward pass: up to four windows of the sequence, from the last to the first.

In each what `prepare` made is made again, so that scratch memory is that of a window; then `scan_back`, and all other
gradients. With a content gate the gradient of what a chunk's decays read reaches the outputs of the chunk before, which
waits for it: one launch then goes from chunk to chunk (content.py).

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences,
L content chunk, r content rank.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, cuts_of, options, power
from hybridzoo.kernels.fused.content import backward_kernel
from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.gradients import gradients_kernel
from hybridzoo.kernels.fused.launch import Launch, flags, numbers, queue_of, window
from hybridzoo.kernels.fused.memory import Layout, Memory, Part, layout
from hybridzoo.kernels.fused.room import kept, n_rows
from hybridzoo.kernels.fused.scan_back import scan_back_kernel
from hybridzoo.kernels.fused.scratch import (
    chunk_blocks,
    chunks,
    inputs,
    new_counters,
    prepare,
    prepared,
    scan,
    window_blocks,
)
from hybridzoo.kernels.recurrence_op import Call

MOST_WINDOWS = 4
# Blocks of all heads that a window should have, for its kernels to fill a GPU; with a content gate, whose blocks are
# shorter and whose heads fill it by themselves, fewer: another window is two launches, and less scratch memory.
LEAST_OF_A_WINDOW, LEAST_WITH_CONTENT = 4096, 3072


# The gradients of o, S, o_sum and o_mean, dense; of the last three None where the final state has none, and of the last
# two without a content gate.
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Plan(NamedTuple):
    """How the pass goes: blocks of a sequence in a window, windows, the cut, what is launched in each, and the layouts
    of scratch memory and of what was kept."""

    span: int
    windows: int
    cut: Cuts
    launches: list[Launch]
    scratch: Layout
    kept: Layout


def run(call: Call, form: Form, room: list[Tensor], o: Tensor | None, d_results: Results) -> list[Tensor | None]:
    """Run the backward pass on a contiguous `call`: its first twelve fields' gradients, None where one is off."""
    with queue_of(call.q.device) as queue:
        the = plan(form)
        memory = memory_of(call, form, the, room)
        ahead = the.launches[0].starter(memory, queue)
        ahead(**window((the.windows - 1) * the.span, the.span))  # the GPU has work while the host asks for the rest
        counters = new_counters(form, call.q.device, the.windows) if form.chunk else None
        found = gradients(call, form, the)
        memory.add({**results(o, d_results), **found, "counters": counters})
        back, *steps = [launch.starter(memory, queue) for launch in the.launches[1:]]
        for at in reversed(range(the.windows)):
            place = window(at * the.span, the.span)
            counts = {} if counters is None else {"counters": counters[at]}
            if at + 1 < the.windows:
                ahead(**place)
            back(**place, **counts, later=int(at + 1 < the.windows))
            for step in steps:
                step(**place)
        du_rows = found["du_rows"]
        d_down, d_up = (None, None) if du_rows is None else _content_gradients(form, room[1], du_rows)
        return [
            _joined(found["dq"], call.q),
            _joined(found["dk"], call.k),
            *(found["dv"], _added(found["dg"], call.log_decay), found["dz"], d_down, d_up),
            *(_added(found["de"], call.correct), found["dw"]),
            None if call.S is None else found["dS0"],
            None if call.o_sum is None else found["d_sum"],
            None if call.o_mean is None else found["dmean0"],
        ]


@functools.lru_cache(maxsize=512)
def plan(form: Form) -> Plan:
    """The plan of every call of a form."""
    cut = cuts_of(form, True)
    unit = max(1, form.chunk // cut.block)  # blocks that are in one window
    tokens = form.T + form.chunk - 1 if form.chunk else form.T  # with those of a chunk that was open
    blocks, windows = -(-tokens // (unit * cut.block)) * unit, 1
    if not form.packed:  # else a sequence's length is data
        least = LEAST_WITH_CONTENT if form.chunk else LEAST_OF_A_WINDOW
        windows = min(blocks, form.segments or min(MOST_WINDOWS, blocks * form.N * form.HV // least))
    span = max(1, -(-blocks // (unit * max(1, windows)))) * unit
    windows = max(1, -(-blocks // span))
    launches = [prepare(form, cut, span, keep=True, again=True)]
    if form.chunk:
        own = {"STATES_K": cut.states_k, "STATES_V": cut.states_v, "PAIRS_K": cut.pairs_k}
        launches += [chunks(backward_kernel, form, cut, span, own, later=0)]
    else:
        steps = [(True, False), (False, True)] if cut.apart else [(True, True)]
        launches += [scan(scan_back_kernel, form, cut, span, {}, later=0)]
        launches += [_gradients(form, cut, span, *which) for which in steps]
    return Plan(span, windows, cut, launches, _scratch(form, cut, span), kept(form))


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


def _scratch(form: Form, cut: Cuts, span: int) -> Layout:
    """What `prepare` makes, the gradients of states and of N, and what one step of the gradients leaves for the other,
    some of it where it was prepared."""
    C, blocks = cut.block, window_blocks(form, cut.block, span)

    def each(*shape: int, dtype: torch.dtype = form.kept) -> Part:
        return (blocks, form.HV, *shape), dtype

    parts: dict[str, Part] = {
        **prepared(form, C, blocks),
        "dstates": each(form.V, form.K),
        "dnews": each(C, form.V),
        "dP": each(C, C) if cut.apart else None,
        "dA": each(C, C) if cut.apart and form.correct else None,
        "along": each(2, C, dtype=torch.float32) if cut.apart and form.qk_norm else None,
        # Of a chunk's readout, by block.
        "du_blocks": ((chunk_blocks(form, C), form.HV, form.K), torch.float32) if form.chunk else None,
    }
    if not cut.apart:
        return layout(parts | dict.fromkeys(("d_qE", "d_kZ", "d_eE", "d_total")))
    return layout(parts, {"d_qE": "qE", "d_kZ": "kZ", "d_eE": "W", "d_total": "total"})


def gradients(call: Call, form: Form, the: Plan) -> dict[str, Tensor | None]:
    """Memory for the gradients that the kernels write."""
    new = call.q.new_empty
    joined = torch.float32 if form.H != form.HV else None  # summed over the value heads of a key head
    parts = power(form.K) // (the.cut.pairs_k if the.cut.apart else the.cut.states_k)
    content = form.chunk > 0
    sums, rows = (form.N, form.HV, form.V), (n_rows(form), form.HV, form.K + form.rank)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty_like(x)

    def added(x: Tensor | None) -> Tensor | None:
        """Memory for the gradient of a gate; of one number a token it is a sum over key channels, left in parts."""
        if x is None or x.ndim == 4:
            return like(x)
        return x.new_empty(*x.shape, parts, dtype=torch.float32 if parts > 1 else x.dtype)

    return {
        "dq": new(form.B, form.T, form.HV, form.K, dtype=joined),
        "dk": new(form.B, form.T, form.HV, form.K, dtype=joined),
        "dv": like(call.v),
        "dg": added(call.log_decay),
        "dz": like(call.erase_logits),
        "de": added(call.correct),
        "dw": like(call.write),
        "dS0": new(form.N, form.HV, form.K, form.V, dtype=torch.float32),
        "d_sum": new(*sums, dtype=torch.float32) if content else None,
        "dmean0": new(*sums, dtype=torch.float32) if content else None,
        # Of a chunk's readout and of the `tanh` that leads to it: zeros where no chunk is.
        "du_rows": call.q.new_zeros(rows, dtype=torch.float32) if content else None,
    }


def memory_of(call: Call, form: Form, the: Plan, room: list[Tensor]) -> Memory:
    """The call's inputs, what was kept of it, and scratch memory: all that `prepare` takes."""
    given = {**inputs(call, form, the.cut.block), "readouts": room[1] if form.chunk else None}
    return Memory(given, (the.scratch, the.scratch.new(call.q)), (the.kept, room[0]))


def results(o: Tensor | None, d_results: Results) -> dict[str, Tensor | None]:
    """The outputs and the gradients that came back, as kernels name them."""
    d_o, d_S, d_sum, d_mean = d_results
    return {"o": o, "do": d_o, "dS1": d_S, "dsum1": d_sum, "dmean1": d_mean}


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


def _content_gradients(form: Form, readouts: Tensor, du_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the content pair, `[HV, r, V]` and `[HV, K, r]`."""
    means, _, hidden, _ = readouts.transpose(0, 1).split((form.V, form.K, form.rank, form.rank), 2)
    du, d_hidden = du_rows.transpose(0, 1).split((form.K, form.rank), 2)
    return torch.bmm(d_hidden.mT, means), torch.bmm(du.mT, hidden)
