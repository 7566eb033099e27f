"""How a backend of the recurrence becomes one opaque operator with its own backward: compilers see a call, not a loop.

Flat for torch.library: no named tuples, and empty tensors where a backward pass has no gradient to give. What the
forward pass keeps for the backward one follows in size from shapes alone, since where packed sequences and content
chunks are cut is data.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.operators import define, dense_like, differentiate, first_order, without_gradient
from hybridzoo.kernels.state import ContentGate, DeltaState


class Call(NamedTuple):
    """One call, flat: its tensors as in `gated_delta_rule`, then its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase_logits: Tensor | None
    down: Tensor | None
    up: Tensor | None
    correct: Tensor | None
    write: Tensor | None
    S: Tensor
    o_sum: Tensor
    o_mean: Tensor
    count: Tensor  # type: ignore[assignment]
    cu_seqlens: Tensor | None
    stored: bool
    scale: float
    chunk: int  # L, 0 without a content gate
    qk_norm: bool  # q and k are still to be made of length one
    segments: int  # pieces of the backward pass, 0 to leave it to the backend

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields that are tensors, or None for one that is off."""
        return cast("tuple[Tensor | None, ...]", self[:N_TENSORS])


# The op's arguments that can have a gradient, and all that are tensors: the first fields of a Call.
N_FLOATS, N_TENSORS = 12, 14
# o, S, o_sum, o_mean and count come before what is kept.
N_RESULTS = 5

# What is kept: four tensors whose sizes follow from shapes; with `save` off, empty ones of the same dtypes.
Room = Callable[[Call, bool], list[Tensor]]
# From a call and its room (which it fills if `save`) to contiguous o, S, o_sum and o_mean.
Forward = Callable[[Call, list[Tensor], bool], tuple[Tensor, Tensor, Tensor, Tensor]]
# From a call, its room, o (None without `qk_norm`) and the gradients of o, S, o_sum and o_mean (None: zero) to those of
# the first twelve fields, contiguous, None for a gate that is off.
Backward = Callable[[Call, list[Tensor], Tensor | None, list[Tensor | None]], list[Tensor | None]]


class DeltaRule(Protocol):
    """`gated_delta_rule` on one backend, its arguments already checked."""

    def __call__(
        self,
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
        qk_norm: bool,
        segments: int,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, DeltaState]: ...


def delta_rule(operator: Any) -> DeltaRule:
    """Return the function that calls an `operator` made by `register`."""

    def run(
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
        qk_norm: bool,
        segments: int,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, DeltaState]:
        down, up, chunk = (None, None, 0) if content is None else content
        floats = (q, k, v, log_decay, erase_logits, down, up, correct, write, *state[:3])
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
        o, S, o_sum, o_mean, count, *_ = operator(
            *floats, state.count, cu_seqlens, predict == "stored", scale, chunk, qk_norm, segments, save
        )
        return o, DeltaState(S, o_sum, o_mean, count)

    return run


# Of the operators' schemas: what a token brings, and the fields of a DeltaState.
TOKENS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? erase_logits, Tensor? down, Tensor? up, Tensor? correct, "
    "Tensor? write"
)
STATE = "Tensor S, Tensor o_sum, Tensor o_mean, Tensor count"
_OPTIONS = "bool stored, float scale, int chunk, bool qk_norm, int segments"
_CALL = f"{TOKENS}, {STATE}, Tensor? cu_seqlens, {_OPTIONS}"


def register(name: str, *, room: Room, forward: Forward, backward: Backward) -> Any:
    """Register `hybridzoo::{name}` and `hybridzoo::{name}_backward`, with fakes and autograd; return the first.

    `room`, `forward` and `backward` are as the types above say. They see every call with autocast off.
    """

    @without_autocast
    def operator(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, save = arguments
        call = Call(*fields)
        kept = room(call, save)
        return *forward(call, kept, save), _new_count(call), *kept

    def fake_operator(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, save = arguments
        call = Call(*fields)
        ends = (dense_like(x) for x in (call.v, *call[9:13]))
        return *ends, *room(call, save)

    @without_autocast
    def backward_operator(*arguments: Any) -> list[Tensor]:
        *fields, kept, o, d_o, d_S, d_sum, d_mean = arguments
        gradients = backward(Call(*fields), kept, o, [d_o, d_S, d_sum, d_mean])
        return [fields[0].new_empty(0) if d is None else d for d in gradients]

    def fake_backward_operator(*arguments: Any) -> list[Tensor]:
        q = arguments[0]
        return [q.new_empty(0) if x is None else dense_like(x) for x in arguments[:N_FLOATS]]

    kept = "Tensor[] kept, Tensor? o, Tensor? d_o, Tensor? d_S, Tensor? d_sum, Tensor? d_mean"
    run = define(f"{name}({_CALL}, bool save) -> ({', '.join(['Tensor'] * 9)})", operator, fake_operator)
    run_back = define(f"{name}_backward({_CALL}, {kept}) -> Tensor[]", backward_operator, fake_backward_operator)

    first_back = first_order(
        run_back, "gated_delta_rule has no second derivative on this backend: use backend='reference'"
    )

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            output: tuple[Tensor, ...] = without_gradient(run, arguments)
            ctx.options = arguments[N_TENSORS:-1]
            qk_norm = ctx.options[3]  # whose gradient is read off the outputs
            ctx.save_for_backward(*arguments[:N_TENSORS], output[0] if qk_norm else None, *output[N_RESULTS:])
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[N_RESULTS - 1 :])
            return output

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: activation checkpointing gives them back a single time
            inputs, o, kept = saved[:N_TENSORS], saved[N_TENSORS], list(saved[N_TENSORS + 1 :])
            if inputs[0].numel() and not kept[0].numel():
                raise RuntimeError(
                    "gated_delta_rule kept nothing to go back on: its gradient was taken through a transform, such as "
                    "torch.func.vmap, that hid requires_grad from it; use backend='reference' there"
                )
            call = (*inputs, *ctx.options, kept, o, *d_outputs[: N_RESULTS - 1])
            gradients = first_back(*call)
            # count, cu_seqlens and the options have none.
            spare = [None] * (len(Call._fields) + 1 - N_FLOATS)
            return *(None if x is None else d for d, x in zip(gradients, inputs, strict=False)), *spare

    differentiate(run, Rule, N_FLOATS)
    return run


def _new_count(call: Call) -> Tensor:
    if not call.chunk:
        return call.count.clone()
    lengths = call.q.shape[1] if call.cu_seqlens is None else call.cu_seqlens.diff()
    return ((call.count + lengths) % call.chunk).to(call.count.dtype)
