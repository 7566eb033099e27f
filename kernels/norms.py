"""Normalisations over the last axis. Sums run in float32 (float64 for float64), results return in the input's dtype.

Written out, a norm of bfloat16 inputs keeps up to five float32 copies of them for its backward pass, a quarter of what
a mixer's layer keeps. So a gradient keeps the inputs alone, and computes the rest anew; compilers, which choose what to
keep by themselves, and transforms of torch.func get the equations.

May import torch only. Modules with parameters are in mixers/parts.py.

Shapes: D the normalised axis, `...` anything before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

GateActivation: TypeAlias = Literal["silu", "sigmoid"]

_L2_EPS = 1e-6  # added to the sum of squares, as in flash-linear-attention and transformers


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return `x * rsqrt(mean(x^2) + eps) * weight`: `x [..., D]`, `weight [D]` or None (`[G, D]` where each of
    G groups has its own). Source: arXiv 1910.07467.

    Raises `ValueError` where weight does not match the last axes.
    """
    _check_weight("rms_norm", x, weight)
    return _norm(x, None, weight, eps, "silu", True)


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
    if activation not in get_args(GateActivation):
        raise ValueError(f"gated_rms_norm: activation must be 'silu' or 'sigmoid', got {activation!r}")
    _check_weight("gated_rms_norm", x, weight)
    return _norm(x, gate, weight, eps, activation, norm_before_gate)


def l2_norm(x: Tensor) -> Tensor:
    """Return `x * rsqrt(sum(x^2) + 1e-6)`: queries and keys of unit length, zero where x is zero. `x [..., D]`."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _L2_EPS)).to(x.dtype)


def _norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: GateActivation, norm_first: bool
) -> Tensor:
    written_out = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if written_out or forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return _equations(x, gate, weight, eps, activation, norm_first)
    return _Norm.apply(x, gate, weight, eps, activation, norm_first)


def _equations(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: GateActivation, norm_first: bool
) -> Tensor:
    opened = None if gate is None else _ACTIVATIONS[activation][0](_wide(gate))
    inner = x if opened is None or norm_first else x * opened
    y = _times(inner * _scale(inner, eps), weight)  # 16 bits times 32 are 32
    if opened is not None and norm_first:
        y = y * opened
    return y.to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps)


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


class _Norm(torch.autograd.Function):
    """`_equations`, of which the backward pass keeps the inputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:3])
        ctx.options = arguments[3:]
        return _equations(*arguments)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        # Of differentiable operations on what was given: so there is a second derivative. What is wide goes as soon as
        # it has been used: of seven such copies four are there at once.
        x, gate, weight = ctx.saved_tensors
        eps, activation, norm_first = ctx.options
        activate, through = _ACTIVATIONS[activation]
        of_x, of_gate, of_weight, *_ = ctx.needs_input_grad
        inner = x if gate is None or norm_first else x * activate(_wide(gate))
        scale = _scale(inner, eps)
        unit = inner * scale
        del inner
        d_gate = d_weight = None
        if gate is not None and norm_first:
            wide_gate = _wide(gate)
            if of_gate:
                d_gate = through(d_y * _times(unit, weight), wide_gate).to(gate.dtype)
            d = d_y * activate(wide_gate)
            del wide_gate
        else:
            d = _wide(d_y)
        if of_weight:
            d_weight = (d * unit).sum_to_size(weight.shape).to(weight.dtype)
        if not of_x and (norm_first or not of_gate):
            return None, d_gate, d_weight, None, None, None
        d = _times(d, weight)
        d = torch.addcmul(d, unit, (d * unit).mean(-1, keepdim=True), value=-1)
        del unit
        d = d * scale
        if gate is not None and not norm_first:
            if of_gate:
                d_gate = through(d * x, _wide(gate)).to(gate.dtype)
            d = d * activate(_wide(gate))
        return d.to(x.dtype) if of_x else None, d_gate, d_weight, None, None, None


def _through_silu(d_y: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(d_y, x)
    opening = torch.sigmoid(x)  # for a second derivative, which the operator has not
    return d_y * opening * (1 + x * (1 - opening))


def _through_sigmoid(d_y: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(d_y, torch.sigmoid(x))


# Each activation, and from the gradient of its output and its input the gradient of its input.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _through_silu),
    "sigmoid": (torch.sigmoid, _through_sigmoid),
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_weight(name: str, x: Tensor, weight: Tensor | None) -> None:
    # [D], or the trailing axes of x for norms over groups of channels: [G, D].
    if weight is not None and weight.shape != x.shape[x.dim() - weight.dim() :]:
        raise ValueError(f"{name}: weight must be [{x.shape[-1]}], the last axis of x, got {list(weight.shape)}")
