"""The kernels of decoding: one token of every sequence, the state read once and written once.

Written as the recurrence stands, with no product of matrices: what takes time is moving the state. All arithmetic is in
float32.

Shapes: N sequences, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridzoo.kernels.fused.tile import mm, softplus, tanh


@triton.jit
def vector(ptr, head, dim, cols, ok):
    """`x[head, cols]` of a contiguous `[heads, dim]` as it is stored, 0 outside."""
    return tl.load(ptr + head.to(tl.int64) * dim + cols, mask=ok, other=0.0)


@triton.jit
def gate(ptr, head, dim, cols, ok, KIND: tl.constexpr):
    """A gate of one value a head (KIND 1) or one a channel (2) as it is stored; 0 without one (0)."""
    x = 0.0
    if KIND == 1:
        x = tl.load(ptr + head)
    elif KIND == 2:
        x = vector(ptr, head, dim, cols, ok)
    return x


@triton.jit
def sums(x, y):
    """`sum_K x` and `sum_K y^2` of `x [BK, BV]` and `y [BK]`, `[BV]` each: by one sum, which all warps wait for."""
    squares = tl.broadcast_to((y * y)[:, None], x.shape)
    return tl.split(tl.sum(tl.join(x, squares), 0))


@triton.jit
def readout_kernel(
    mean, count0, down, up, u, count1, N, HV, K, V, down_head, up_head,
    BN: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, CONTENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`u [N HV, K]`, what a content gate adds to the erase logits (CARVE eq. 7), and the counts with the new token: a
    program takes BN sequences of a head and D of its key channels.

    Ahead of the step, since it takes every channel of a head's mean, and all heads of a sequence read its count. count1
    may be count0. With EARLY the step may start as soon as all programs of this kernel have.
    """
    if EARLY:
        gdc_launch_dependents()
    n, hv = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    kc, rc = tl.program_id(2) * D + tl.arange(0, D), tl.arange(0, BR)
    n_ok, k_ok, r_ok = (n < N)[:, None], (kc < K)[None, :], rc < RANK
    head = (n.to(tl.int64) * HV + hv)[:, None]
    U2 = tl.load(up + hv * up_head + kc[None, :] * RANK + rc[:, None], mask=r_ok[:, None] & k_ok, other=0.0)
    inner = tl.zeros((BN, BR), tl.float32)
    for d in tl.static_range(0, BV, D):
        vc = d + tl.arange(0, D)
        U1_ok = (vc < V)[:, None] & r_ok[None, :]
        U1 = tl.load(down + hv * down_head + rc[None, :] * V + vc[:, None], mask=U1_ok, other=0.0)
        read = tl.load(mean + head * V + vc[None, :], mask=n_ok & (vc < V)[None, :], other=0.0)
        inner += mm(read, U1, "tf32x3")
    hidden, _ = tanh(inner)
    tl.store(u + head * K + kc[None, :], mm(hidden, U2, "tf32x3"), mask=n_ok & k_ok)
    if tl.program_id(1) + tl.program_id(2) == 0:  # one program a sequence
        seen = tl.load(count0 + n, mask=n < N, other=0) + 1
        tl.store(count1 + n, tl.where(seen == CONTENT, 0, seen), mask=n < N)


@triton.jit
def step_kernel(
    q, k, v, g, z, e, w, u, S0, sum0, mean0, count1,
    o, S1, sum1, mean1,
    scale, H, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, NORM: tl.constexpr, FLOOR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes BV value channels of one head of one sequence.

    S1 and sum1 may be S0 and sum0; then mean0 is None, and mean1 stays as it is until a chunk is full. `count1` is with
    the new token.
    """
    # The parts of a head next to each other: they read one row of the state after another.
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    n, hv = head // HV, head % HV
    key_head = n * H + hv // (HV // H)
    kc, vc = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = kc < K, vc < V
    base, cell = head.to(tl.int64) * K * V, kc[:, None] * V + vc[None, :]
    state_ok = k_ok[:, None] & v_ok[None, :]
    # All that is read is asked for before anything is made of it: what is summed or laid out anew waits at a barrier,
    # which no later load crosses. The state first, since it takes longest.
    S = tl.load(S0 + base + cell, mask=state_ok, other=0.0)
    qt, kt = vector(q, key_head, K, kc, k_ok), vector(k, key_head, K, kc, k_ok)
    gt, et = gate(g, head, K, kc, k_ok, DECAY), gate(e, head, K, kc, k_ok, CORRECT)
    vt, wt = vector(v, head, V, vc, v_ok), gate(w, head, V, vc, v_ok, WRITE)
    at = head.to(tl.int64) * V + vc
    if ERASE:
        zt = vector(z, head, K, kc, k_ok)
    if CONTENT > 0:
        total = tl.load(sum0 + at, mask=v_ok, other=0.0)
        if mean0 is not None:
            mean = tl.load(mean0 + at, mask=v_ok, other=0.0)
        if EARLY:  # what follows, the readout's kernel writes; and it reads the mean that this one writes
            gdc_wait()
        ut = vector(u, head, K, kc, k_ok)
        full = tl.load(count1 + n) == 0
    # The compiler begins no sum before it has asked for everything; and in place no thread writes what another reads.
    tl.debug_barrier()

    qt, kt, new = qt.to(tl.float32), kt.to(tl.float32), vt.to(tl.float32)
    log_D = tl.zeros((BK,), tl.float32)
    if DECAY > 0:
        log_D += gt.to(tl.float32)
    if ERASE:
        logit = zt.to(tl.float32)
        if CONTENT > 0:
            logit += ut
        log_D -= softplus(logit)
    stored = S
    if DECAY > 0 or ERASE:
        S = S * tl.exp(tl.maximum(log_D, FLOOR))[:, None]
    if WRITE > 0:
        new = new * wt.to(tl.float32)
    # Keys and queries of unit length are never made: what is read and written with k is scaled by 1 / |k|, what is read
    # with q by 1 / |q|, and both lengths come with the sums that wait anyway.
    if CORRECT > 0:
        read = (et.to(tl.float32) * kt)[:, None] * (stored if STORED else S)
        if NORM:
            found, size = sums(read, kt)
            length = tl.rsqrt(size + 1e-6)
            new = (new - found * length) * length
        else:
            new -= tl.sum(read, 0)
    elif NORM:
        new = new * tl.rsqrt(tl.sum(kt * kt, 0) + 1e-6)
    S += kt[:, None] * new[None, :]
    tl.store(S1 + base + cell, S, mask=state_ok)
    if NORM:
        out, size = sums(qt[:, None] * S, qt)
        out = out * scale * tl.rsqrt(size + 1e-6)
    else:
        out = tl.sum(qt[:, None] * S, 0) * scale
    tl.store(o + at, out, mask=v_ok)
    if CONTENT > 0:
        total += out
        tl.store(sum1 + at, tl.where(full, 0.0, total), mask=v_ok)
        if mean0 is not None:
            tl.store(mean1 + at, tl.where(full, total / CONTENT, mean), mask=v_ok)
        elif full:
            tl.store(mean1 + at, total / CONTENT, mask=v_ok)
