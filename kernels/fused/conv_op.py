"""The short convolution's Triton kernels as an operator with its own backward: which calls they take, and launches.

Nothing is kept for the backward pass but the inputs. Nothing here waits for the device. Triton is imported when the
operator first runs.

Shapes: B batch, T time, C channels, W taps, N sequences (B, or those packed into one row).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.checks import check_bounds
from hybridzoo.kernels.derivatives import refuse_forward_mode
from hybridzoo.kernels.fused.config import options
from hybridzoo.kernels.fused.launch import Launch
from hybridzoo.kernels.fused.support import DTYPES, device_refusal
from hybridzoo.kernels.recurrence_op import dense_like

MAX_TAPS = 8  # the last rows of a block live in registers
# Tokens of a block: the fewer, the more programs; the more, the fewer rows that are read twice, and backward the fewer
# parts of which the gradients of the taps are summed.
BLOCK, BLOCK_BACKWARD = 64, 128
CHANNELS = 256  # of a program of two warps: four a thread, 8 bytes a load in 16 bits
WARPS = 2
# Rows that are read before the first of them is used, which keeps the memory busy. Both divide the blocks.
AT_ONCE, AT_ONCE_BACKWARD, AT_ONCE_BACKWARD_PAST_4_TAPS = 8, 4, 2
# Registers of a thread backward, where that many do without spills: eight programs on a multiprocessor, not five.
REGISTERS_BACKWARD = 128


class ConvCall(NamedTuple):
    """One call: `x [B, T, C]`, `weight [C, W]`, `bias [C]`, `tail [N, C, W-1]`, `cu_seqlens [N+1]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    tail: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> str | None:
    """Why this call cannot run on Triton, as the rest of a sentence that begins with the backend's name; or None."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("tail", tail)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"takes bfloat16, float16 and float32, got {name} in {tensor.dtype}: use backend='torch'"
    if weight.shape[1] > MAX_TAPS:
        return f"takes up to {MAX_TAPS} taps, got W = {weight.shape[1]}: use backend='torch'"
    if not x.shape[2]:
        return "takes one channel or more, got C = 0: use backend='torch'"
    return device_refusal(x.device.type, x.device.index)


def forward_launch(call: ConvCall, y: Tensor, new_tail: Tensor) -> Launch:
    """The kernel that fills contiguous `y [B, T, C]` and `new_tail [N, C, W-1]`."""
    from hybridzoo.kernels.fused.conv import conv_kernel

    return _launch(conv_kernel, call, {"y": y, "new_tail": new_tail}, BLOCK, AT_ONCE)


def backward_launch(
    call: ConvCall, dy: Tensor, d_new: Tensor | None, dx: Tensor, d_tail: Tensor | None
) -> tuple[Launch, Tensor]:
    """The kernel that fills `dx` and `d_tail` given the gradients of y and of the new tail, and its other result.

    That is float32 `[blocks, W or W+1, C]`: each block's part of the gradients of the taps and, if there is one, the
    bias. All are contiguous.
    """
    from hybridzoo.kernels.fused.conv import conv_backward_kernel

    rows = call.weight.shape[1] + (call.bias is not None)
    parts = call.x.new_empty(_blocks(call, BLOCK_BACKWARD), rows, call.x.shape[2], dtype=torch.float32)
    given = {"dy": dy, "d_new": d_new, "dx": dx, "d_tail": d_tail, "parts": parts}
    few = call.weight.shape[1] <= 4
    at_once = AT_ONCE_BACKWARD if few else AT_ONCE_BACKWARD_PAST_4_TAPS
    launch = _launch(conv_backward_kernel, call, given, BLOCK_BACKWARD, at_once)
    if few and d_new is None and d_tail is None:
        launch.options["maxnreg"] = REGISTERS_BACKWARD
    return launch, parts


def _blocks(call: ConvCall, block: int) -> int:
    """How many blocks of tokens there may be; conv.py says where the blocks of a packing begin."""
    B, T, _ = call.x.shape
    return B * _per_row(T, block) if call.cu_seqlens is None else T // block + call.cu_seqlens.shape[0] - 1


def _per_row(T: int, block: int) -> int:
    return max(1, -(-T // block))  # a row without tokens still has a tail to hand on


def _launch(kernel: Any, call: ConvCall, own: dict[str, Tensor | None], block: int, at_once: int) -> Launch:
    B, T, C = call.x.shape
    x = call.x.reshape(B * T, C)  # a view where tokens lie at one stride, so also of a slice of channels
    x = x if x.stride(1) == 1 else x.contiguous()
    N = B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    channels = min(CHANNELS, max(16, 1 << (C - 1).bit_length()))
    arguments = {
        "x": x,
        "weight": call.weight.contiguous(),
        "bias": None if call.bias is None else call.bias.contiguous(),
        "tail": None if call.tail is None else call.tail.contiguous(),
        "cu": None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
        "x_row": x.stride(0),
        "T": T,
        "C": C,
        "N": N,
        "per_row": _per_row(T, block),
        "steps": N.bit_length(),  # of a search among N
    }
    constants = {
        "W": call.weight.shape[1],
        "SILU": call.silu,
        "VARLEN": call.cu_seqlens is not None,
        "BT": block,
        "BC": channels,
        "U": at_once,
    }
    grid = (_blocks(call, block) * -(-C // channels), 1)
    return Launch(kernel, grid, {**arguments, **own}, constants, options(WARPS))


def _new_tail(call: ConvCall) -> Tensor:
    B, _, C = call.x.shape
    N = B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return call.x.new_empty(N, C, call.weight.shape[1] - 1)


def fused_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """`short_conv` by Triton, its arguments already checked: contiguous `y [B, T, C]` and new tail `[N, C, W-1]`.

    Raises `NotImplementedError` in forward mode, whose tangents an operator would drop without a word.
    """
    refuse_forward_mode("short_conv", (x, weight, bias, tail))
    return _conv_op(x, weight, bias, tail, cu_seqlens, silu)


@torch.library.custom_op("hybridzoo::fused_conv", mutates_args=())
@without_autocast
def _conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    call = ConvCall(x, weight, bias, tail, cu_seqlens, silu)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens.tolist(), x.shape[1])
    y, new_tail = dense_like(x), _new_tail(call)
    forward_launch(call, y, new_tail).start(x.device)
    return y, new_tail


@_conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return dense_like(x), _new_tail(ConvCall(x, weight, bias, tail, cu_seqlens, silu))


@torch.library.custom_op("hybridzoo::fused_conv_backward", mutates_args=())
@without_autocast
def _conv_backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    through_tail: bool,
    dy: Tensor | None,
    d_new: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = ConvCall(x, weight, bias, tail, cu_seqlens, silu)
    dx, dweight, dbias, d_tail = _gradients(call, through_tail)
    dy = torch.zeros_like(dx) if dy is None else dy.contiguous()
    d_new = None if d_new is None else d_new.contiguous()
    launch, parts = backward_launch(call, dy, d_new, dx, d_tail if through_tail else None)
    launch.start(x.device)
    W = weight.shape[1]
    total = parts.sum(0)
    dweight.copy_(total[:W].t())
    if bias is not None:
        dbias.copy_(total[W])
    return dx, dweight, dbias, d_tail


@_conv_backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    through_tail: bool,
    dy: Tensor | None,
    d_new: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(ConvCall(x, weight, bias, tail, cu_seqlens, silu), through_tail)


def _gradients(call: ConvCall, through_tail: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of x, weight, bias and tail, contiguous; empty for what is not there or not asked for."""
    d_bias = call.x.new_empty(0) if call.bias is None else dense_like(call.bias)
    d_tail = dense_like(call.tail) if call.tail is not None and through_tail else call.x.new_empty(0)
    return dense_like(call.x), dense_like(call.weight), d_bias, d_tail


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, d_new: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail, cu_seqlens = ctx.saved_tensors
    through_tail = tail is not None and ctx.needs_input_grad[3]
    dx, dweight, dbias, d_tail = _conv_backward_op(x, weight, bias, tail, cu_seqlens, ctx.silu, through_tail, dy, d_new)
    return dx, dweight, None if bias is None else dbias, d_tail if through_tail else None, None, None


_conv_op.register_autograd(_differentiate, setup_context=_setup_context)
