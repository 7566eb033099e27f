"""Which keys a query sees, as the first and the last of a run of slots: one form for full, windowed, cached and packed.

Causality and a window leave each query one run of keys, and along a row of queries neither end ever moves back. Masks
and the tables of blocks that sparse kernels walk follow from the two ends alone.

Shapes: B batch (1 where all rows are alike), T queries, S key slots, N sequences, C cached slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.packing import locate


class Spans(NamedTuple):
    """Query `t` of row `b` sees the slots from `first[b, t]` to `last[b, t]`, both included; int64 `[B, T]`."""

    first: Tensor
    last: Tensor


def batched_spans(T: int, S: int, window: int | None, length: Tensor | None, device: torch.device) -> Spans:
    """The spans of T tokens behind S - T cached slots, right-aligned: of those, `length [B]` at most are filled."""
    C = S - T
    last = torch.arange(C, S, device=device)[None]
    first = torch.zeros_like(last)
    if length is not None and C:
        first = (C - length.long()).clamp(min=0)[:, None].expand(-1, T)
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return Spans(first, last.expand(first.shape))


def packed_spans(T: int, window: int | None, cu_seqlens: Tensor, key_bounds: Tensor) -> Spans:
    """The spans of T packed tokens, `[1, T]`: the keys of sequence n are `key_bounds[n]` to `key_bounds[n + 1]`.

    A sequence's tokens are the last of its keys.
    """
    sequence, position = locate(cu_seqlens, T)
    bounds, starts = key_bounds.long(), cu_seqlens.long()
    earlier = bounds.diff() - starts.diff()
    last = (bounds[sequence] + earlier[sequence] + position)[None]
    first = bounds[sequence][None]
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return Spans(first, last)


def visible(spans: Spans, S: int) -> Tensor:
    """The mask `[B, T, S]`: whether a query sees a slot."""
    slot = torch.arange(S, device=spans.last.device)
    return (slot >= spans.first[..., None]) & (slot <= spans.last[..., None])
