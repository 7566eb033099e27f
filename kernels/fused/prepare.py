"""What a block of tokens does to the state, without knowing the state: all blocks of a window at once, or, forward with
a content gate, those of one chunk (content.py).

`W = e k exp(G')`, `P`, `q exp(G)`, `k exp(G_last - G)`, `exp(G_last)` and `X = (I + A)^-1`. A second run, for the
backward pass (AGAIN), takes the readout that the first one left, and leaves X out.

Shapes: C slots in a block, K key dim, V value dim, D channels at a time, H key heads, HV value heads, T tokens,
N sequences, L content chunk, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import channel_factors, far_factors, scalar_factors
from hybridzoo.kernels.fused.places import block, chunk_row, sequence
from hybridzoo.kernels.fused.tile import exponential, inverse, l2_factors, load, load1, log_decay, mm, tanh


@triton.jit
def far(P, A, qa, ea, kb, ref, end, SPAN: tl.constexpr, CORRECTED: tl.constexpr, MODE: tl.constexpr, C: tl.constexpr,
        D: tl.constexpr):  # fmt: skip
    """Add the pairs whose least span is SPAN to `P` and `A [C, C]`."""
    i = tl.arange(0, C)
    same = (i[:, None] // SPAN) == (i[None, :] // SPAN)
    row, column = far_factors(ref, end, SPAN, MODE, C, D)
    column = tl.trans(kb * column)
    P += tl.where(same, mm(qa * row, column, MODE), 0.0)
    if CORRECTED:
        A += tl.where(same, mm(ea * row, column, MODE), 0.0)
    return P, A


@triton.jit
def prepare_block(
    q, k, g, z, e, down, up, chunk_at, W, qE, kZ, P, X, total, pos, ok, leads, slot, x_slot, h, hv, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr,
    NORM: tl.constexpr, AGAIN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, MERGE: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """Prepare one block of a value head.

    `chunk_at`: its content chunk's mean `[V]`, then what is read of it: the readout `[K]`, `tanh` and its slope `[r]`.
    """
    SOLVE: tl.constexpr = CORRECT > 0 and not AGAIN
    EXCLUSIVE: tl.constexpr = STORED and CORRECT > 0
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    A = tl.zeros((C, C), tl.float32)
    Pt = tl.zeros((C, C), tl.float32)
    et = tl.full((C,), 1.0, tl.float32)
    if CORRECT == 1:
        et = load1(e, pos, hv, HV, ok)
    if NORM:
        rq, rk = l2_factors(q, k, pos, h, H, K, ok, C, BK, D)
    if DECAY == 1 and not ERASE:
        log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, i, ok, i, DECAY, ERASE, FLOOR, C, C)
        last, up_s, ux_s, down_s, pairs, corrected = scalar_factors(log_D, EXCLUSIVE, MODE, C)
    if CONTENT > 0:
        if not AGAIN:
            rc, every = tl.arange(0, BR), tl.arange(0, BV)
            rv_ok = (rc < RANK)[:, None] & (every < V)[None, :]
            mean = tl.load(chunk_at + every, mask=every < V, other=0.0)
            U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + every[None, :], mask=rv_ok, other=0.0)
            hidden, slope = tanh(tl.sum(U1 * mean[None, :], 1))
            if leads:  # no part of a mask, which the interpreter of Triton 3.9 makes a number of
                tl.store(chunk_at + V + K + rc, hidden, mask=rc < RANK)  # for the backward pass, like u below
                tl.store(chunk_at + V + K + RANK + rc, slope, mask=rc < RANK)

    for d in range(0, BK, D):
        kc = d + tl.arange(0, D)
        k_ok = kc < K
        ck_at = (slot * C + r) * K + kc[None, :]
        ck_ok = k_ok[None, :]
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        if NORM:
            qt = qt * rq[:, None]
            kt = kt * rk[:, None]
        ek = kt
        if CORRECT == 1:
            ek = kt * et[:, None]
        elif CORRECT == 2:
            ek = kt * load(e, pos, hv, HV, K, kc, ok, k_ok)
        if DECAY == 2 or ERASE:
            u = tl.zeros((D,), tl.float32)
            if CONTENT > 0:
                if AGAIN:
                    u = tl.load(chunk_at + V + kc, mask=k_ok, other=0.0)
                else:
                    kr_ok = k_ok[:, None] & (rc < RANK)[None, :]
                    U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=kr_ok, other=0.0)
                    u = tl.sum(U2 * hidden[None, :], 1)
                    if leads:
                        tl.store(chunk_at + V + kc, u, mask=k_ok)
            log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, C, D)
            ref, end, a, b, ax, last, up_c, down_c = channel_factors(log_D, EXCLUSIVE, MODE, C, D)
            qa, kb, ea = qt * a, kt * b, ek * ax
            tl.store(qE + ck_at, qa * up_c, mask=ck_ok)
            tl.store(kZ + ck_at, kb * down_c, mask=ck_ok)
            tl.store(total + slot * K + kc, exponential(last, MODE), mask=k_ok)
            if CORRECT > 0:
                tl.store(W + ck_at, ea * up_c, mask=ck_ok)
            same = (r // 8) == (c // 8)
            column = tl.trans(kb)
            Pt += tl.where(same, mm(qa, column, MODE), 0.0)
            if SOLVE:
                A += tl.where(same, mm(ea, column, MODE), 0.0)
            Pt, A = far(Pt, A, qa, ea, kb, ref, end, 16, SOLVE, MODE, C, D)
            if C >= 32:
                Pt, A = far(Pt, A, qa, ea, kb, ref, end, 32, SOLVE, MODE, C, D)
        else:
            Pt += mm(qt, tl.trans(kt), MODE)
            if SOLVE:
                A += mm(ek, tl.trans(kt), MODE)
            if DECAY == 1:
                qt, ek, kt = qt * up_s, ek * ux_s, kt * down_s
                tl.store(total + slot * K + kc, exponential(last, MODE) + tl.zeros((D,), tl.float32), mask=k_ok)
            if DECAY == 1 or NORM:  # else the scans read queries and keys as they are
                tl.store(qE + ck_at, qt, mask=ck_ok)
                tl.store(kZ + ck_at, kt, mask=ck_ok)
            if CORRECT > 0:
                tl.store(W + ck_at, ek, mask=ck_ok)

    if DECAY == 1 and not ERASE:
        Pt = Pt * pairs
        if SOLVE:
            A = A * corrected
    tl.store(P + (slot * C + r) * C + c, tl.where(r >= c, Pt, 0.0))
    if SOLVE:
        Xt = inverse(tl.where(r > c, A, 0.0), EXACT, MERGE, C)
        tl.store(X + (x_slot * C + r) * C + c, Xt)


@triton.jit(do_not_specialize=["T", "first", "count"])  # a new length compiles nothing
def prepare_kernel(
    q, k, g, z, e, owners, cu, count0, readouts, W, qE, kZ, P, X, total,
    T, first, count, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, CORRECT: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, KEEP: tl.constexpr, AGAIN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    MERGE: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One program a block and value head; with a content gate, whose readouts are known."""
    hv = tl.program_id(1)
    n, at, leads, pos, ok, kept, slot, live = block(
        tl.program_id(0), owners, cu, count0, first, count, T, C, CONTENT, VARLEN, VARLEN
    )
    if not live:
        return
    chunk_at = readouts
    if CONTENT > 0:
        start, _, _, _ = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
        row = chunk_row(n, start, at * C // CONTENT, CONTENT).to(tl.int64)
        chunk_at += (row * HV + hv) * (V + K + 2 * RANK)
    kept = kept * HV + hv
    slot = slot * HV + hv
    prepare_block(
        q, k, g, z, e, None, None, chunk_at, W, qE, kZ, P, X, total, pos, ok, leads, slot, kept if KEEP else slot,
        hv // (HV // H), hv, scale, H, HV, K, V, C, BK, 1, D, 1, RANK, DECAY, ERASE, CORRECT, STORED, CONTENT, NORM,
        AGAIN, MODE, EXACT, MERGE, FLOOR,
    )  # fmt: skip
