"""Sequences packed into one row: what `cu_seqlens` means and what is derived from it, in one place.

`cu_seqlens [N+1]` holds the boundaries of N sequences laid end to end in a row of T tokens: sequence n is
`[cu_seqlens[n], cu_seqlens[n+1])`. It starts at 0, ends at T and never decreases; equal neighbours are an empty
sequence. Nothing here reads its values on the host while compiling or on a GPU, so nothing waits for the device.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each packed token stands: int64 `[T]` both."""

    sequence: Tensor  # which of the N sequences the token belongs to
    position: Tensor  # its place within that sequence, from 0


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, total: int) -> None:
    """Refuse boundaries that do not describe `total` tokens of a row.

    Shape, dtype and B = 1 are always checked. The values are checked eagerly where they lie in host memory; on a GPU
    the caller that made them vouches for them, since reading them would stop the host at every layer.

    Raises `TypeError` for a dtype other than int32 or int64, `ValueError` for the rest.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N+1] with N >= 1, got {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed sequences lie in one row (B = 1), got B = {batch}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: must start at 0, got {values[0]}")
    if values[-1] != total:
        raise ValueError(f"cu_seqlens: must end at T = {total}, got {values[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ValueError(f"cu_seqlens: must not decrease, got {end} after {start} at index {n + 1}")


def locate(cu_seqlens: Tensor, total: int) -> Packing:
    """Return the sequence and the position of each of `total` packed tokens."""
    index = torch.arange(total, device=cu_seqlens.device)
    boundaries = cu_seqlens.long()
    # Of several boundaries at one place (empty sequences) the last one opens the sequence that holds the token.
    sequence = torch.searchsorted(boundaries[1:].contiguous(), index, right=True)
    return Packing(sequence, index - boundaries[sequence])
