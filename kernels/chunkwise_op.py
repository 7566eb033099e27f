"""The chunkwise backend as one opaque operator, so that a compiler sees a call and not a loop over tiles.

Flat for torch.library: no named tuples, and empty tensors where a backward pass has no gradient to give. Sizes of what
the forward pass keeps are upper bounds that follow from shapes alone, since where packed sequences and content chunks
are cut is data.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, N sequences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels import chunkwise
from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.chunkwise import Carry, Operands, Saved
from hybridzoo.kernels.state import ContentGate, DeltaState
from hybridzoo.kernels.tiles import MAX_TILE, Tiling, cut


def chunkwise_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    content: ContentGate | None,
    correct: Tensor | None,
    write: Tensor | None,
    state: DeltaState,
    *,
    predict: str,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, DeltaState]:
    """Run `gated_delta_rule` in its chunkwise form; arguments and results are as there, already checked."""
    down, up, chunk = (None, None, 0) if content is None else content
    floats = (q, k, v, log_decay, erase_logits, down, up, correct, write, *state[:3])
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    o, S, o_sum, o_mean, count, *_ = _forward_op(
        *floats, state.count, cu_seqlens, predict == "stored", scale, chunk, save
    )
    return o, DeltaState(S, o_sum, o_mean, count)


@torch.library.custom_op("hybridzoo::chunkwise_delta_rule", mutates_args=())
@without_autocast
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    correct: Tensor | None,
    write: Tensor | None,
    S: Tensor,
    o_sum: Tensor,
    o_mean: Tensor,
    count: Tensor,
    cu_seqlens: Tensor | None,
    stored: bool,
    scale: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = S.dtype
    B, T = q.shape[:2]
    tiling = cut(B, T, cu_seqlens, chunk or None, count)
    x = _cut_operands(tiling, dtype, scale, q, k, v, log_decay, erase_logits, correct, write)
    content = _content(down, up, chunk, dtype)
    carry = Carry(tiling.sort(S).contiguous().flatten(0, 1), tiling.sort(o_sum), tiling.sort(o_mean))
    room = [x.v.new_empty(size) for size in _sizes(q, v, correct, count, chunk, save)]
    saved = _saved(room, x, v) if save else None
    o = chunkwise.forward(x, tiling, carry, content, stored, saved)
    if saved is not None:
        _blank_rest(room, saved, tiling)
    ends = (tiling.unsort(end).contiguous() for end in (carry.S.view(S.shape), carry.o_sum, carry.o_mean))
    S, o_sum, o_mean = ends  # contiguous as the fake says, whatever a caller's state was
    o = tiling.join(o.unflatten(0, (-1, v.shape[2])), v.dtype)
    return o, S, o_sum, o_mean, _new_count(count, cu_seqlens, T, chunk), *room  # type: ignore[return-value]


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, erase_logits: Any, down: Any, up: Any, correct: Any, write: Any,
    S: Tensor, o_sum: Tensor, o_mean: Tensor, count: Tensor, cu_seqlens: Any, stored: bool, scale: float, chunk: int,
    save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    ends = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, S, o_sum, o_mean, count))
    return *ends, *(S.new_empty(size) for size in _sizes(q, v, correct, count, chunk, save))


@torch.library.custom_op("hybridzoo::chunkwise_delta_rule_backward", mutates_args=())
@without_autocast
def _backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    correct: Tensor | None,
    write: Tensor | None,
    S: Tensor,
    o_sum: Tensor,
    o_mean: Tensor,
    count: Tensor,
    cu_seqlens: Tensor | None,
    stored: bool,
    scale: float,
    chunk: int,
    room: list[Tensor],
    d_o: Tensor | None,
    d_S: Tensor | None,
    d_sum: Tensor | None,
    d_mean: Tensor | None,
) -> list[Tensor]:
    dtype = S.dtype
    B, T = q.shape[:2]
    tiling = cut(B, T, cu_seqlens, chunk or None, count)
    x = _cut_operands(tiling, dtype, scale, q, k, v, log_decay, erase_logits, correct, write)
    d_out = torch.zeros_like(x.v) if d_o is None else tiling.cut(d_o, dtype).flatten(0, 1)
    ends = ((d_S, S), (d_sum, o_sum), (d_mean, o_mean))
    carry = [torch.zeros_like(end) if d is None else tiling.sort(d.to(dtype)) for d, end in ends]
    d_carry = Carry(carry[0].contiguous().flatten(0, 1), *carry[1:])
    content = _content(down, up, chunk, dtype)
    grads = chunkwise.backward(x, tiling, _saved(room, x, v), d_out, d_carry, content, stored)

    def joined(d: Tensor | None, like: Tensor | None) -> Tensor:
        if d is None or like is None:
            return q.new_empty(0)
        d = d.unflatten(0, (-1, v.shape[2]))
        if d.shape[1] != like.shape[2]:  # value heads share a key head
            d = d.unflatten(1, (like.shape[2], -1)).sum(2)
        return tiling.join(d, like.dtype)

    d = grads.operands
    per_token = [
        joined(d.q * scale, q),
        joined(d.k, k),
        joined(d.v, v),
        joined(d.log_decay, log_decay),
        joined(d.erase, erase_logits),
        q.new_empty(0) if grads.down is None or down is None else grads.down.to(down.dtype).contiguous(),
        q.new_empty(0) if grads.up is None or up is None else grads.up.to(up.dtype).contiguous(),
        joined(d.correct, correct),
        joined(d.write, write),
    ]
    starts = (d_carry.S.view(S.shape), d_carry.o_sum, d_carry.o_mean)
    return [*per_token, *(tiling.unsort(start).contiguous() for start in starts)]


@_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, erase_logits: Any, down: Any, up: Any, correct: Any, write: Any,
    S: Tensor, o_sum: Tensor, o_mean: Tensor, count: Tensor, cu_seqlens: Any, stored: bool, scale: float, chunk: int,
    room: list[Tensor], d_o: Any, d_S: Any, d_sum: Any, d_mean: Any,
) -> list[Tensor]:  # fmt: skip
    inputs = (q, k, v, log_decay, erase_logits, down, up, correct, write, S, o_sum, o_mean)
    return [q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.stored, ctx.scale, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors, *output[5:])
    ctx.n_inputs = len(tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[4], *output[5:])


def _backward(ctx: Any, d_o: Tensor | None, d_S: Any, d_sum: Any, d_mean: Any, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them back a single time
    inputs, room = saved[: ctx.n_inputs], list(saved[ctx.n_inputs :])
    if inputs[0].numel() and not room[0].numel():
        raise RuntimeError(
            "gated_delta_rule kept nothing to go back on: its gradient was taken through a transform, such as "
            "torch.func.vmap, that hid requires_grad from it; use backend='reference' there"
        )
    grads = _backward_op(*inputs, ctx.stored, ctx.scale, ctx.chunk, room, d_o, d_S, d_sum, d_mean)
    # count, cu_seqlens and the four options have none.
    return *(None if x is None else d for d, x in zip(grads, inputs, strict=False)), *([None] * 6)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _cut_operands(tiling: Tiling, dtype: torch.dtype, scale: float, q: Tensor, k: Tensor, v: Tensor,
                  *gates: Tensor | None) -> Operands:  # fmt: skip
    group = v.shape[2] // k.shape[2]
    keys = [tiling.cut(x, dtype).repeat_interleave(group, 1) if group > 1 else tiling.cut(x, dtype) for x in (q, k)]
    cut_gates = [None if gate is None else tiling.cut(gate, dtype).flatten(0, 1) for gate in gates]
    return Operands(
        (keys[0] * scale).flatten(0, 1), keys[1].flatten(0, 1), tiling.cut(v, dtype).flatten(0, 1), *cut_gates
    )


def _content(down: Tensor | None, up: Tensor | None, chunk: int, dtype: torch.dtype) -> ContentGate | None:
    return None if down is None or up is None else ContentGate(down.to(dtype), up.to(dtype), chunk)


def _new_count(count: Tensor, cu_seqlens: Tensor | None, T: int, chunk: int) -> Tensor:
    if not chunk:
        return count.clone()
    lengths = T if cu_seqlens is None else cu_seqlens.diff()
    return ((count + lengths) % chunk).to(count.dtype)


def _sizes(q: Tensor, v: Tensor, correct: Tensor | None, count: Tensor, chunk: int, save: bool) -> list[int]:
    """Upper bounds, in elements, of what `Saved` holds: functions of shapes alone, so that they can be traced."""
    if not save:
        return [0, 0, 0, 0]
    N, (T, K), (HV, V) = count.shape[0], (q.shape[1], q.shape[3]), v.shape[2:]
    tokens = q.shape[0] * T
    if chunk:
        # A sequence may open with a chunk that its earlier calls left, and end with one that it leaves.
        chunks = (tokens + N * (2 * chunk - 2)) // chunk
        tiles = chunks * math.ceil(chunk / MAX_TILE)
    else:
        chunks = 0
        tiles = (tokens + N * (MAX_TILE - 1)) // MAX_TILE
    heads = tiles * HV
    inverse = 0 if correct is None else heads * MAX_TILE * MAX_TILE
    return [heads * K * V, heads * MAX_TILE * V, inverse, chunks * HV * V]


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
