"""Rotary position embedding (RoPE) in the half-rotation layout of Llama checkpoints.

May import torch only.

Shapes: B batch, T time, H query heads, H_kv key heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, positions: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Turn channel pair `(d, d + D/2)` of every query and key by the angle `position * base^(-2d/D)`.

    `q [B, T, H, D]`, `k [B, T, H_kv, D]`, integer `positions [B, T]` (or `[1, T]` for all rows). Angles are float32
    (float64 for float64 inputs), results return in the inputs' dtype. Source: arXiv 2104.09864, eq. 34.

    Raises `ValueError` for an odd D, a base that is not positive and positions of another shape.
    """
    B, T, _, D = q.shape
    if D % 2 or k.shape[-1] != D:
        raise ValueError(f"rotary: q and k need the same even head size, got {D} and {k.shape[-1]}")
    if base <= 0:
        raise ValueError(f"rotary: base must be positive, got {base}")
    if positions.shape not in ((B, T), (1, T)):
        raise ValueError(f"rotary: positions must be [B, T] = [{B}, {T}] or [1, {T}], got {list(positions.shape)}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(0, D, 2, device=q.device, dtype=dtype) / D)  # [D/2]
    angle = positions.to(dtype)[..., None, None] * frequency  # [B, T, 1, D/2]
    cos, sin = angle.cos(), angle.sin()
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
