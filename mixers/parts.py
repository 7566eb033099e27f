"""The small things that token mixers share: short convolution, norms, a low-rank map, the check of an input.

Parameter names and shapes are those of `nn.Conv1d`, `nn.Linear` and the published layers, so that weights carry over
by name. Each builds on the meta device and has `reset_parameters`. May import kernels.

Shapes: B batch, T time, C channels, W taps, N sequences, D norm dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hybridzoo.kernels.norms import GateActivation, gated_rms_norm, rms_norm
from hybridzoo.kernels.packing import check_packing
from hybridzoo.kernels.short_conv import ConvActivation, ShortConvResult, short_conv
from hybridzoo.mixers.base import ConvInit


def count_sequences(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return N, the number of sequences in the input `x [B, T, d_model]` of a mixer with `weight [out, d_model]`.

    Raises `TypeError` where `x` is not of the weights' dtype (under autocast: not floating point), `ValueError` for
    another shape or device, or boundaries that do not fit.
    """
    d_model = weight.shape[1]
    if x.dim() != 3 or x.shape[2] != d_model:
        raise ValueError(f"x must be [B, T, d_model] = [B, T, {d_model}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but the mixer is on {weight.device}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must be {weight.dtype}, as the mixer's weights are, got {x.dtype}")
    if cu_seqlens is None:
        return x.shape[0]
    check_packing(cu_seqlens, x.shape[0], x.shape[1], x.device)
    return cu_seqlens.shape[0] - 1


def length_after(x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return `length [N]` int32, the tokens that each sequence has seen after a call on `x [B, T, ...]`."""
    if cu_seqlens is not None:
        new = cu_seqlens.diff().int()
        return new if before is None else before + new
    if before is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)
    return before + x.shape[1]


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last `size` tokens, then SiLU. `weight [C, 1, W]` as in `nn.Conv1d`."""

    def __init__(
        self, channels: int, size: int = 4, bias: bool = False, activation: ConvActivation | None = "silu"
    ) -> None:
        super().__init__()
        if channels < 1 or size < 1:
            raise ValueError(f"ShortConvolution: channels and size must be at least 1, got {channels} and {size}")
        self.channels, self.size, self.activation = channels, size, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init: ConvInit = "default") -> None:
        """Draw taps as `nn.Conv1d` does, or with `"mean"` as a running mean, every tap `1/W` within a tenth of it.

        The running mean lets neighbouring tokens meet from the first step; recall tasks then leave chance sooner.
        """
        if init not in ("default", "mean"):
            raise ValueError(f"ShortConvolution: init must be 'default' or 'mean', got {init!r}")
        bound = 1 / math.sqrt(self.size)  # nn.Conv1d's, whose fan-in is W for a depthwise kernel
        if init == "default":
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.normal_(1 / self.size, 0.1 / self.size)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound) if init == "default" else self.bias.zero_()

    def forward(self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None) -> ShortConvResult:
        """Convolve `x [B, T, C]` going on from `tail [N, C, W-1]`; returns `y [B, T, C]` and the new tail."""
        return short_conv(x, self.weight[:, 0], self.bias, tail, cu_seqlens, self.activation)

    def init_tail(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tail `[n, C, W-1]` of `n` sequences before their first token."""
        where, kind = self.weight.device if device is None else device, dtype or self.weight.dtype
        return torch.zeros(n, self.channels, self.size - 1, device=where, dtype=kind)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, bias={self.bias is not None}, activation={self.activation}"


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis, with `weight [D]` from ones. arXiv 1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMSNorm with an output gate: `norm(x) * act(gate)`, or `norm(x * act(gate))` with `norm_before_gate=False`.

    `group_size` norms every run of that many channels by itself (a divisor of `dim`; the weight stays `[dim]`).

    Raises `ValueError` where `group_size` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        activation: GateActivation = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or dim % group_size):
            raise ValueError(f"GatedRMSNorm: group_size {group_size} does not divide dim {dim}")
        if activation not in ("silu", "sigmoid"):
            raise ValueError(f"GatedRMSNorm: activation must be 'silu' or 'sigmoid', got {activation!r}")
        self.dim, self.eps, self.activation = dim, eps, activation
        self.norm_before_gate, self.group_size = norm_before_gate, group_size
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Norm and gate `x, gate [..., D]`."""
        weight: Tensor = self.weight
        if self.group_size is not None:
            grouped = (self.dim // self.group_size, self.group_size)
            weight = weight.view(grouped)
            x, gate = x.reshape(*x.shape[:-1], *grouped), gate.reshape(*gate.shape[:-1], *grouped)
        y = gated_rms_norm(x, gate, weight, self.eps, self.activation, self.norm_before_gate)
        return y if self.group_size is None else y.flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, eps={self.eps}, activation={self.activation}, norm_before_gate={self.norm_before_gate}, "
            f"group_size={self.group_size}"
        )


class LowRank(nn.Sequential):
    """`d_in -> rank -> d_out` without a non-linearity; the bias, where asked for, is on the second map only."""

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool = False) -> None:
        super().__init__(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias))

    def reset_parameters(self) -> None:
        for linear in self.children():
            assert isinstance(linear, nn.Linear)
            linear.reset_parameters()
