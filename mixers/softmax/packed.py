"""Packed sequences behind a cache: the keys of each laid end to end, and the cache they leave.

A cache is right-aligned: its newest token is its last slot, so that new tokens are appended by concatenation whatever
each row's length, and slot `c` of a row holds position `length - C + c`, empty where that is negative.

Shapes: T new tokens, C cached slots, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.mixers.memory import host_counts
from hybridzoo.mixers.softmax.rule import AttendPacked, SoftmaxRule


class Line(NamedTuple):
    """Keys and values `[L, H_kv, D]` of N sequences end to end; `bounds [N+1]` int32 is where each begins and ends."""

    k: Tensor
    v: Tensor
    bounds: Tensor


def line_up(k: Tensor, v: Tensor, cu_seqlens: Tensor, cache: tuple[Tensor, Tensor], length: Tensor) -> Line:
    """Put each sequence's cached keys before its new ones, `k, v [T, H_kv, D]`, leaving empty slots out.

    How many that are is known to the device only: the line has room for all, zeros after the last sequence.
    """
    (N, C), T = cache[0].shape[:2], k.shape[0]
    if C == 0:
        return Line(k, v, cu_seqlens.int())
    held = length.long().clamp(max=C)
    starts = cu_seqlens.long()
    bounds = starts + torch.cat([starts.new_zeros(1), held.cumsum(0)])
    slot = torch.arange(N * C + T, device=k.device)
    sequence = (torch.searchsorted(bounds, slot, right=True) - 1).clamp(max=N - 1)
    place = slot - bounds[sequence] - held[sequence]  # among the new tokens; negative in the cache
    source = torch.where(place < 0, (sequence + 1) * C + place, N * C + starts[sequence] + place)
    filled = (slot < bounds[-1])[:, None, None]
    source = source.clamp(max=N * C + T - 1)
    # Not multiplied but chosen: gradients of the rest of the line are never written by kernels that skip it.
    keys, values = (
        torch.where(filled, torch.cat([old.flatten(0, 1).to(new.dtype), new])[source], 0)
        for old, new in zip(cache, (k, v), strict=True)
    )
    return Line(keys, values, bounds.int())


def rows_as_packed(
    attend_packed: AttendPacked, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor
) -> Tensor:
    """Compute a batch of rows that are filled to different lengths, shapes as in `attend`, as packed sequences."""
    B, T = q.shape[:2]
    C = k.shape[1] - T
    bounds = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
    new_k, new_v = k[:, C:].flatten(0, 1), v[:, C:].flatten(0, 1)
    y = attend_packed(q.flatten(0, 1), new_k, new_v, rule, bounds, (k[:, :C], v[:, :C]), length)
    return y.unflatten(0, (B, T))


def append_packed(cache: Tensor, new: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Return `cache [N, C, H_kv, D]` with each sequence's share of `new [T, H_kv, D]` appended, cut to the window.

    The result has `min(window, C + longest)` slots, with T for the longest while compiling; empty slots are zero.
    """
    (N, C), T = cache.shape[:2], new.shape[0]
    longest = T if torch.compiler.is_compiling() else _longest(cu_seqlens)
    size = C + longest if window is None else min(window, C + longest)
    # A row's line is its C cached slots, then its tokens; the last slot of the result is the line's last place.
    lengths = cu_seqlens.diff()[:, None]
    place = C + lengths - size + torch.arange(size, device=cache.device)  # [N, size]
    row = torch.arange(N, device=cache.device)[:, None] * C
    index = torch.where(place < C, row + place, N * C + cu_seqlens[:-1, None] + place - C)
    line = torch.cat([cache.flatten(0, 1).to(new.dtype), new])
    kept = line[index.clamp(min=0)] if size else line[:0].expand(N, *line[:0].shape)
    return torch.where((place < 0)[..., None, None], 0, kept)


def _longest(cu_seqlens: Tensor) -> int:
    return max(host_counts(cu_seqlens))
