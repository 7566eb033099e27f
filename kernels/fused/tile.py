"""What the Triton kernels do inside one tile of 16 tokens: decays, products of pairs, the unit-triangular inverse.

Device functions only. Every name in capitals is a `constexpr`.

Shapes: C = 16 slots in a tile, K key dim, V value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

C = tl.constexpr(16)


@triton.jit
def mm(a, b, MODE: tl.constexpr):
    """`a @ b` into float32: bf16 operands for MODE "bf16", else float32 ones in that input precision."""
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=MODE)


@triton.jit
def load(ptr, pos, head, heads, dim, cols, rows_ok, cols_ok):
    """`x[pos, head, cols]` of a contiguous `[tokens, heads, dim]` as float32 `[C, cols]`, 0 outside."""
    at = ptr + (pos[:, None].to(tl.int64) * heads + head) * dim + cols[None, :]
    return tl.load(at, mask=rows_ok[:, None] & cols_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def load1(ptr, pos, head, heads, rows_ok):
    """`x[pos, head]` of a contiguous `[tokens, heads]` as float32 `[C]`, 0 outside."""
    return tl.load(ptr + pos.to(tl.int64) * heads + head, mask=rows_ok, other=0.0).to(tl.float32)


@triton.jit
def row(x, index):
    """Row `index` of `x [C, K]`: `[K]`."""
    i = tl.arange(0, 16)
    return tl.sum(tl.where(i[:, None] == index, x, 0.0), 0)


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`."""
    return tl.where(x > 15.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 15.0))))


@triton.jit
def inverse(A, MODE: tl.constexpr):
    """`(I + A)^-1` for strictly lower `A [16, 16]`: blocks of 4 at once, then doubled twice."""
    i = tl.arange(0, 16)
    r, c = i[:, None], i[None, :]
    eye = tl.where(r == c, 1.0, 0.0)
    D = tl.where((r // 4) == (c // 4), A, 0.0)
    X = mm(eye - D, eye + mm(D, D, MODE), MODE)
    B = tl.where(((r // 8) == (c // 8)) & ((r // 4) != (c // 4)), A, 0.0)
    X = X - mm(mm(X, B, MODE), X, MODE)
    B = tl.where((r // 8) != (c // 8), A, 0.0)
    return X - mm(mm(X, B, MODE), X, MODE)


@triton.jit
def middles(G):
    """References of pairs, given `G [16, K]`: the tile's middle `[1, K]`, and each half's own middle `[16, K]`."""
    i = tl.arange(0, 16)
    middle = row(G, 7)[None, :]
    half = tl.where(i[:, None] < 8, row(G, 3)[None, :], row(G, 11)[None, :])
    return middle, half


@triton.jit
def masks():
    """Pairs within a half of the tile, `j <= i`, and `j < i`: three `[16, 16]`."""
    i = tl.arange(0, 16)
    r, c = i[:, None], i[None, :]
    return (r // 8) == (c // 8), r >= c, r > c
