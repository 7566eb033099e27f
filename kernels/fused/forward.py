"""The forward pass: `prepare` and `scan`, window after window.

A block of tokens does the same to any state, so all blocks of a window are prepared at once, and little is serial. A
sequence is one window; with a content gate a window is one content chunk, since only the outputs of a chunk say what
decays the next one has.

Shapes: HV value heads, V value dim, C slots in a block, N sequences, L content chunk.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.fused.config import cuts_of, options, power
from hybridzoo.kernels.fused.launch import Launch, cuts, on_device, sizes
from hybridzoo.kernels.fused.room import n_chunks, n_rows
from hybridzoo.kernels.fused.scan import scan_kernel
from hybridzoo.kernels.fused.scratch import new_blocks, places, prepare, window, window_blocks
from hybridzoo.kernels.recurrence_op import Call


def run(call: Call, room: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence on a contiguous `call`: o, S, o_sum and o_mean, and with `save` a full `room`."""
    o, S, o_sum, o_mean = (torch.empty_like(x) for x in (call.v, call.S, call.o_sum, call.o_mean))
    ahead, scan = launches(call, room, save, o, S, o_sum, o_mean)
    span, windows = windows_of(call, cuts_of(call, save).block)
    with on_device(call.q.device):
        prepare_window, scan_window = ahead.starter(), scan.starter()
        goes_on: dict[str, Tensor] = {}
        for at in range(windows):
            prepare_window(**window(at * span, span))
            scan_window(**window(at * span, span), **goes_on)
            goes_on = {"S0": S, "sum0": o_sum, "mean0": o_mean}  # where the window before ended
    return o, S, o_sum, o_mean


def windows_of(call: Call, C: int) -> tuple[int, int]:
    """How many blocks of a sequence a window of the forward pass has, and how many windows there are."""
    if call.chunk:
        return call.chunk // C, n_chunks(call)
    return -(-call.q.shape[1] // C), 1


def launches(
    call: Call, room: list[Tensor], save: bool, o: Tensor, S: Tensor, o_sum: Tensor, o_mean: Tensor
) -> tuple[Launch, Launch]:
    """The two kernels, as the first window starts them."""
    states, news, inverses, readouts = room
    HV, V, corrected = call.v.shape[2], call.v.shape[3], call.correct is not None
    cut = cuts_of(call, save)
    span, _ = windows_of(call, cut.block)
    where = places(call, cut.block)
    blocks = window_blocks(call, cut.block, span)
    if not save:
        inverses = states.new_empty(blocks if corrected else 0, HV, cut.block, cut.block)
        readouts = call.q.new_empty(n_rows(call), HV, V + call.q.shape[3], dtype=torch.float32)
    if where.rows is not None:
        readouts[where.rows, :, :V] = call.o_mean
    # Where nothing is corrected U is N, which the backward pass reads.
    U = news if save and not corrected else states.new_empty(blocks, HV, cut.block, V)
    made = new_blocks(call, cut, blocks, U)
    ahead = prepare(call, cut, where, made, inverses if corrected else None, readouts, span, keep=save, again=False)
    scan = Launch(
        scan_kernel,
        (call.S.shape[0] * HV, triton.cdiv(V, cut.scan_v)),
        {
            **made._asdict(),
            **where.of_sequences(),
            "S0": call.S,
            "sum0": call.o_sum,
            "mean0": call.o_mean,
            "o": o,
            "S1": S,
            "sum1": o_sum,
            "mean1": o_mean,
            "states": states,
            "news": news if corrected else None,
            "readouts": readouts if call.chunk else None,
            **window(0, span),
            **sizes(call, "T", "HV", "K", "V"),
        },
        {
            **cuts(call),
            "C": cut.block,
            "BK": power(call.q.shape[3]),
            "BV": cut.scan_v,
            "DECAYS": made.total is not None,
            "CORRECT": corrected,
            "SAVE": save,
            "STAGES": cut.scan_stages,
        },
        options(cut.scan_warps, cut.scan_stages),
    )
    return ahead, scan
