"""Normalisations over the last axis. Sums run in float32 (float64 for float64), results return in the input's dtype.

May import torch only. Modules with parameters are in mixers/parts.py.

Shapes: D the normalised axis, `...` anything before it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

GateActivation: TypeAlias = Literal["silu", "sigmoid"]

_L2_EPS = 1e-6  # added to the sum of squares, as in flash-linear-attention and transformers


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return `x * rsqrt(mean(x^2) + eps) * weight`: `x [..., D]`, `weight [D]` or None (`[G, D]` where each of
    G groups has its own). Source: arXiv 1910.07467.

    Raises `ValueError` where weight does not match the last axes.
    """
    _check_weight("rms_norm", x, weight)
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    activation: GateActivation = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """Return `rms_norm(x) * act(gate)`, or `rms_norm(x * act(gate))` with `norm_before_gate=False` (Mamba-2's order).

    `x, gate [..., D]`, weight as in `rms_norm`. Source: arXiv 2405.21060 (gate first), 2412.06464 (norm first).

    Raises `ValueError` for shapes that differ and for an unknown activation.
    """
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate {list(gate.shape)} must have the shape of x {list(x.shape)}")
    opened = _activate(_wide(gate), activation)
    if norm_before_gate:
        return (rms_norm(_wide(x), weight, eps) * opened).to(x.dtype)
    return rms_norm(_wide(x) * opened, weight, eps).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """Return `x * rsqrt(sum(x^2) + 1e-6)`: queries and keys of unit length, zero where x is zero. `x [..., D]`."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _L2_EPS)).to(x.dtype)


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "sigmoid":
        return torch.sigmoid(gate)
    raise ValueError(f"gated_rms_norm: activation must be 'silu' or 'sigmoid', got {activation!r}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_weight(name: str, x: Tensor, weight: Tensor | None) -> None:
    # [D], or the trailing axes of x for norms over groups of channels: [G, D].
    if weight is not None and weight.shape != x.shape[x.dim() - weight.dim() :]:
        raise ValueError(f"{name}: weight must be [{x.shape[-1]}], the last axis of x, got {list(weight.shape)}")
