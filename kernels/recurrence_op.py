"""How a backend of the recurrence becomes one opaque operator with its own backward: compilers see a call, not a loop.

Flat for torch.library: no named tuples. A fresh state is no tensors, and what nobody asked for is not returned: in a
small call each such tensor would take as long as a part of the arithmetic. What the forward pass keeps for the backward
one follows in size from shapes alone, since where packed sequences and content chunks are cut is data.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.operators import Operator, below_autograd, define, dense_like, first_order
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
    S: Tensor | None  # None: fresh
    o_sum: Tensor | None  # with a content gate, unless fresh; so the two that follow
    o_mean: Tensor | None
    count: Tensor | None  # type: ignore[assignment]
    cu_seqlens: Tensor | None
    stored: bool
    scale: float
    chunk: int  # L, 0 without a content gate
    qk_norm: bool  # q and k are still to be made of length one
    segments: int  # pieces of the backward pass, 0 to leave it to the backend
    ends: bool  # whether the final state is asked for

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """Of states, whatever the inputs are rounded to."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def of_ends(self) -> list[tuple[int, ...]]:
        """The shapes of the final S, and with a content gate of o_sum and o_mean."""
        N, (HV, V) = self.sequences, self.v.shape[2:]
        return [(N, HV, self.q.shape[3], V), *([(N, HV, V)] * (2 if self.chunk else 0))]

    def new_ends(self) -> list[Tensor]:
        """Unwritten memory for the final state but its count; none where it is not asked for."""
        if not self.ends:
            return []
        return [self.q.new_empty(shape, dtype=self.state_dtype) for shape in self.of_ends]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields that are tensors, or None for one that is off."""
        return cast("tuple[Tensor | None, ...]", self[:N_TENSORS])


# The op's arguments that can have a gradient, and all that are tensors: the first fields of a Call.
N_FLOATS, N_TENSORS = 12, 14

# What is kept: tensors whose sizes follow from shapes.
Room = Callable[[Call], list[Tensor]]
# From a call to contiguous o, the final S, o_sum and o_mean as `new_ends` says, and, if asked to save, a full room.
Forward = Callable[[Call, bool], tuple[Tensor, list[Tensor], list[Tensor]]]
# From a call, its room, o (None without `qk_norm`) and the gradients of o, S, o_sum and o_mean (None: zero) to those of
# the first twelve fields, contiguous, None for one that is off.
Backward = Callable[[Call, list[Tensor], Tensor | None, list[Tensor | None]], list[Tensor | None]]


def parted(ends: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of what belongs to a final state S, o_sum and o_mean; None for what is not there."""
    S, o_sum, o_mean, *_ = (*ends, None, None, None)
    return S, o_sum, o_mean


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
        state: DeltaState | None,
        *,
        predict: str,
        scale: float,
        qk_norm: bool,
        segments: int,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, DeltaState | None]: ...


def delta_rule(operator: Operator) -> DeltaRule:
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
        state: DeltaState | None,
        *,
        predict: str,
        scale: float,
        qk_norm: bool,
        segments: int,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, DeltaState | None]:
        down, up, chunk = (None, None, 0) if content is None else content
        S, o_sum, o_mean, count = (None, None, None, None) if state is None else state
        if content is None:  # which alone reads and writes them
            o_sum = o_mean = count = None
        floats = (q, k, v, log_decay, erase_logits, down, up, correct, write, S, o_sum, o_mean)
        options = (predict == "stored", scale, chunk, qk_norm, segments, return_state)
        o, ends, _ = operator(*floats, count, cu_seqlens, *options, False)  # autograd asks for what is kept itself
        if not return_state:
            return o, None
        return o, state_after(ends, state)

    return run


def state_after(ends: list[Tensor], state: DeltaState | None) -> DeltaState:
    """The final state of a call that began with `state`: without a content gate, S alone is another."""
    if len(ends) == len(DeltaState._fields):
        return DeltaState(*ends)
    (S,) = ends
    if state is None:
        N, HV = S.shape[:2]
        state = DeltaState.zeros(N, HV, 0, 0, device=S.device, dtype=S.dtype)
    return DeltaState(S, *state[1:])  # compilers before torch 2.13 fail at _replace


# Of the operators' schemas: what a token brings, and the fields of a DeltaState.
TOKENS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? erase_logits, Tensor? down, Tensor? up, Tensor? correct, "
    "Tensor? write"
)
STATE = "Tensor S, Tensor o_sum, Tensor o_mean, Tensor count"
_OPTIONS = "bool stored, float scale, int chunk, bool qk_norm, int segments, bool ends"
_CALL = f"{TOKENS}, {STATE.replace('Tensor', 'Tensor?')}, Tensor? cu_seqlens, {_OPTIONS}"


def register(name: str, *, room: Room, forward: Forward, backward: Backward) -> Operator:
    """Register `hybridzoo::{name}` and `hybridzoo::{name}_backward`, with fakes and autograd; return the first.

    It returns o; the final state if asked for, with a content gate in four parts, without one S alone; and what is
    kept, which nobody sees where autograd sees to the call. `room`, `forward` and `backward` are as the types above
    say. They see every call with autocast off.
    """

    @without_autocast
    def operator(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        *fields, save = arguments
        call = Call(*fields)
        o, ends, kept = forward(call, save)
        return o, ends + _new_count(call), kept

    def fake_operator(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        *fields, save = arguments
        call = Call(*fields)
        return dense_like(call.v), call.new_ends() + _new_count(call), room(call) if save else []

    @without_autocast
    def backward_operator(*arguments: Any) -> list[Tensor]:
        *fields, kept, o, d_o, d_S, d_sum, d_mean = arguments
        gradients = backward(Call(*fields), kept, o, [d_o, d_S, d_sum, d_mean])
        return [d for d in gradients if d is not None]

    def fake_backward_operator(*arguments: Any) -> list[Tensor]:
        return [dense_like(x) for x in arguments[:N_FLOATS] if x is not None]

    kept = "Tensor[] kept, Tensor? o, Tensor? d_o, Tensor? d_S, Tensor? d_sum, Tensor? d_mean"
    run = define(f"{name}({_CALL}, bool save) -> (Tensor, Tensor[], Tensor[])", operator, fake_operator)
    run_back = define(f"{name}_backward({_CALL}, {kept}) -> Tensor[]", backward_operator, fake_backward_operator)

    first_back = first_order(
        run_back, "gated_delta_rule has no second derivative on this backend: use backend='reference'"
    )

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, below: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
            # Here something is kept, whatever was said: only here is it known that there will be a gradient.
            o, ends, kept = below_autograd(below, (*arguments[:-1], True))
            ctx.options = arguments[N_TENSORS:-1]
            qk_norm = ctx.options[3]  # whose gradient is read off the outputs
            ctx.save_for_backward(*arguments[:N_TENSORS], o if qk_norm else None, *kept)
            ctx.set_materialize_grads(False)
            return o, *ends

        @staticmethod
        def backward(ctx: Any, d_o: Tensor | None, *d_ends: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: activation checkpointing gives them back a single time
            inputs, o, kept = saved[:N_TENSORS], saved[N_TENSORS], list(saved[N_TENSORS + 1 :])
            found = first_back(*inputs, *ctx.options, kept, o, d_o, *parted(d_ends))
            # One for each of the floats that are there; what computes, count, cu_seqlens and the options have none.
            gradients: list[Tensor | None] = [None] * (1 + len(Call._fields) + 1)
            given = [i for i, x in enumerate(inputs[:N_FLOATS], 1) if x is not None]
            for i, d in zip(given, found, strict=True):
                gradients[i] = d
            return tuple(gradients)

    run.differentiate(Rule, N_FLOATS, lambda o, *ends: (o, ends, []))
    return run


def _new_count(call: Call) -> list[Tensor]:
    """How many tokens of an open content chunk each sequence is left with, int32 `[N]`, where that is asked for."""
    if not call.ends or not call.chunk:
        return []
    if call.cu_seqlens is None:
        T = call.q.shape[1]
        if call.count is None:
            return [call.q.new_full((call.q.shape[0],), T % call.chunk, dtype=torch.int32)]
        return [((call.count + T) % call.chunk).int()]
    lengths = call.cu_seqlens.diff()
    return [((lengths if call.count is None else call.count + lengths) % call.chunk).int()]
