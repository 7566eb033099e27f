"""Cutting sequences into tiles: from `[B, T, heads, dim]` to `[M, heads, C, dim]` and back.

Tiles are laid out step by step: first the first tile of every sequence, then the second of every one that has it, so
that the serial loop over steps works on contiguous slices and packed sequences of any lengths waste at most a tile
each. With a content gate the tiles are cut on each sequence's own content grid, counted from its own start. Slots
without a token are zero, and a zero token with zero log-decay leaves a state as it was.

Shapes: B batch, T time, N sequences, M tiles, C slots in a tile, L content chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_counts

MAX_TILE = 64


@dataclass(frozen=True)
class Tiling:
    """How one call's tokens lie in tiles; built by `cut`."""

    size: int  # C, a power of two
    steps_per_chunk: int  # steps in a content chunk; 1 without a content gate
    starts: list[int]  # step s holds tiles starts[s] to starts[s + 1], one for each sequence still running
    shape: tuple[int, int]  # B, T
    order: Tensor | None  # [N] sequences, longest first; None where that is how they come
    source: Tensor | None  # [M * C] token in each slot, B * T where there is none; None for equal lengths
    target: Tensor | None  # [B * T] slot of each token
    empty: Tensor | None  # [M, 1, C] slots without a token; None where all are full
    closes: list[Tensor]  # for each content chunk, [n] bool: which of its sequences fill it; empty without a gate

    @property
    def n_steps(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tiles(self) -> int:
        return self.starts[-1]

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, heads]` or `[B, T, heads, dim]` to contiguous `[M, heads, C(, dim)]` in `dtype`."""
        B, T = self.shape
        if self.source is None:
            n = self.n_steps
            if n * self.size != T:
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, n * self.size - T))
            # Both moves in one copy: at small sizes this pass costs as much as the products.
            x = x.unflatten(1, (n, self.size)).transpose(0, 1).transpose(2, 3)
            return x.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        flat = x.reshape(B * T, *x.shape[2:])
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        x = flat[self.source].reshape(-1, self.size, *x.shape[2:])
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `cut`."""
        B, T = self.shape
        if self.target is not None:
            x = x.transpose(1, 2)  # [M, C, heads(, dim)]
            rest = x.shape[2:]
            return x.reshape(-1, *rest)[self.target].reshape(B, T, *rest).to(dtype)
        x = x.unflatten(0, (self.n_steps, B)).transpose(2, 3).transpose(0, 1)  # [B, steps, C, heads(, dim)]
        x = x.to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)
        return x[:, :T].contiguous()  # as the operator's fake says, also where the last tile is not full

    def sort(self, x: Tensor) -> Tensor:
        """`[N, ...]` in the caller's order to a fresh tensor, longest sequence first."""
        return x.clone() if self.order is None else x[self.order]

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        if self.order is None:
            return x
        back = torch.empty_like(x)
        back[self.order] = x
        return back


def cut(
    B: int,
    T: int,
    cu_seqlens: Tensor | None,
    chunk: int | None,
    count: Tensor | None,
    device: torch.device,
    max_tile: int = MAX_TILE,
) -> Tiling:
    """Lay `N` sequences out in tiles; with a content `chunk` of L tokens, `count [N]` of which each has already seen,
    none if None.

    Raises: `ValueError` for `cu_seqlens` that do not run from 0 to T, and for counts outside a chunk.
    """
    if cu_seqlens is None:
        starts, lengths = [T * b for b in range(B)], [T] * B
    else:
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, T)
        starts, lengths = bounds[:-1], [end - start for start, end in pairwise(bounds)]
    counts = [0] * len(lengths) if chunk is None or count is None else count.tolist()
    if chunk is not None:
        check_counts(counts, chunk)
    longest = max(lengths, default=0)
    span = longest if chunk is None else min(longest, chunk)
    size = _tile_size(span, max_tile)
    steps_per_chunk = 1 if chunk is None else max(1, -(-span // size))
    if chunk is None and cu_seqlens is None:
        return _equal_lengths(B, T, size, device)
    grid = size if chunk is None else chunk
    return _any_lengths(B, T, starts, lengths, counts, grid, size, steps_per_chunk, chunk is not None, device)


def _tile_size(span: int, max_tile: int) -> int:
    if span <= 1:
        return 1
    pieces = -(-span // max_tile)
    return 1 << (-(-span // pieces) - 1).bit_length()


def _equal_lengths(B: int, T: int, size: int, device: torch.device) -> Tiling:
    n = -(-T // size)
    empty = None
    if n * size != T:
        slots = torch.arange(n * size, device=device).reshape(n, 1, size)
        empty = (slots >= T).repeat_interleave(B, dim=0)
    return Tiling(size, 1, [B * step for step in range(n + 1)], (B, T), None, None, None, empty, [])


def _any_lengths(
    B: int,
    T: int,
    first: list[int],
    lengths: list[int],
    counts: list[int],
    grid: int,
    size: int,
    steps_per_chunk: int,
    content: bool,
    device: torch.device,
) -> Tiling:
    # A sequence's tokens fall into grid chunks of its own; only the first, opened by an earlier call, is shortened.
    chunks = [-(-(seen + length) // grid) if length else 0 for seen, length in zip(counts, lengths, strict=True)]
    order = sorted(range(len(lengths)), key=lambda n: -chunks[n])
    starts, closes = [0], []
    source = torch.full((sum(chunks) * steps_per_chunk, size), B * T, dtype=torch.int64)
    for chunk in range(max(chunks, default=0)):
        running = [n for n in order if chunks[n] > chunk]
        base = starts[-1]
        for row, n in enumerate(running):
            begin = max(chunk * grid - counts[n], 0)
            end = min((chunk + 1) * grid - counts[n], lengths[n])
            tokens = torch.arange(first[n] + begin, first[n] + end)
            slots = torch.arange(end - begin)
            source[base + slots // size * len(running) + row, slots % size] = tokens
        starts += [base + len(running) * (step + 1) for step in range(steps_per_chunk)]
        if content:
            full = [counts[n] + lengths[n] >= (chunk + 1) * grid for n in running]
            closes.append(torch.tensor(full, device=device))
    target = torch.empty(B * T + 1, dtype=torch.int64)
    target[source.flatten()] = torch.arange(source.numel())
    empty = source == B * T
    return Tiling(
        size=size,
        steps_per_chunk=steps_per_chunk,
        starts=starts,
        shape=(B, T),
        order=None if order == sorted(order) else torch.tensor(order, device=device),
        source=source.flatten().to(device),
        target=target[:-1].to(device),
        empty=empty[:, None].to(device) if bool(empty.any()) else None,
        closes=closes,
    )
