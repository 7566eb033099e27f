"""The chunkwise backend as an operator (recurrence_op.py): from the tensors of a call to tiles, and back.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, N sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridzoo.kernels import chunkwise
from hybridzoo.kernels.chunkwise import Carry, Operands, Saved
from hybridzoo.kernels.recurrence_op import Call, delta_rule, register
from hybridzoo.kernels.state import ContentGate
from hybridzoo.kernels.tiles import MAX_TILE, Tiling, cut


def _forward(call: Call, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    tiling, x, content = _prepare(call)
    first, o_sum, o_mean = (tiling.sort(start) for start in _starts(call))
    S = first.contiguous()
    carry = Carry(S.flatten(0, 1), o_sum, o_mean)
    room = _room(call) if save else []
    saved = _saved(room, x, call.v) if save else None
    o = chunkwise.forward(x, tiling, carry, content, call.stored, saved)
    if saved is not None:
        _blank_rest(room, saved, tiling)
    # S itself, which its view in the carry has taken to the end: what a caller gets is nobody's view. Contiguous as the
    # fake says, whatever a caller's state was.
    wanted = (S, carry.o_sum, carry.o_mean)[: len(call.new_ends())]
    ends = [tiling.unsort(end).contiguous() for end in wanted]
    return tiling.join(o.unflatten(0, (-1, call.v.shape[2])), call.v.dtype), ends, room


def _backward(call: Call, room: list[Tensor], o: Tensor | None, d_results: list[Tensor | None]) -> list[Tensor | None]:
    tiling, x, content = _prepare(call)
    d_o, *d_ends = d_results
    d_out = torch.zeros_like(x.v) if d_o is None else tiling.cut(d_o, x.v.dtype).flatten(0, 1)
    starts = _starts(call)
    carry = [
        torch.zeros_like(start) if d is None else tiling.sort(d.to(start.dtype))
        for d, start in zip(d_ends, starts, strict=True)
    ]
    d_carry = Carry(carry[0].contiguous().flatten(0, 1), *carry[1:])
    grads = chunkwise.backward(x, tiling, _saved(room, x, call.v), d_out, d_carry, content, call.stored)

    def joined(d: Tensor | None, like: Tensor | None) -> Tensor | None:
        if d is None or like is None:
            return None
        d = d.unflatten(0, (-1, call.v.shape[2]))
        if d.shape[1] != like.shape[2]:  # value heads share a key head
            d = d.unflatten(1, (like.shape[2], -1)).sum(2)
        return tiling.join(d, like.dtype)

    d = grads.operands
    per_token = [
        joined(d.q * call.scale, call.q),
        joined(d.k, call.k),
        joined(d.v, call.v),
        joined(d.log_decay, call.log_decay),
        joined(d.erase, call.erase_logits),
        None if grads.down is None or call.down is None else grads.down.to(call.down.dtype).contiguous(),
        None if grads.up is None or call.up is None else grads.up.to(call.up.dtype).contiguous(),
        joined(d.correct, call.correct),
        joined(d.write, call.write),
    ]
    d_starts = (d_carry.S.view(starts[0].shape), d_carry.o_sum, d_carry.o_mean)
    given = (call.S, call.o_sum, call.o_mean)
    pairs = zip(d_starts, given, strict=True)
    return [*per_token, *(None if x is None else tiling.unsort(d).contiguous() for d, x in pairs)]


def _starts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """S, o_sum and o_mean that the call begins with: zero if fresh, and the latter two empty without a content gate."""
    N, (HV, V) = call.sequences, call.v.shape[2:]
    S = call.q.new_zeros(N, HV, call.q.shape[3], V, dtype=call.state_dtype) if call.S is None else call.S
    if call.o_sum is None or call.o_mean is None:
        tail = V if call.chunk else 0
        return S, S.new_zeros(N, HV, tail), S.new_zeros(N, HV, tail)
    return S, call.o_sum, call.o_mean


def _prepare(call: Call) -> tuple[Tiling, Operands, ContentGate | None]:
    """How the call is cut, its inputs cut so, and the content pair, in the dtype of the state."""
    B, T = call.q.shape[:2]
    dtype = call.state_dtype
    tiling = cut(B, T, call.cu_seqlens, call.chunk or None, call.count, call.q.device)
    gates = (call.log_decay, call.erase_logits, call.correct, call.write)
    content = None
    if call.down is not None and call.up is not None:
        content = ContentGate(call.down.to(dtype), call.up.to(dtype), call.chunk)
    return tiling, _cut_operands(tiling, dtype, call.scale, call.q, call.k, call.v, *gates), content


def _cut_operands(tiling: Tiling, dtype: torch.dtype, scale: float, q: Tensor, k: Tensor, v: Tensor,
                  *gates: Tensor | None) -> Operands:  # fmt: skip
    group = v.shape[2] // k.shape[2]
    keys = [tiling.cut(x, dtype).repeat_interleave(group, 1) if group > 1 else tiling.cut(x, dtype) for x in (q, k)]
    cut_gates = [None if gate is None else tiling.cut(gate, dtype).flatten(0, 1) for gate in gates]
    return Operands(
        (keys[0] * scale).flatten(0, 1), keys[1].flatten(0, 1), tiling.cut(v, dtype).flatten(0, 1), *cut_gates
    )


def _room(call: Call) -> list[Tensor]:
    """Upper bounds of what `Saved` holds, flat."""
    N, (T, K), (HV, V) = call.sequences, (call.q.shape[1], call.q.shape[3]), call.v.shape[2:]
    tokens = call.q.shape[0] * T
    if call.chunk:
        # A sequence may open with a chunk that its earlier calls left, and end with one that it leaves.
        chunks = (tokens + N * (2 * call.chunk - 2)) // call.chunk
        tiles = chunks * math.ceil(call.chunk / MAX_TILE)
    else:
        chunks = 0
        tiles = (tokens + N * (MAX_TILE - 1)) // MAX_TILE
    heads = tiles * HV
    inverse = 0 if call.correct is None else heads * MAX_TILE * MAX_TILE
    sizes = (heads * K * V, heads * MAX_TILE * V, inverse, chunks * HV * V)
    return [call.q.new_empty(size, dtype=call.state_dtype) for size in sizes]


def _saved(room: list[Tensor], x: Operands, v: Tensor) -> Saved:
    """Views of the front of each buffer in the shapes that this call needs."""
    (G, C, V), K, HV = x.v.shape, x.k.shape[2], v.shape[2]
    states, news, inverse, means = room
    return Saved(
        states=states[: G * K * V].view(G, K, V),
        news=news[: G * C * V].view(G, C, V),
        inverse=inverse[: G * C * C if inverse.numel() else 0].view(-1, C, C),
        means=means.view(-1, HV, V),
    )


def _blank_rest(room: list[Tensor], saved: Saved, tiling: Tiling) -> None:
    """Zero what the bounds left over, so that equal calls return equal tensors."""
    used = [part.numel() for part in saved[:3]] + [sum(map(len, tiling.closes)) * saved.means[0:1].numel()]
    for buffer, size in zip(room, used, strict=True):
        buffer[size:].zero_()


_forward_op = register("chunkwise_delta_rule", room=_room, forward=_forward, backward=_backward)
chunkwise_delta_rule = delta_rule(_forward_op)
