"""Attention as products over whole masks: what the backends `reference` and `sdpa` share, each with its own products.

A window much shorter than the sequence goes block by block, so that its cost follows the window.

Shapes: B batch, T new tokens, C cached slots, S = C + T, H query heads, H_kv key heads, D head dim, N sequences, W
window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.mixers.memory import host_bounds, remembered, sent
from hybridzoo.mixers.softmax.packed import line_up
from hybridzoo.mixers.softmax.rule import Attend, AttendPacked, SoftmaxRule
from hybridzoo.mixers.softmax.spans import batched_spans, packed_spans, visible

# `q [B, H, T, D]`, `k, v [B, H_kv, S, D]`; the mask broadcasts to `[B, H, T, S]`, None is causal with S = T.
Products: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, SoftmaxRule], Tensor]

# A band of blocks costs 2 T W scores, the masked square T^2, and blocks pad T to a multiple of W.
BAND_FROM = 3


def dense_attend(products: Products) -> Attend:
    """`attend` by these products."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None) -> Tensor:
        T, S = q.shape[1], k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if S == T and (rule.window is None or rule.window >= T):
            mask = None
        elif S == T and rule.window is not None and BAND_FROM * rule.window <= T:
            return _attend_band(products, q, k, v, rule, rule.window).transpose(1, 2)
        else:
            mask = visible(batched_spans(T, S, rule.window, length, q.device), S)[:, None]
        return products(q, k, v, mask, rule).transpose(1, 2)

    return attend


def _attend_band(products: Products, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, W: int) -> Tensor:
    # Queries in blocks of W each see their own block of keys and the one before it. Batch rows are folded into heads
    # (grouped heads stay in step) so that blocks can be the batch and share one mask.
    B, H, T, D = q.shape
    n_blocks = -(-T // W)
    fill = n_blocks * W - T
    q = F.pad(q, (0, 0, 0, fill)).reshape(B * H, n_blocks, W, D).transpose(0, 1)
    k, v = (
        F.pad(x, (0, 0, W, fill)).reshape(x.shape[0] * x.shape[1], n_blocks + 1, W, D).transpose(0, 1) for x in (k, v)
    )
    k, v = (torch.cat([x[:-1], x[1:]], dim=2) for x in (k, v))  # [n_blocks, B H_kv, 2W, D]
    key, query = torch.arange(2 * W, device=q.device), torch.arange(W, 2 * W, device=q.device)[:, None]
    band = (key <= query) & (key > query - W)  # [W, 2W]
    first = band & (key >= W)  # nothing stands before the first block
    mask = torch.cat([first[None], band.expand(n_blocks - 1, -1, -1)])[:, None]
    y = products(q, k, v, mask, rule)
    return y.transpose(0, 1).reshape(B, H, n_blocks * W, D)[:, :, :T]


def dense_attend_packed(products: Products) -> AttendPacked:
    """`attend_packed` by these products.

    Eagerly, sequences whose lengths lie within a factor of two go through `attend` together, so padding never doubles
    the work and there are at most log2(T) calls. A compiler cannot see the lengths: it gets one masked square.
    """
    attend = dense_attend(products)

    def attend_packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: SoftmaxRule,
        cu_seqlens: Tensor,
        cache: tuple[Tensor, Tensor],
        length: Tensor,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            line = line_up(k, v, cu_seqlens, cache, length)
            mask = visible(packed_spans(q.shape[0], rule.window, cu_seqlens, line.bounds), line.k.shape[0])
            q, k, v = (x[None].transpose(1, 2) for x in (q, line.k, line.v))
            return products(q, k, v, mask[:, None], rule)[0].transpose(0, 1)
        outputs, places = [], []
        for bucket in remembered(cu_seqlens, "buckets", lambda: _buckets(cu_seqlens)):
            rows, columns = bucket.rows, bucket.columns
            keys, values = (
                torch.cat([old[rows].to(new.dtype), new[columns]], 1) for old, new in zip(cache, (k, v), strict=True)
            )
            outputs.append(attend(q[columns], keys, values, rule, length[rows]).flatten(0, 1)[bucket.used])
            places.append(bucket.tokens)
        return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(outputs))

    return attend_packed


class _Bucket(NamedTuple):
    """Sequences of like length: which `rows [n]` they are, and their token `columns [n, M]`.

    `used` are the places in the columns, flat, that hold tokens of their own, and `tokens` are those. Rows are
    left-aligned, so a shorter row's padding stands after its tokens, where causality keeps it unseen; it repeats the
    row's own last token.
    """

    rows: Tensor
    columns: Tensor
    used: Tensor
    tokens: Tensor


def _buckets(cu_seqlens: Tensor) -> list[_Bucket]:
    # Made on the host, which knows the lengths: to pick by a mask it would ask the device how many that are.
    bounds = torch.tensor(host_bounds(cu_seqlens))
    buckets: dict[int, list[int]] = {}
    for n, (first, after) in enumerate(itertools.pairwise(bounds.tolist())):
        if after > first:
            buckets.setdefault((after - first - 1).bit_length(), []).append(n)
    made = []
    for members in buckets.values():
        rows = torch.tensor(members)
        start, end = bounds[rows, None], bounds[rows + 1, None]
        columns = start + torch.arange(int((end - start).max()))
        used = (columns < end).flatten().nonzero()[:, 0]
        columns = torch.minimum(columns, end - 1)
        parts = (rows, columns, used, columns.flatten()[used])
        made.append(_Bucket(*(sent(part, cu_seqlens.device) for part in parts)))
    return made
