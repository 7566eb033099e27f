"""What softmax attention is asked to compute, and what a backend must know of a call to say whether it can.

Shapes: B batch, T new tokens, C cached slots, S = C + T, H query heads, H_kv key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

AttentionBackend: TypeAlias = Literal["auto", "flash", "flex", "xformers", "sdpa", "reference"]


class SoftmaxRule(NamedTuple):
    """What is computed: `softmax(cap(scale * q k^T))` over the last `window` tokens, `cap(s) = c tanh(s / c)`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    backend: AttentionBackend = "auto"


class Call(NamedTuple):
    """What a backend is chosen by, or refuses. `tokens` is T, of all sequences where they are packed; `cached`: keys of
    earlier calls stand before the new ones.
    """

    device: str
    number: int | None  # of the device
    dtype: torch.dtype
    tokens: int
    head_dim: int
    window: int | None
    softcap: bool
    packed: bool
    cached: bool
    gradient: bool
    compiling: bool


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, SoftmaxRule, Tensor | None], Tensor]
AttendPacked: TypeAlias = Callable[[Tensor, Tensor, Tensor, SoftmaxRule, Tensor, tuple[Tensor, Tensor], Tensor], Tensor]


class Backend(NamedTuple):
    """One way to compute it.

    `refusal(call)` is why it cannot, as the rest of a sentence that begins with its name, or None. `attend` and
    `attend_packed` are what `hybridzoo.mixers.softmax` documents under these names. `packages`: distributions whose
    versions say which code runs. `masks_empty_slots`: whether `attend` leaves out the empty slots of a cache; where it
    does not, rows behind one go through `attend_packed`, which has none. `caps`: whether it has a soft-cap.
    """

    name: str
    summary: str
    packages: tuple[str, ...]
    refusal: Callable[[Call], str | None]
    attend: Attend
    attend_packed: AttendPacked
    masks_empty_slots: bool = True
    caps: bool = True


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    packed: bool = False,
    cached: bool = False,
    cache: tuple[Tensor, ...] = (),
) -> Call:
    """Describe a call on `q, k, v [..., heads, D]`; `cache`: what gradients may go to beside these."""
    return Call(
        device=q.device.type,
        number=q.device.index,
        dtype=v.dtype,
        tokens=q.shape[-3],
        head_dim=q.shape[-1],
        window=rule.window,
        softcap=rule.softcap is not None,
        packed=packed,
        cached=cached,
        gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *cache)),
        compiling=torch.compiler.is_compiling(),
    )
