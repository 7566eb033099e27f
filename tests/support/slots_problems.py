"""Attention from one token a row to its cache's slots: problems with caches filled in every way, and the truth.

Shapes: N rows, H query heads, H_kv key heads, G = H / H_kv, D head dim, C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridzoo.kernels.fused.slots_op import fused_attend_slots


@dataclass(frozen=True)
class SlotsProblem:
    """Arguments of `fused_attend_slots`. What no row may see is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    scale: float
    softcap: float | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> SlotsProblem:
        """The problem rounded to a dtype."""
        q, k, v = (x.to(device, dtype) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, length=self.length.to(device))

    def found(self) -> Tensor:
        return fused_attend_slots(self.q, self.k, self.v, self.length, self.scale, self.softcap)

    def truth(self) -> Tensor:
        """The definition, row by row and head by head, in float64."""
        o = torch.empty(self.q.shape, dtype=torch.float64, device=self.q.device)
        G = self.q.shape[2] // self.k.shape[1]
        for n, h in torch.cartesian_prod(torch.arange(self.q.shape[0]), torch.arange(self.q.shape[2])).tolist():
            seen = min(int(self.length[n]) + 1, self.k.shape[2])
            keys, values = (x[n, h // G, :seen].double() for x in (self.k, self.v))
            scores = self.scale * keys @ self.q[n, 0, h].double()
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            o[n, 0, h] = scores.softmax(0) @ values
        return o


def make_slots(
    lengths: tuple[int, ...],
    C: int,
    H: int = 2,
    H_kv: int = 2,
    D: int = 16,
    softcap: float | None = None,
    scale: float | None = None,
) -> SlotsProblem:
    """A problem of rows that hold so many tokens before the new one."""
    generator = torch.Generator().manual_seed(len(lengths) + C + D)
    N = len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(N, 1, H, D), normal(N, H_kv, C, D), normal(N, H_kv, C, D)
    for row, length in enumerate(lengths):
        k[row, :, length + 1 :] = torch.nan
        v[row, :, length + 1 :] = torch.nan
    length = torch.tensor(lengths, dtype=torch.int32)
    return SlotsProblem(q, k, v, length, D**-0.5 if scale is None else scale, softcap)
