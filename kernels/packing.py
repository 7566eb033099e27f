"""Sequences packed into one row: what `cu_seqlens` means and what is derived from it, in one place.

`cu_seqlens [N+1]` holds the boundaries of N sequences laid end to end in a row of T tokens: sequence n is
`[cu_seqlens[n], cu_seqlens[n+1])`. It starts at 0, ends at T and never decreases; equal neighbours are an empty
sequence. Nothing here reads its values on the host while compiling or on a GPU, so nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_cu_seqlens


class Packing(NamedTuple):
    """Where each packed token stands: int64 `[T]` both."""

    sequence: Tensor  # which of the N sequences the token belongs to
    position: Tensor  # its place within that sequence, from 0


def check_packing(cu_seqlens: Tensor, batch: int, total: int, device: torch.device) -> None:
    """Refuse boundaries that do not describe `total` tokens of one row.

    Shape, dtype, device and B = 1 are always checked. The values are checked where they lie in host memory and no
    compiler is tracing; on a GPU a model reads them once a call, since every layer would stop the host.

    Raises `ValueError`.
    """
    check_cu_seqlens(cu_seqlens, batch, device)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens.tolist(), total)


def locate(cu_seqlens: Tensor, total: int) -> Packing:
    """Return the sequence and the position of each of `total` packed tokens."""
    index = torch.arange(total, device=cu_seqlens.device)
    boundaries = cu_seqlens.long()
    # Of several boundaries at one place (empty sequences) the last one opens the sequence that holds the token.
    sequence = torch.searchsorted(boundaries, index, right=True) - 1
    return Packing(sequence, index - boundaries[sequence])
