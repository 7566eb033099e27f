"""The kernels of decoding: one token of every sequence, the state read once and written once.

Written as the recurrence stands, with no product of matrices: what takes time is moving the state. All arithmetic is in
float32.

Shapes: N sequences, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.tile import readout, softplus


@triton.jit
def vector(ptr, head, dim, cols, ok):
    """`x[head, cols]` of a contiguous `[heads, dim]` as float32, 0 outside."""
    return tl.load(ptr + head.to(tl.int64) * dim + cols, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def unit(x):
    """`x * rsqrt(sum x^2 + 1e-6)`."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def readout_kernel(
    mean0, down, up, u, HV, K, V, down_head, up_head,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`u [N HV, K]`, what a content gate adds to the erase logits: a program a head of a sequence.

    Ahead of the step, since it takes every channel of a head's mean, which the programs of a step write in place.
    """
    head = tl.program_id(0)
    hv = (head % HV).to(tl.int64)
    kc, vc, rc = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    k_ok, v_ok, r_ok = kc < K, vc < V, rc < RANK
    U1 = tl.load(down + hv * down_head + rc[:, None] * V + vc[None, :], mask=r_ok[:, None] & v_ok[None, :], other=0.0)
    U2 = tl.load(up + hv * up_head + kc[:, None] * RANK + rc[None, :], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
    tl.store(u + head.to(tl.int64) * K + kc, readout(vector(mean0, head, V, vc, v_ok), U1, U2), mask=k_ok)


@triton.jit
def step_kernel(
    q, k, v, g, z, e, w, u, S0, sum0, mean0, count0,
    o, S1, sum1, mean1, count1,
    scale, H, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """A program takes BV value channels of one head of one sequence.

    S1, sum1 and mean1 may be S0, sum0 and mean0. Every head of a sequence reads its count: count1 is not count0.
    """
    # The parts of a head next to each other: they read one row of the state after another.
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    n, hv = head // HV, head % HV
    key_head = n * H + hv // (HV // H)
    kc, vc = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = kc < K, vc < V
    state = head.to(tl.int64) * K * V + kc[:, None] * V + vc[None, :]
    state_ok = k_ok[:, None] & v_ok[None, :]
    # First of all, since it takes longest.
    S = tl.load(S0 + state, mask=state_ok, other=0.0)

    qt = vector(q, key_head, K, kc, k_ok)
    kt = vector(k, key_head, K, kc, k_ok)
    if NORM:
        qt, kt = unit(qt), unit(kt)
    qt = qt * scale
    ek = kt
    if CORRECT == 1:
        ek = kt * tl.load(e + head).to(tl.float32)
    elif CORRECT == 2:
        ek = kt * vector(e, head, K, kc, k_ok)
    log_D = tl.zeros((BK,), tl.float32)
    if DECAY == 1:
        log_D += tl.load(g + head).to(tl.float32)
    elif DECAY == 2:
        log_D += vector(g, head, K, kc, k_ok)
    seen = tl.load(count0 + n)
    if ERASE:
        logit = vector(z, head, K, kc, k_ok)
        if CONTENT > 0:
            logit += vector(u, head, K, kc, k_ok)
            seen += 1
        log_D -= softplus(logit)
    full = seen == CONTENT

    new = vector(v, head, V, vc, v_ok)
    if WRITE == 1:
        new = new * tl.load(w + head).to(tl.float32)
    elif WRITE == 2:
        new = new * vector(w, head, V, vc, v_ok)
    stored = S
    if DECAY > 0 or ERASE:
        S = S * tl.exp(tl.maximum(log_D, FLOOR))[:, None]
    if CORRECT > 0:
        new -= tl.sum(ek[:, None] * (stored if STORED else S), 0)
    S += kt[:, None] * new[None, :]
    tl.store(S1 + state, S, mask=state_ok)
    out = tl.sum(qt[:, None] * S, 0)
    at = head.to(tl.int64) * V + vc
    tl.store(o + at, out, mask=v_ok)
    if CONTENT > 0:
        total = tl.load(sum0 + at, mask=v_ok, other=0.0) + out
        mean = tl.load(mean0 + at, mask=v_ok, other=0.0)
        tl.debug_barrier()  # in place: no thread writes a sum or mean that another has yet to read
        tl.store(sum1 + at, tl.where(full, 0.0, total), mask=v_ok)
        tl.store(mean1 + at, tl.where(full, total / CONTENT, mean), mask=v_ok)
    # One program a sequence writes it.
    tl.store(count1 + n, tl.where(full, 0, seen), mask=(hv == 0) & (part == 0))
