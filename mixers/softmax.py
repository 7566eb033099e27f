"""Softmax attention over a cache: causal or windowed, batched or packed, by backend.

Functions only; attention.py holds the module around them. A cache is right-aligned: its newest token is its last slot,
so that new tokens are appended by concatenation whatever each row's length, and slot `c` of a row holds position
`length - C + c`, empty where that is negative. May import kernels.

Shapes: B batch, T new tokens, C cached slots, S = C + T, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.packing import locate

AttentionBackend: TypeAlias = Literal["auto", "sdpa", "reference"]


class SoftmaxRule(NamedTuple):
    """What is computed: `softmax(cap(scale * q k^T))` over the last `window` tokens, `cap(s) = c tanh(s / c)`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    backend: AttentionBackend = "auto"


def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None = None) -> Tensor:
    """Attend from T new tokens to the C cached ones before them and to each other, causally.

    `q [B, T, H, D]`, `k, v [B, C + T, H_kv, D]` with H a multiple of H_kv, `length [B]`: how many tokens each row has
    seen before these (None: none, then C must be 0). Returns `[B, T, H, D]`.
    """
    T, C = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    whole = rule.window is None or rule.window >= T + C
    if C == 0 and whole:
        return _softmax(q, k, v, None, rule).transpose(1, 2)
    if C == 0 and rule.window is not None and _BAND_FROM * rule.window <= T:
        return _attend_band(q, k, v, rule, rule.window).transpose(1, 2)
    slot = torch.arange(C + T, device=q.device)
    distance = slot[C:, None] - slot  # [T, S]
    mask = distance >= 0
    if rule.window is not None:
        mask = mask & (distance < rule.window)
    if C:
        assert length is not None
        mask = mask & (slot >= C - length[:, None, None])  # [B, T, S]: slots before a row's first token are empty
        mask = mask[:, None]
    return _softmax(q, k, v, mask, rule).transpose(1, 2)


# A band of blocks costs 2 T W scores, the masked square T^2, and blocks pad T to a multiple of W.
_BAND_FROM = 3


def _attend_band(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, W: int) -> Tensor:
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
    y = _softmax(q, k, v, mask, rule)
    return y.transpose(0, 1).reshape(B, H, n_blocks * W, D)[:, :, :T]


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: SoftmaxRule) -> Tensor:
    """`q [B, H, T, D]`, `k, v [B, H_kv, S, D]`; `mask` broadcasts to `[B, H, T, S]`, None is causal with S = T."""
    B, H, T, D = q.shape
    groups = H // k.shape[1]
    if rule.softcap is not None or rule.backend == "reference":
        return _explicit(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), mask, rule)
    if T == 1 and groups > 1:
        # One query a row: let a group's heads be the rows of one product, so that keys and values are read once.
        y = F.scaled_dot_product_attention(q.reshape(B, -1, groups, D), k, v, attn_mask=mask, scale=rule.scale)
        return y.reshape(B, H, 1, D)
    if groups > 1 and mask is not None and q.is_cuda:
        # Of CUDA's fused kernels, those that take a mask know no grouped heads; the fallback would hold T x S scores.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    grouped = False
    if groups > 1:  # a plain bool, also where a compiler has made the head counts symbols
        grouped = True
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=grouped
    )


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: SoftmaxRule) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.to(wide)).to(v.dtype)


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

    Eagerly, sequences whose lengths lie within a factor of two go through `attend` together, so padding never doubles
    the work and there are at most log2(T) calls. A compiler cannot see the lengths: it gets one masked square.
    """
    if torch.compiler.is_compiling():
        return _attend_square(q, k, v, rule, cu_seqlens, cache, length)
    outputs, places = [], []
    for rows, columns, used in _buckets(cu_seqlens):
        keys, values = (
            torch.cat([old[rows].to(new.dtype), new[columns]], 1) for old, new in zip(cache, (k, v), strict=True)
        )
        outputs.append(attend(q[columns], keys, values, rule, length[rows])[used])
        places.append(columns[used])
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(outputs)) if places else q


def _buckets(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `rows [n]` of like length, their token `columns [n, M]`, and which of those are `used`.

    Rows are left-aligned, so a shorter row's padding stands after its tokens, where causality keeps it unseen; it
    repeats the row's own last token.
    """
    bounds = cu_seqlens.tolist()
    buckets: dict[int, list[int]] = {}
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            buckets.setdefault((end - start - 1).bit_length(), []).append(n)
    for members in buckets.values():
        rows = torch.tensor(members, device=cu_seqlens.device)
        start, end = cu_seqlens[rows, None], cu_seqlens[rows + 1, None]
        longest = max(bounds[n + 1] - bounds[n] for n in members)
        columns = start + torch.arange(longest, device=cu_seqlens.device)
        yield rows, torch.minimum(columns, end - 1).long(), columns < end


def _attend_square(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    cu_seqlens: Tensor,
    cache: tuple[Tensor, Tensor],
    length: Tensor,
) -> Tensor:
    N, C = cache[0].shape[:2]
    sequence, position = locate(cu_seqlens, q.shape[0])
    position = position + length[sequence]
    slot = torch.arange(C, device=q.device) - C + length[:, None]  # [N, C]: positions of cached tokens
    key_sequence = torch.cat([torch.arange(N, device=q.device).repeat_interleave(C), sequence])
    key_position = torch.cat([slot.flatten(), position])
    distance = position[:, None] - key_position
    mask = (sequence[:, None] == key_sequence) & (distance >= 0) & (key_position >= 0)
    if rule.window is not None:
        mask = mask & (distance < rule.window)
    keys, values = (
        torch.cat([old.flatten(0, 1).to(new.dtype), new])[None].transpose(1, 2)
        for old, new in zip(cache, (k, v), strict=True)
    )
    return _softmax(q[None].transpose(1, 2), keys, values, mask, rule)[0].transpose(0, 1)


def append_packed(cache: Tensor, new: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Return `cache [N, C, H_kv, D]` with each sequence's share of `new [T, H_kv, D]` appended, cut to the window.

    The result has `min(window, C + longest)` slots, with T for the longest while compiling; empty slots are zero.
    """
    (N, C), T = cache.shape[:2], new.shape[0]
    longest = T if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
    size = C + longest if window is None else min(window, C + longest)
    # A row's line is its C cached slots, then its tokens; the last slot of the result is the line's last place.
    lengths = cu_seqlens.diff()[:, None]
    place = C + lengths - size + torch.arange(size, device=cache.device)  # [N, size]
    row = torch.arange(N, device=cache.device)[:, None] * C
    index = torch.where(place < C, row + place, N * C + cu_seqlens[:-1, None] + place - C)
    line = torch.cat([cache.flatten(0, 1).to(new.dtype), new])
    kept = line[index.clamp(min=0)] if size else line[:0].expand(N, *line[:0].shape)
    return torch.where((place < 0)[..., None, None], 0, kept)
