"""The short convolution's Triton kernels as an operator with its own backward: which calls they take, and launches.

Nothing is kept for the backward pass but the inputs. Nothing here waits for the device. Triton is imported when the
operator first runs.

Shapes: B batch, T time, C channels, W taps, N sequences (B, or those packed into one row).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.checks import check_bounds
from hybridzoo.kernels.derivatives import refuse_forward_mode
from hybridzoo.kernels.fused.config import options
from hybridzoo.kernels.fused.form import dtypes_of
from hybridzoo.kernels.fused.launch import Launch
from hybridzoo.kernels.fused.support import DTYPES, device_refusal
from hybridzoo.kernels.operators import below_autograd, define, dense_like, first_order

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


class Form(NamedTuple):
    """What a call's launches follow from: calls of one form share them."""

    B: int
    T: int
    C: int
    W: int
    N: int
    x_row: int  # the stride of tokens
    silu: bool
    packed: bool
    d_new: bool  # backward: whether the new tail has a gradient, and the old one needs one
    d_tail: bool
    dtypes: tuple[torch.dtype | None, ...]
    block: int  # tokens of a block forward, and backward
    block_backward: int

    def blocks(self, block: int) -> int:
        """How many blocks of tokens there may be; conv.py says where the blocks of a packing begin."""
        return self.T // block + self.N if self.packed else self.B * self.per_row(block)

    def per_row(self, block: int) -> int:
        """The blocks of a row."""
        return max(1, -(-self.T // block))  # a row without tokens still has a tail to hand on


def form_of(call: ConvCall, d_new: bool = False, d_tail: bool = False) -> tuple[Form, dict[str, Tensor | None]]:
    """A call's form, and its tensors as the kernels read and name them."""
    B, T, C = call.x.shape
    x = call.x.reshape(B * T, C)  # a view where tokens lie at one stride, so also of a slice of channels
    x = x if x.stride(1) == 1 else x.contiguous()
    N = B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    found = {
        "x": x,
        "weight": call.weight.contiguous(),
        "bias": None if call.bias is None else call.bias.contiguous(),
        "tail": None if call.tail is None else call.tail.contiguous(),
        "cu": None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
    }
    dtypes = dtypes_of(found.values())
    W, packed = call.weight.shape[1], call.cu_seqlens is not None
    form = Form(B, T, C, W, N, x.stride(0), call.silu, packed, d_new, d_tail, dtypes, BLOCK, BLOCK_BACKWARD)
    return form, found


@functools.lru_cache(maxsize=512)
def forward_launch(form: Form) -> Launch:
    """The kernel that fills contiguous `y [B, T, C]` and `new_tail [N, C, W-1]`."""
    from hybridzoo.kernels.fused.conv import conv_kernel

    return _launch(conv_kernel, form, form.block, AT_ONCE)


@functools.lru_cache(maxsize=512)
def backward_launch(form: Form) -> Launch:
    """The kernel that fills `dx`, `d_tail` and `parts`, given `dy` and `d_new`, the gradients of y and of the new tail.

    `parts` is float32 `[blocks, W or W+1, C]`: each block's part of the gradients of the taps and, if there is one, the
    bias. All are contiguous.
    """
    from hybridzoo.kernels.fused.conv import conv_backward_kernel

    few = form.W <= 4
    at_once = AT_ONCE_BACKWARD if few else AT_ONCE_BACKWARD_PAST_4_TAPS
    registers = REGISTERS_BACKWARD if few and not form.d_new and not form.d_tail else None
    return _launch(conv_backward_kernel, form, form.block_backward, at_once, registers)


def _launch(kernel: Any, form: Form, block: int, at_once: int, registers: int | None = None) -> Launch:
    channels = min(CHANNELS, max(16, 1 << (form.C - 1).bit_length()))
    numbers = {
        "x_row": form.x_row,
        "T": form.T,
        "C": form.C,
        "N": form.N,
        "per_row": form.per_row(block),
        "steps": form.N.bit_length(),  # of a search among N
    }
    constants = {
        "W": form.W,
        "SILU": form.silu,
        "VARLEN": form.packed,
        "BT": block,
        "BC": channels,
        "U": at_once,
    }
    grid = (form.blocks(block) * -(-form.C // channels),)
    schedule = options(WARPS) if registers is None else {**options(WARPS), "maxnreg": registers}
    # Which gradients there are decides, as dtypes do, what is compiled.
    return Launch(kernel, grid, numbers, constants, schedule, (*form.dtypes, form.d_new, form.d_tail))


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


@without_autocast
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = ConvCall(*arguments)
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        check_bounds(call.cu_seqlens.tolist(), call.x.shape[1])
    y, new_tail = dense_like(call.x), _new_tail(call)
    form, found = form_of(call)
    forward_launch(form).start(call.x.device, {**found, "y": y, "new_tail": new_tail})
    return y, new_tail


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = ConvCall(*arguments)
    return dense_like(call.x), _new_tail(call)


@without_autocast
def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, through_tail, dy, d_new = arguments
    call = ConvCall(*fields)
    dx, dweight, dbias, d_tail = _gradients(call, through_tail)
    dy = torch.zeros_like(dx) if dy is None else dy.contiguous()
    d_new = None if d_new is None else d_new.contiguous()
    form, found = form_of(call, d_new is not None, through_tail)
    parts = dx.new_empty(
        form.blocks(form.block_backward), form.W + (call.bias is not None), form.C, dtype=torch.float32
    )
    given = {"dy": dy, "d_new": d_new, "dx": dx, "d_tail": d_tail if through_tail else None, "parts": parts}
    backward_launch(form).start(dx.device, {**found, **given})
    total = parts.sum(0)
    dweight.copy_(total[: form.W].t())
    if call.bias is not None:
        dbias.copy_(total[form.W])
    return dx, dweight, dbias, d_tail


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(ConvCall(*arguments[:6]), arguments[6])


def _gradients(call: ConvCall, through_tail: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of x, weight, bias and tail, contiguous; empty for what is not there or not asked for."""
    d_bias = call.x.new_empty(0) if call.bias is None else dense_like(call.bias)
    d_tail = dense_like(call.tail) if call.tail is not None and through_tail else call.x.new_empty(0)
    return dense_like(call.x), dense_like(call.weight), d_bias, d_tail


_CALL = "Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor? cu_seqlens, bool silu"
_conv_op = define(f"fused_conv({_CALL}) -> (Tensor, Tensor)", _forward, _fake_forward)
_conv_backward_op = define(
    f"fused_conv_backward({_CALL}, bool through_tail, Tensor? dy, Tensor? d_new) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_first_back = first_order(_conv_backward_op, "short_conv has no second derivative on this backend: use backend='torch'")


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:5])
        ctx.silu = arguments[5]
        ctx.set_materialize_grads(False)
        output: tuple[Tensor, Tensor] = below_autograd(below, arguments)
        return output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        through_tail = inputs[3] is not None and ctx.needs_input_grad[4]  # after what computes
        dx, dweight, dbias, d_tail = _first_back(*inputs, ctx.silu, through_tail, *d_outputs)
        return None, dx, dweight, None if inputs[2] is None else dbias, d_tail if through_tail else None, None, None


_conv_op.differentiate(_Conv, 4)
