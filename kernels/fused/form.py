"""The form of a call: all that its launches follow from but where its tensors lie. Calls of one form share their plans.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.recurrence_op import Call


class Form(NamedTuple):
    """Sizes, flags and dtypes of a call. A gate is 0: off; 1: one value a head; 2: one a channel."""

    B: int
    T: int
    H: int
    K: int
    HV: int
    V: int
    N: int
    decay: int
    erase: bool
    correct: int
    write: int
    rank: int  # r, 0 without a content gate
    packed: bool
    stored: bool
    scale: float
    chunk: int  # L, 0 without a content gate
    qk_norm: bool
    segments: int
    ends: bool  # whether there is a final state: forward, whether it is asked for; backward, whether it has a gradient
    serial: bool  # programs run one after another, by the interpreter
    dtypes: tuple[torch.dtype | None, ...]  # of the call's tensors, None where one is off

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k, v and the outputs."""
        dtype = self.dtypes[0]
        assert dtype is not None
        return dtype

    @property
    def kinds(self) -> tuple[Any, ...]:
        """What the dtypes of all tensors follow from that a launch is given, and which of them are None."""
        return (*self.dtypes, self.ends, self.H == self.HV)  # gradients that value heads share are summed in float32

    @property
    def decays(self) -> bool:
        """Whether anything fades."""
        return self.decay > 0 or self.erase

    @property
    def plain(self) -> bool:
        """Whether states meet queries and keys as they were given: nothing fades, nothing is brought to unit length."""
        return not self.decays and not self.qk_norm

    @property
    def kept(self) -> torch.dtype:
        """What scratch memory and kept states are of: fp16's range is too small for a state."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32


def form_of(call: Call, *, ends: bool | None = None) -> Form:
    """The form of a call; of its backward pass with `ends`, whether the final state has a gradient."""
    (B, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    return Form(
        B=B,
        T=T,
        H=H,
        K=K,
        HV=HV,
        V=V,
        N=call.sequences,
        decay=kind(call.log_decay),
        erase=call.erase_logits is not None,
        correct=kind(call.correct),
        write=kind(call.write),
        rank=0 if call.down is None else call.down.shape[1],
        packed=call.cu_seqlens is not None,
        stored=call.stored,
        scale=call.scale,
        chunk=call.chunk,
        qk_norm=call.qk_norm,
        segments=call.segments,
        ends=call.ends if ends is None else ends,
        serial=call.q.device.type == "cpu",
        dtypes=dtypes_of(call.tensors),
    )


def dtypes_of(tensors: Iterable[Tensor | None]) -> tuple[torch.dtype | None, ...]:
    """The dtype of each tensor that is there."""
    return tuple([None if x is None else x.dtype for x in tensors])


def kind(gate: Tensor | None) -> int:
    """0: no gate; 1: one value a head; 2: one a channel."""
    return 0 if gate is None else gate.ndim - 2
