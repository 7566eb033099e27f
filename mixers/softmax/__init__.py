"""Softmax attention over a cache: causal or windowed, batched or packed, by backend.

Functions only; mixers/attention.py holds the module around them. A cache is right-aligned: its newest token is its last
slot, and slot `c` of a row holds position `length - C + c`, empty where that is negative. May import kernels.

Where to look: rule.py says what is computed, spans.py which keys a query sees, backends.py who computes it; each
backend has a file of its own.

Shapes: B batch, T new tokens, C cached slots, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.mixers.softmax.backends import BACKENDS, choose, chosen, found
from hybridzoo.mixers.softmax.packed import append_packed, rows_as_packed
from hybridzoo.mixers.softmax.rule import AttentionBackend, SoftmaxRule, call_of

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "SoftmaxRule",
    "append_packed",
    "attend",
    "attend_packed",
    "chosen",
    "found",
]


def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None = None) -> Tensor:
    """Attend from T new tokens to the C cached ones before them and to each other, causally.

    `q [B, T, H, D]`, `k, v [B, C + T, H_kv, D]` with H a multiple of H_kv, `length [B]`: how many tokens each row has
    seen before these (None: none, then C must be 0). Returns `[B, T, H, D]`.

    Raises: `ValueError` where the rule's backend cannot run this call.
    """
    q, k, v = _as_autocast_has_them(q, k, v)
    cached = k.shape[1] > q.shape[1]
    backend = choose(call_of(q, k, v, rule, cached=cached), rule.backend)
    if not q.shape[1]:
        return q
    if length is not None and cached and not backend.masks_empty_slots:
        return rows_as_packed(backend.attend_packed, q, k, v, rule, length)
    return backend.attend(q, k, v, rule, length)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    cu_seqlens: Tensor,
    cache: tuple[Tensor, Tensor],
    length: Tensor,
) -> Tensor:
    """Attend within each of N packed sequences and to its own cached tokens; none sees another.

    `q [T, H, D]`, `k, v [T, H_kv, D]`, `cache` keys and values `[N, C, H_kv, D]`, `length [N]`. Returns `[T, H, D]`.

    Raises: `ValueError` where the rule's backend cannot run this call.
    """
    q, k, v = _as_autocast_has_them(q, k, v)
    call = call_of(q, k, v, rule, packed=True, cached=cache[0].shape[1] > 0, cache=cache)
    backend = choose(call, rule.backend)
    return backend.attend_packed(q, k, v, rule, cu_seqlens, cache, length) if q.shape[0] else q


def _as_autocast_has_them(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Autocast knows torch's own attention and not the others: all are to see what that one would.
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and v.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v
