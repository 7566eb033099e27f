"""The backward pass: windows from the last to the first; in each `scan_back`, then all other gradients.

What `prepare` made is made again, for a piece of the sequence at a time: scratch memory is that of a piece. Without a
content gate a piece is one window, and there are up to four. With one, a window is a content chunk: the gradient of
what a chunk's decays read reaches the outputs of the chunk before, which waits for it.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences,
L content chunk, r content rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.fused.config import Cuts, cuts_of, options, power
from hybridzoo.kernels.fused.gradients import gradients_kernel
from hybridzoo.kernels.fused.launch import Launch, cuts, flags, kind, on_device, rank, sizes
from hybridzoo.kernels.fused.room import n_chunks
from hybridzoo.kernels.fused.scan_back import scan_back_kernel
from hybridzoo.kernels.fused.scratch import (
    Blocks,
    Places,
    key_inputs,
    new_blocks,
    places,
    prepare,
    window,
    window_blocks,
)
from hybridzoo.kernels.recurrence_op import Call

MOST_PIECES = 4
# Blocks of all heads that a piece should have, for its kernels to fill a GPU.
LEAST_OF_A_PIECE = 4096
# Content chunks of a piece.
CHUNKS = 8


class Plan(NamedTuple):
    """How the pass is cut: blocks of a sequence in a window, windows, and windows in a piece."""

    span: int
    windows: int
    in_piece: int


class Content(NamedTuple):
    """What only a content gate has: `tanh` and its slope at each row, readouts' gradients by block and row, a sum's."""

    hidden: Tensor
    slopes: Tensor
    du_blocks: Tensor
    du_rows: Tensor
    d_sum: Tensor


def run(call: Call, room: list[Tensor], o: Tensor | None, d_results: list[Tensor]) -> list[Tensor | None]:
    """Run the backward pass on a contiguous `call`: its first twelve fields' gradients, None where one is off."""
    (ahead, back, *rest), buffers, content = launches(call, room, o, d_results)
    span, windows, in_piece = plan(call, cuts_of(call, True).block)
    with on_device(call.q.device):
        prepare_piece, scan_window, gradients = ahead.starter(), back.starter(), [step.starter() for step in rest]
        goes_on: dict[str, Tensor] = {}
        for at in reversed(range(windows)):
            origin = at // in_piece * in_piece * span
            place = {"first": at * span, "count": span, "origin": origin, "span": in_piece * span}
            if at == windows - 1 or (at + 1) % in_piece == 0:
                prepare_piece(**window(origin, in_piece * span))
            scan_window(**place, **goes_on)
            goes_on = {"dS1": buffers["dS0"]}  # where the window after ended
            for step in gradients:
                step(**place)
    d_down, d_up, d_sum, d_mean = None, None, *(d.clone() for d in d_results[2:])
    if content is not None:
        d_down, d_up, d_sum, d_mean = _content_gradients(call, room[3], content, d_mean, back.arguments["rows"])
    return [
        _joined(buffers["dq"], call.q),
        _joined(buffers["dk"], call.k),
        *(buffers["dv"], _added(buffers["dg"], call.log_decay), buffers["dz"], d_down, d_up),
        *(_added(buffers["de"], call.correct), buffers["dw"], buffers["dS0"]),
        *(d_sum, d_mean),
    ]


def plan(call: Call, C: int) -> Plan:
    """Cut the pass into windows and pieces."""
    if call.chunk:
        chunks = n_chunks(call)
        in_piece = -(-chunks // call.segments) if call.segments else CHUNKS
        return Plan(call.chunk // C, chunks, in_piece if call.cu_seqlens is None else 1)
    blocks = -(-call.q.shape[1] // C)
    pieces = 1
    if call.cu_seqlens is None:  # else a sequence's length is data
        heads = call.S.shape[0] * call.v.shape[2]
        pieces = min(blocks, call.segments or min(MOST_PIECES, blocks * heads // LEAST_OF_A_PIECE))
    span = max(1, -(-blocks // max(1, pieces)))
    return Plan(span, max(1, -(-blocks // span)), 1)


def launches(
    call: Call, room: list[Tensor], o: Tensor | None, d_results: list[Tensor]
) -> tuple[list[Launch], dict[str, Any], Content | None]:
    """The kernels, as the last window starts them; the gradients that they write; what a content gate needs."""
    cut = cuts_of(call, True)
    span, _, in_piece = plan(call, cut.block)
    where = places(call, cut.block)
    blocks = window_blocks(call, cut.block, in_piece * span)
    X = room[2] if call.correct is not None else None
    per_value_head = (*call.q.shape[:2], call.v.shape[2], call.q.shape[3])
    joined = torch.float32 if call.q.shape[2] != call.v.shape[2] else None  # summed over the value heads of a key head
    parts = power(call.q.shape[3]) // (cut.pairs_k if cut.apart else cut.states_k)

    def like(x: Tensor | None, *, over_channels: bool = False) -> Tensor | None:
        """Memory for the gradient of a gate; with `over_channels` one number a token is a sum, left in parts."""
        if x is not None and over_channels and x.ndim == 3:
            return x.new_empty(*x.shape, parts, dtype=torch.float32 if parts > 1 else x.dtype)
        return None if x is None else torch.empty_like(x)

    p = _Pass(
        call,
        cut,
        where,
        room,
        o,
        d_results,
        made=(made := new_blocks(call, cut, blocks, None)),
        content=_new_content(call, room[3], window_blocks(call, cut.block, span)) if call.chunk else None,
        gradients={
            "dq": call.q.new_empty(per_value_head, dtype=joined),
            "dk": call.q.new_empty(per_value_head, dtype=joined),
            "dv": torch.empty_like(call.v),
            "dg": like(call.log_decay, over_channels=True),
            "dz": like(call.erase_logits),
            "de": like(call.correct, over_channels=True),
            "dw": like(call.write),
            "dS0": torch.empty_like(call.S),
        },
        between={
            "dstates": room[0].new_empty(blocks, *room[0].shape[1:]),
            "dnews": room[1].new_empty(blocks, *room[1].shape[1:]),
        },
        steps={
            "dP": torch.empty_like(made.P) if cut.apart else None,
            "dA": torch.empty_like(made.P) if cut.apart and X is not None else None,
            "along": call.S.new_empty(blocks, call.v.shape[2], 2, cut.block) if cut.apart and call.qk_norm else None,
        },
    )
    ahead = prepare(call, cut, where, made, X, room[3], in_piece * span, keep=True, again=True)
    rest = [(True, False), (False, True)] if cut.apart else [(True, True)]
    every = [ahead, p.scan_back(), *(p.step(window_blocks(call, cut.block, span), *which) for which in rest)]
    return every, p.gradients, p.content


class _Pass(NamedTuple):
    """What the kernels of the pass share, and their launches, all for a window that is still to be said."""

    call: Call
    cut: Cuts
    where: Places
    room: list[Tensor]
    o: Tensor | None
    d_results: list[Tensor]
    made: Blocks
    content: Content | None
    gradients: dict[str, Any]
    between: dict[str, Tensor]
    steps: dict[str, Tensor | None]

    def scan_back(self) -> Launch:
        call, cut, made = self.call, self.cut, self.made
        d_o, d_S, d_sum, d_mean = self.d_results
        arguments = {
            **{name: value for name, value in made._asdict().items() if name != "U"},
            **self.where.of_sequences(),
            "down": call.down,
            "up": call.up,
            **self._content("slopes", "du_blocks", "du_rows", "d_sum"),
            "do": d_o,
            "dS1": d_S,
            "dsum1": d_sum,
            "dmean1": d_mean,
            "dS0": self.gradients["dS0"],
            **self.between,
            **window(0, 0),
            **sizes(call, "T", "HV", "K", "V"),
        }
        constants = {
            **cuts(call),
            **rank(call),
            "C": cut.block,
            "BK": power(call.q.shape[3]),
            "BV": cut.scan_v,
            "DECAYS": made.total is not None,
            "CORRECT": call.correct is not None,
            "STAGES": cut.scan_stages,
        }
        grid = (call.S.shape[0] * call.v.shape[2], triton.cdiv(call.v.shape[3], cut.scan_v))
        return Launch(scan_back_kernel, grid, arguments, constants, options(cut.scan_warps, cut.scan_stages))

    def step(self, blocks: int, of_states: bool, of_pairs: bool) -> Launch:
        """One step of the gradients, or both."""
        call, cut = self.call, self.cut
        mine, D, warps = cut.states_k, cut.states_k, cut.states_warps
        if not of_states:
            mine, D, warps = cut.pairs_mine, cut.pairs_k, cut.pairs_warps
        states, news, inverses, readouts = self.room
        arguments = {
            **key_inputs(call),
            "v": call.v,
            "w": call.write,
            **self.where._asdict(),
            "readouts": readouts if call.chunk else None,
            "states": states,
            "news": news,
            **self.between,
            "X": inverses if call.correct is not None else None,
            "o": self.o,
            "do": self.d_results[0],
            "d_qE": self.made.qE,
            "d_kZ": self.made.kZ,
            "d_eE": self.made.W,
            "d_total": self.made.total,
            **self.steps,
            **{name: d for name, d in self.gradients.items() if name != "dS0"},
            **self._content("d_sum", "du_blocks"),
            "scale": float(call.scale),
            **window(0, 0),
            **sizes(call, "T", "H", "HV", "K", "V"),
        }
        constants = {
            **flags(call),
            "C": cut.block,
            "BK": power(call.q.shape[3]),
            "BV": power(call.v.shape[3]),
            "MINE": mine,
            "D": D,
            "DV": cut.states_v,
            "STATES": of_states,
            "PAIRS": of_pairs,
            "WRITE": kind(call.write),
        }
        grid = (blocks * (power(call.q.shape[3]) // mine), call.v.shape[2])
        return Launch(gradients_kernel, grid, arguments, constants, options(warps))

    def _content(self, *names: str) -> dict[str, Tensor | None]:
        return {name: None if self.content is None else getattr(self.content, name) for name in names}


def _joined(d: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient `[B, T, HV, K]` over the value heads that share a key head."""
    H = like.shape[2]
    return d if d.shape[2] == H else d.unflatten(2, (H, -1)).sum(3).to(like.dtype)


def _added(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Add the parts of a gradient that is a sum over key channels."""
    if d is None or like is None or d.shape == like.shape:
        return d
    return d.squeeze(3) if d.shape[3] == 1 else d.sum(3).to(like.dtype)


def _new_content(call: Call, readouts: Tensor, blocks: int) -> Content:
    (HV, V), K = call.v.shape[2:], call.q.shape[3]
    x = torch.einsum("hrv,nhv->nhr", call.down, readouts[..., :V]).contiguous()
    return Content(
        hidden=torch.tanh(x),
        slopes=torch.cosh(x) ** -2,  # 1 - tanh^2 has no digits left where tanh is near 1
        du_blocks=readouts.new_zeros(blocks, HV, K),
        du_rows=readouts.new_zeros(readouts.shape[0], HV, K),
        d_sum=torch.empty_like(call.o_sum),
    )


def _content_gradients(
    call: Call, readouts: Tensor, content: Content, d_mean1: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the content pair, and of the sum and the mean that the call started from."""
    assert call.down is not None
    assert call.up is not None
    means, du = readouts[..., : call.v.shape[3]], content.du_rows
    du[rows] = content.du_blocks.unflatten(0, (call.S.shape[0], -1)).sum(1)  # the first chunk's, the last to be known
    d_hidden = torch.einsum("hkr,nhk->nhr", call.up, du) * content.slopes
    lengths = call.q.shape[1] if call.cu_seqlens is None else call.cu_seqlens.diff()
    unread = (call.count + lengths < call.chunk)[:, None, None]  # no chunk was closed: the mean went through
    d_mean = torch.einsum("nhr,hrv->nhv", d_hidden[rows], call.down) + torch.where(unread, d_mean1, 0.0)
    d_down, d_up = torch.einsum("nhr,nhv->hrv", d_hidden, means), torch.einsum("nhk,nhr->hkr", du, content.hidden)
    return d_down.contiguous(), d_up.contiguous(), content.d_sum, d_mean.contiguous()
