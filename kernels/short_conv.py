"""The short causal depthwise convolution that recurrent mixers put on their projections.

A convolution over W tokens needs the W-1 inputs before its first one: the tail. A call returns the tail that the next
call starts from, so a sequence may be cut anywhere. Packed sequences take the same path: each one's tail is laid
before it, one convolution runs over the whole row, and the outputs that straddle two sequences are left out. May
import torch and packing.py.

Shapes: B batch, T time, C channels, W taps, N sequences (B, or those packed into one row).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hybridzoo.kernels.fused.conv_op import fused_conv, refusal
from hybridzoo.kernels.packing import check_packing, locate

ConvActivation: TypeAlias = Literal["silu"]
ConvBackend: TypeAlias = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")


class ShortConvResult(NamedTuple):
    """`y [B, T, C]` in the dtype of `x`; `tail [N, C, W-1]`, the last inputs of each sequence, oldest first."""

    y: Tensor
    tail: Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: ConvActivation | None = "silu",
    backend: ConvBackend = "auto",
) -> ShortConvResult:
    """Return `act(bias + sum_w weight[:, w] * x[t - (W-1) + w])` for each channel, and the new tail.

    `x [B, T, C]`, `weight [C, W]` (the last tap meets the newest token, as in `nn.Conv1d`), `bias [C]`, `tail
    [N, C, W-1]` (zeros when None), `cu_seqlens [N+1]` with B = 1. Sums run in float32 for 16-bit inputs. Everything but
    `cu_seqlens` is differentiable, the tails on both sides too. T may be 0 and smaller than W-1.

    `backend`: `auto` is `triton` for the calls on a GPU that it takes, else `torch`. `triton` rounds a 16-bit y once
    (`torch` after the sum, the bias and the activation), and has a gradient of first order in reverse mode alone.

    Raises `TypeError` for integer inputs and for a weight narrower than `x`, `ValueError` for shapes, devices and
    activations that do not fit, and for what a backend that is asked for by name cannot take.
    """
    _check(x, weight, bias, tail, cu_seqlens, activation)
    if _by_triton(x, weight, bias, tail, backend):
        return ShortConvResult(*fused_conv(x, weight, bias, tail, cu_seqlens, activation == "silu"))
    W = weight.shape[1]
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if tail is None else tail.transpose(1, 2).to(x.dtype)
        padded = torch.cat([before, x], dim=1)  # [B, W-1+T, C]
        y = _convolve(padded, weight, bias)
        new_tail = padded[:, x.shape[1] :]
    else:
        y, new_tail = _packed(x, weight, bias, tail, cu_seqlens)
    # The tail is copied out: a view would keep the whole padded input alive for as long as the state lives.
    return ShortConvResult(F.silu(y) if activation == "silu" else y, new_tail.transpose(1, 2).contiguous())


def _by_triton(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"short_conv: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return x.is_cuda and refusal(x, weight, bias, tail) is None
    if backend == "triton" and (why := refusal(x, weight, bias, tail)) is not None:
        raise ValueError(f"short_conv: backend='triton' {why}")
    return backend == "triton"


def _packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    # Row of the padded layout:  tail of 0 | sequence 0 | tail of 1 | sequence 1 | ...
    # Token t of sequence n moves from t to t + (n+1)(W-1), and its output stands W-1 places earlier. A sequence's last
    # W-1 rows always lie within its own tail and tokens, so short and empty sequences need no case of their own.
    T, C = x.shape[1:]
    N, past = cu_seqlens.shape[0] - 1, weight.shape[1] - 1
    sequence, _ = locate(cu_seqlens, T)
    output_row = torch.arange(T, device=x.device) + sequence * past
    tail_row = torch.arange(N * past, device=x.device).view(N, past)  # as if all sequences were empty
    padded = x.new_zeros(T + N * past, C).index_copy(0, output_row + past, x[0])
    if tail is not None and past:
        start_row = tail_row + cu_seqlens[:-1, None]
        padded = padded.index_copy(0, start_row.flatten(), tail.transpose(1, 2).reshape(N * past, C).to(x.dtype))
    y = _convolve(padded[None], weight, bias)[0].index_select(0, output_row)
    end_row = tail_row + cu_seqlens[1:, None]
    return y[None], padded.index_select(0, end_row.flatten()).view(N, past, C)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _ShiftedTaps.apply(padded, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _ShiftedTaps(torch.autograd.Function):
    """`padded [B, W-1+T, C]`, `weight [C, W]` -> `[B, T, C]`, as W shifted multiply-adds into one buffer.

    On a CPU this is 3 to 4 times faster, forward and backward, than `F.conv1d(groups=C)`, whose backward there is a
    loop over groups, and twice as fast as leaving the same sums to autograd, which pads every tap's gradient to full
    length before it adds them (measured at B8 T512 C256 and B1 T2048 C768, float32).
    """

    @staticmethod
    def forward(padded: Tensor, weight: Tensor) -> Tensor:
        T = padded.shape[1] - weight.shape[1] + 1
        taps = weight.t().to(_sum_dtype(padded)).contiguous()  # [W, C]
        source = padded.to(taps.dtype)
        last = taps.shape[0] - 1
        y = source[:, :T] * taps[0]
        for w in range(1, last):
            y.addcmul_(source[:, w : w + T], taps[w])
        # torch.compile of 2.11 drops the gradients of a result that was written into, or given back by `to` as it was.
        if last:
            y = torch.addcmul(y, source[:, last:], taps[last])
        return y if y.dtype == padded.dtype else y.to(padded.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, need_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
        T = dy.shape[1]
        dy = dy.to(_sum_dtype(padded))
        dx = dw = None
        if need_x:
            taps = weight.t().to(dy.dtype).contiguous()
            dx = torch.zeros(padded.shape, dtype=dy.dtype, device=dy.device)
            for w in range(taps.shape[0]):
                dx[:, w : w + T].addcmul_(dy, taps[w])
            dx = dx.to(padded.dtype)
        if need_weight:
            source = padded.to(dy.dtype)
            dw = torch.stack([(dy * source[:, w : w + T]).sum((0, 1)) for w in range(weight.shape[1])], dim=1)
            dw = dw.to(weight.dtype)
        return dx, dw


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"short_conv: x must be [B, T, C], got {list(x.shape)}")
    B, T, C = x.shape
    if weight.dim() != 2 or weight.shape[0] != C or weight.shape[1] < 1:
        raise ValueError(f"short_conv: weight must be [C, W] = [{C}, W >= 1], got {list(weight.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"short_conv: bias must be [C] = [{C}], got {list(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be 'silu' or None, got {activation!r}")
    if cu_seqlens is not None:
        check_packing(cu_seqlens, B, T, x.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if tail is not None and tail.shape != (N, C, weight.shape[1] - 1):
        raise ValueError(
            f"short_conv: tail must be [N, C, W-1] = {[N, C, weight.shape[1] - 1]}, got {list(tail.shape)}; "
            "it comes from a call with the same channels, taps and number of sequences"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("tail", tail)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"short_conv: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"short_conv: {name} is on {tensor.device}, x on {x.device}")
    if weight.dtype != x.dtype and x.element_size() >= weight.element_size():
        raise TypeError(
            f"short_conv: x is {x.dtype} but weight {weight.dtype}; cast one (float32 weights take 16-bit x)"
        )
