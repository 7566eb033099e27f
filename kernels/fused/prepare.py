"""What a block of tokens does to the state, without knowing the state: all blocks at once.

With `X = (I + A)^-1`: `W = X (e k exp(G'))`, `U = X (w v)`, and `P`, `q exp(G)`, `k exp(G_last - G)`, `exp(G_last)`. A
second run, for the backward pass (AGAIN), takes the X that the first one left, and leaves U out.

Shapes: C slots in a block, K key dim, V value dim, D channels at a time, H key heads, HV value heads, T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import eighth, far_factors, place, spread
from hybridzoo.kernels.fused.tile import exclusive, exponential, inverse, load, load1, log_decay, mm


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


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def prepare_kernel(
    q, k, v, g, z, e, w, table, W, U, qE, kZ, P, X, total, T, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, D: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    VARLEN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, MERGE: tl.constexpr, FLOOR: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """One program a block and value head."""
    SOLVE: tl.constexpr = CORRECT > 0 and not AGAIN
    block, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    i = tl.arange(0, C)
    start, length = place(table, block, T, C, VARLEN)
    ok = i < length
    pos = start + i
    r, c = i[:, None], i[None, :]
    slot = block.to(tl.int64) * HV + hv
    cc_at = (slot * C + r) * C + c
    A = tl.zeros((C, C), tl.float32)
    Pt = tl.zeros((C, C), tl.float32)
    et = tl.full((C,), 1.0, tl.float32)
    if CORRECT == 1:
        et = load1(e, pos, hv, HV, ok)
    if DECAY == 1 and not ERASE:
        log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, i, ok, i, DECAY, ERASE, FLOOR, C, C)
        G = tl.cumsum(log_D, 0)
        Gx = G
        if STORED and CORRECT > 0:
            Gx = exclusive(G, log_D, MODE, C)
        last = tl.sum(log_D, 0)
        up = exponential(G, MODE)[:, None]
        ux = exponential(Gx, MODE)[:, None]
        down = exponential(tl.minimum(last - G, 0.0), MODE)[:, None]

    for d in range(0, BK, D):
        kc = d + tl.arange(0, D)
        k_ok = kc < K
        ck_at = (slot * C + r) * K + kc[None, :]
        ck_ok = k_ok[None, :] & (r < C)
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        ek = kt
        if CORRECT == 1:
            ek = kt * et[:, None]
        elif CORRECT == 2:
            ek = kt * load(e, pos, hv, HV, K, kc, ok, k_ok)
        if DECAY == 2 or ERASE:
            zero = tl.zeros((D,), tl.float32)
            log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, zero, DECAY, ERASE, FLOOR, C, D)
            G = tl.cumsum(log_D, 0)
            ref = eighth(G, 3, C, D)
            end = eighth(G, 7, C, D)
            x = G - spread(ref, C, D)
            qa = qt * exponential(x, MODE)
            kb = kt * exponential(-x, MODE)
            ea = ek
            if CORRECT > 0:
                if STORED:
                    ea = ek * exponential(exclusive(G, log_D, MODE, C) - spread(ref, C, D), MODE)
                else:
                    ea = ek * exponential(x, MODE)
            last = tl.sum(log_D, 0)
            up = spread(exponential(ref, MODE), C, D)
            tl.store(qE + ck_at, qa * up, mask=ck_ok)
            tl.store(kZ + ck_at, kb * spread(exponential(tl.minimum(last[None, :] - ref, 0.0), MODE), C, D), mask=ck_ok)
            tl.store(total + slot * K + kc, exponential(last, MODE), mask=k_ok)
            if CORRECT > 0:
                tl.store(W + ck_at, ea * up, mask=ck_ok)
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
                qt = qt * up
                ek = ek * ux
                kt = kt * down
                tl.store(total + slot * K + kc, exponential(last, MODE) + tl.zeros((D,), tl.float32), mask=k_ok)
            tl.store(qE + ck_at, qt, mask=ck_ok)
            tl.store(kZ + ck_at, kt, mask=ck_ok)
            if CORRECT > 0:
                tl.store(W + ck_at, ek, mask=ck_ok)

    if DECAY == 1 and not ERASE:
        Pt = Pt * exponential(tl.minimum(G[:, None] - G[None, :], 0.0), MODE)
        if SOLVE:
            A = A * exponential(tl.minimum(Gx[:, None] - G[None, :], 0.0), MODE)
    tl.store(P + cc_at, tl.where(r >= c, Pt, 0.0))
    if CORRECT > 0:
        if SOLVE:
            Xt = inverse(tl.where(r > c, A, 0.0), EXACT, MERGE, C)
            tl.store(X + cc_at, Xt)
        else:
            Xt = tl.load(X + cc_at).to(tl.float32)
        tl.debug_barrier()  # W holds e k exp(G') so far, and another thread reads a place than has written it
        for d in range(0, BK, D):
            kc = d + tl.arange(0, D)
            ck_at = (slot * C + r) * K + kc[None, :]
            ck_ok = (kc < K)[None, :] & (r < C)
            ek = tl.load(W + ck_at, mask=ck_ok, other=0.0)
            tl.debug_barrier()
            tl.store(W + ck_at, mm(Xt, ek, MODE), mask=ck_ok)
    if not AGAIN:
        for d in range(0, BV, D):
            vc = d + tl.arange(0, D)
            v_ok = vc < V
            vt = load(v, pos, hv, HV, V, vc, ok, v_ok)
            if WRITE == 1:
                vt = vt * load1(w, pos, hv, HV, ok)[:, None]
            elif WRITE == 2:
                vt = vt * load(w, pos, hv, HV, V, vc, ok, v_ok)
            if CORRECT > 0:
                vt = mm(Xt, vt, MODE)
            tl.store(U + (slot * C + r) * V + vc[None, :], vt, mask=v_ok[None, :] & (r < C))
