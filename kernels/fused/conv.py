"""The short causal depthwise convolution with its activation, forward and backward, one pass over memory each.

A program walks a block of tokens of one sequence, some channels wide, and keeps the last W-1 rows in registers: a row
is read once by the block that it is in, and again, from cache, by the next block if it is among the last W-1. Forward
reads x and writes y; backward reads x and dy, makes the sum before the activation anew, and writes dx. At B8 T4096
C2048 in bfloat16 that is 268 and 403 MB.

No block crosses a sequence's end. Sequence n of a packing has blocks from `cu_seqlens[n] // BT + n` on, one at least,
since the last of each sequence before it may be open; what is over is empty. So where a block lies follows from
`cu_seqlens` by a search in the program, and how many blocks there may be from shapes.

Kernels and device functions. Every name in capitals is a `constexpr`, but for T, C and N.

Shapes: T time, C channels, W taps, N sequences, BT tokens of a block, BC channels of a program, U rows read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(block, cu, T, N, per_row, steps, BT: tl.constexpr, VARLEN: tl.constexpr):
    """A block's sequence, where that begins and ends, and the block's first token, past the end if it is left over."""
    if VARLEN:
        n, past = block * 0, N + block * 0  # the sequence is in [n, past)
        for _ in range(steps):
            middle = (n + past) // 2
            here = tl.load(cu + middle).to(tl.int64) // BT + middle <= block
            past = tl.where(here, past, middle)
            n = tl.where(here, middle, n)
        start = tl.load(cu + n).to(tl.int64)
        end = tl.load(cu + n + 1).to(tl.int64)
        first = start + (block - start // BT - n) * BT
    else:
        n = block // per_row
        start = n.to(tl.int64) * T
        end = start + T
        first = start + (block % per_row) * BT
    return n.to(tl.int64), start, end, first


@triton.jit
def only_if(condition, c_ok, c):
    """The mask `c_ok` under a condition of the whole program; Triton 3.9's interpreter cannot join these two itself."""
    return c_ok & (c * 0 + condition.to(tl.int32) != 0)


@triton.jit
def row(x, stride, t, end, c, c_ok):
    """`x[t]`, 0 from `end` on."""
    return tl.load(x + t * stride + c, mask=only_if(t < end, c_ok, c), other=0.0)


@triton.jit
def row_or_tail(x, stride, tail, t, n, start, end, c, c_ok, C, W: tl.constexpr):
    """`x[t]`, and for the W-1 tokens before `start` what the tail holds, or 0."""
    value = tl.load(x + t * stride + c, mask=only_if((t >= start) & (t < end), c_ok, c), other=0.0)
    if tail is not None:
        at = tail + (n * C + c) * (W - 1) + (t - start + W - 1)
        old = tl.load(at, mask=only_if(t < start, c_ok, c), other=0.0).to(value.dtype)
        value = tl.where(t < start, old, value)
    return value


@triton.jit
def taps_and_bias(weight, bias, c, c_ok, W: tl.constexpr, BC: tl.constexpr):
    """A tuple of W rows `[BC]`, and the bias `[BC]`, in float32."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + w, mask=c_ok, other=0.0).to(tl.float32),)
    if bias is not None:
        return taps, tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)
    else:
        return taps, tl.zeros((BC,), tl.float32)


@triton.jit
def convolved(taps, shift, rows, FIRST: tl.constexpr, W: tl.constexpr):
    """`bias + sum_w taps[w] rows[FIRST + w]`."""
    total = taps[0] * rows[FIRST]
    for w in tl.static_range(1, W):
        total += taps[w] * rows[FIRST + w]
    return total + shift


@triton.jit
def input_gradient(taps, gradients, FIRST: tl.constexpr, W: tl.constexpr):
    """`sum_s taps[W-1-s] gradients[FIRST + s]`: what the tokens from one to W-1 after it ask of a row of x."""
    total = taps[W - 1] * gradients[FIRST]
    for s in tl.static_range(1, W):
        total += taps[W - 1 - s] * gradients[FIRST + s]
    return total


@triton.jit
def pre_gradient(z, dy, SILU: tl.constexpr):
    """The gradient of the sum before the activation, given that sum and `dy`."""
    if SILU:
        opened = 1.0 / (1.0 + tl.exp(-z))
        return dy * opened * (1.0 + z * (1.0 - opened))
    else:
        return dy


@triton.jit
def give_back(d, t, n, start, stop, end, first, c, c_ok, dx, d_tail, d_new, C, W: tl.constexpr):
    """Store the gradient of the row at `t`, which this block owns or which lies in the tail before it."""
    if d_new is not None:  # the row is also in the new tail
        if (t >= end - (W - 1)) & (t < end):
            d += tl.load(d_new + (n * C + c) * (W - 1) + (t - end + W - 1), mask=c_ok, other=0.0).to(tl.float32)
    tl.store(dx + t * C + c, d, mask=only_if((t >= first) & (t < stop), c_ok, c))
    if d_tail is not None:
        if t < start:
            tl.store(d_tail + (n * C + c) * (W - 1) + (t - start + W - 1), d, mask=c_ok)


@triton.jit(do_not_specialize=["T", "N", "per_row", "steps"])
def conv_kernel(x, weight, bias, tail, cu, y, new_tail, x_row, T, C, N, per_row, steps,
                W: tl.constexpr, SILU: tl.constexpr, VARLEN: tl.constexpr,
                BT: tl.constexpr, BC: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Rows of x at a stride of `x_row` to contiguous y, and each sequence's last W-1 rows of its tail and x."""
    programs = tl.cdiv(C, BC)
    c = (tl.program_id(0) % programs) * BC + tl.arange(0, BC)
    c_ok = c < C
    n, start, end, first = place(tl.program_id(0) // programs, cu, T, N, per_row, steps, BT, VARLEN)
    taps, shift = taps_and_bias(weight, bias, c, c_ok, W, BC)
    stop = tl.minimum(first + BT, end)
    rows = ()
    for s in tl.static_range(W - 1):
        before = row_or_tail(x, x_row, tail, first - (W - 1) + s, n, start, end, c, c_ok, C, W)
        rows = rows + (before.to(tl.float32),)
    for t in range(first, stop, U):
        for u in tl.static_range(U):  # all reads before the first store, which the compiler moves none across
            rows = rows + (row(x, x_row, t + u, end, c, c_ok).to(tl.float32),)
        for u in tl.static_range(U):
            z = convolved(taps, shift, rows, u, W)
            if SILU:
                z = z / (1.0 + tl.exp(-z))
            tl.store(y + (t + u) * C + c, z, mask=only_if(t + u < end, c_ok, c))
        rows = rows[U:]
    if (first + BT >= end) & ((first < end) | (first == start)):  # the sequence's last block
        for s in tl.static_range(W - 1):
            value = row_or_tail(x, x_row, tail, end - (W - 1) + s, n, start, end, c, c_ok, C, W)
            tl.store(new_tail + (n * C + c) * (W - 1) + s, value, mask=c_ok)


@triton.jit(do_not_specialize=["T", "N", "per_row", "steps"])
def conv_backward_kernel(x, weight, bias, tail, cu, dy, d_new, dx, d_tail, parts, x_row, T, C, N, per_row, steps,
                         W: tl.constexpr, SILU: tl.constexpr, VARLEN: tl.constexpr,
                         BT: tl.constexpr, BC: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The gradients of x and the tail, and the block's part of those of the taps and the bias.

    A row's gradient is whole once the W-1 tokens after it have been seen, so a block looks at W-1 tokens past its end,
    and a row is given back W-1 tokens late. The rows that come back before the first token are the tail.
    """
    block = tl.program_id(0) // tl.cdiv(C, BC)
    c = (tl.program_id(0) % tl.cdiv(C, BC)) * BC + tl.arange(0, BC)
    c_ok = c < C
    n, start, end, first = place(block, cu, T, N, per_row, steps, BT, VARLEN)
    taps, shift = taps_and_bias(weight, bias, c, c_ok, W, BC)
    stop = tl.minimum(first + BT, end)
    rows, gradients, sums, of_bias = (), (), (), tl.zeros((BC,), tl.float32)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros((BC,), tl.float32),)
    for s in tl.static_range(W - 1):
        before = row_or_tail(x, x_row, tail, first - (W - 1) + s, n, start, end, c, c_ok, C, W)
        rows = rows + (before.to(tl.float32),)
        gradients = gradients + (tl.zeros((BC,), tl.float32),)
    for t in range(first, stop, U):
        for u in tl.static_range(U):
            rows = rows + (row(x, x_row, t + u, end, c, c_ok).to(tl.float32),)
            gradients = gradients + (row(dy, C, t + u, end, c, c_ok).to(tl.float32),)
        given, gradients = gradients[W - 1 :], gradients[: W - 1]
        for u in tl.static_range(U):
            d = pre_gradient(convolved(taps, shift, rows, u, W), given[u], SILU)
            gradients = gradients + (d,)
            old, sums = sums, ()
            for w in tl.static_range(W):
                sums = sums + (old[w] + d * rows[u + w],)
            of_bias += d
            back = input_gradient(taps, gradients, u, W)
            give_back(back, t + u - (W - 1), n, start, stop, end, first, c, c_ok, dx, d_tail, d_new, C, W)
        rows, gradients = rows[U:], gradients[U:]
    t = first + tl.cdiv(tl.maximum(stop - first, 0), U) * U
    for s in tl.static_range(W - 1):
        rows = rows + (row(x, x_row, t + s, end, c, c_ok).to(tl.float32),)
        dy_row = row(dy, C, t + s, end, c, c_ok).to(tl.float32)
        gradients = gradients + (pre_gradient(convolved(taps, shift, rows, s, W), dy_row, SILU),)
        back = input_gradient(taps, gradients, s, W)
        give_back(back, t + s - (W - 1), n, start, stop, end, first, c, c_ok, dx, d_tail, d_new, C, W)
    ROWS: tl.constexpr = W if bias is None else W + 1
    at = parts + block.to(tl.int64) * ROWS * C + c
    for w in tl.static_range(W):
        tl.store(at + w * C, sums[w], mask=c_ok)
    if bias is not None:
        tl.store(at + W * C, of_bias, mask=c_ok)
