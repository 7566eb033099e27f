"""What the Triton kernels do inside a tile of tokens: loads and stores, decays, the unit-triangular inverse.

Device functions only. Every name in capitals is a `constexpr`.

Shapes: C slots in a tile of tokens, K key dim, V value dim, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x, MODE: tl.constexpr):
    """`x` as `mm` rounds it, in float32."""
    if MODE == "bf16":
        return x.to(tl.bfloat16).to(tl.float32)
    elif MODE == "tf32":
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def mm(a, b, MODE: tl.constexpr):
    """`a @ b` into float32: bf16 operands for MODE "bf16", else float32 ones in that input precision.

    For "tf32" they are rounded first: the multiplier cuts off what it does not take.
    """
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "tf32":
        return tl.dot(operand(a.to(tl.float32), MODE), operand(b.to(tl.float32), MODE), input_precision=MODE)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=MODE)


@triton.jit
def load(ptr, pos, head, heads, dim, cols, rows_ok, cols_ok):
    """`x[pos, head, cols]` of a contiguous `[tokens, heads, dim]` as float32 `[C, cols]`, 0 outside."""
    at = ptr + (pos[:, None].to(tl.int64) * heads + head) * dim + cols[None, :]
    return tl.load(at, mask=rows_ok[:, None] & cols_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def store(ptr, value, pos, head, heads, dim, cols, rows_ok, cols_ok):
    """Put `value [C, cols]` at `x[pos, head, cols]`."""
    at = ptr + (pos[:, None].to(tl.int64) * heads + head) * dim + cols[None, :]
    tl.store(at, value, mask=rows_ok[:, None] & cols_ok[None, :])


@triton.jit
def load1(ptr, pos, head, heads, rows_ok):
    """`x[pos, head]` of a contiguous `[tokens, heads]` as float32 `[C]`, 0 outside."""
    return tl.load(ptr + pos.to(tl.int64) * heads + head, mask=rows_ok, other=0.0).to(tl.float32)


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`."""
    return tl.where(x > 15.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 15.0))))


@triton.jit
def wide(x, MODE: tl.constexpr):
    """`x` as log-decays are summed: float64 beside float32 products, where the differences of two sums of hundreds are
    to be right in the last place."""
    if MODE == "bf16":
        return x
    else:
        return x.to(tl.float64)


@triton.jit
def exponential(x, MODE: tl.constexpr):
    """`exp(x)` of a `wide` x in float32; beside bf16 products without care for results below 1e-38."""
    if MODE == "bf16":
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = x * 1.4426950408889634
        near = y.to(tl.float32)
        return tl.exp2(near) * (1 + (y - near).to(tl.float32) * 0.6931471805599453)


@triton.jit
def inverse(A, MODE: tl.constexpr, MERGE: tl.constexpr, C: tl.constexpr):
    """`(I + A)^-1` for strictly lower `A [C, C]`: blocks of 4 at once, then doubled; past 16 in precision MERGE."""
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    eye = tl.where(r == c, 1.0, 0.0)
    D = tl.where((r // 4) == (c // 4), A, 0.0)
    X = mm(eye - D, eye + mm(D, D, MODE), MODE)
    B = tl.where(((r // 8) == (c // 8)) & ((r // 4) != (c // 4)), A, 0.0)
    X = X - mm(mm(X, B, MODE), X, MODE)
    B = tl.where(((r // 16) == (c // 16)) & ((r // 8) != (c // 8)), A, 0.0)
    X = X - mm(mm(X, B, MODE), X, MODE)
    if C >= 32:
        B = tl.where(((r // 32) == (c // 32)) & ((r // 16) != (c // 16)), A, 0.0)
        X = X - mm(mm(X, B, MERGE), X, MERGE)
    return X


@triton.jit
def log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY: tl.constexpr, ERASE: tl.constexpr, FLOOR: tl.constexpr,
              C: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """`log D [C, BK]` (channel decay, or any erase) or `[C]`; and the erase logits with the readout."""
    logit = tl.zeros((C, BK), tl.float32)
    if DECAY == 2:
        x = load(g, pos, hv, HV, K, kc, ok, k_ok)
    elif DECAY == 1:
        x = load1(g, pos, hv, HV, ok)
    else:
        x = tl.zeros((C,), tl.float32)
    if ERASE:
        logit = load(z, pos, hv, HV, K, kc, ok, k_ok) + u[None, :]
        if DECAY != 2:
            x = x[:, None]
        x = tl.where(ok[:, None] & k_ok[None, :], x - softplus(logit), 0.0)
    return tl.maximum(x, FLOOR), logit


@triton.jit
def tanh(x):
    """`tanh(x)` and its slope, which as `1 - tanh^2` had no digits left near 1."""
    y = tl.exp(-2 * tl.abs(x))
    found = (1 - y) / (1 + y)
    return tl.where(x < 0, -found, found), 4 * y / ((1 + y) * (1 + y))


@triton.jit
def l2_factors(q, k, pos, h, H, K, ok, C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr):
    """What queries and keys are multiplied by to have length one, `rsqrt(sum x^2 + 1e-6)`: `[C]` each."""
    qq = tl.zeros((C,), tl.float32)
    kk = tl.zeros((C,), tl.float32)
    for d in range(0, BK, D):
        kc = d + tl.arange(0, D)
        qt = load(q, pos, h, H, K, kc, ok, kc < K)
        kt = load(k, pos, h, H, K, kc, ok, kc < K)
        qq += tl.sum(qt * qt, 1)
        kk += tl.sum(kt * kt, 1)
    return tl.rsqrt(qq + 1e-6), tl.rsqrt(kk + 1e-6)
