"""The gradients of keys, queries, corrections and decays, all blocks at once, from those of products and of states.

Every exponent is a sum of log-decays from one place to another, so a place's share of its gradient is
`q q^ + (e k)(e k)^ - k k^`, and a token's own is the sum over the places after it.

Shapes: C slots in a block, K key dim, D channels at a time, H key heads, HV value heads, T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import eighth, far_factors, place, spread
from hybridzoo.kernels.fused.tile import exclusive, exponential, load, load1, log_decay, mm, store


@triton.jit
def far_back(d_qa, d_ea, d_kb, dP, dA, qa, ea, kb, ref, end, SPAN: tl.constexpr, CORRECTED: tl.constexpr,
             MODE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Add the gradients that reach the factors through the pairs whose least span is SPAN."""
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    mine = ((r // SPAN) == (c // SPAN)) & (r % SPAN >= SPAN // 2) & (c % SPAN < SPAN // 2)
    row, column = far_factors(ref, end, SPAN, MODE, C, D)
    kf = kb * column
    p = tl.where(mine, dP, 0.0)
    d_qa += mm(p, kf, MODE) * row
    dk = mm(tl.trans(p), qa * row, MODE)
    if CORRECTED:
        a = tl.where(mine, dA, 0.0)
        d_ea += mm(a, kf, MODE) * row
        dk += mm(tl.trans(a), ea * row, MODE)
    d_kb += dk * column
    return d_qa, d_ea, d_kb


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def key_gradients_kernel(
    q, k, g, z, e, table, dP, dA, d_qE, d_kZ, d_eE, d_total, dq, dk, dg, dz, de, T, scale, H, HV, K,
    C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, STORED: tl.constexpr,
    VARLEN: tl.constexpr, MODE: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One program a block and value head."""
    block, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    i = tl.arange(0, C)
    start, length = place(table, block, T, C, VARLEN)
    ok = i < length
    pos = start + i
    r, c = i[:, None], i[None, :]
    slot = block.to(tl.int64) * HV + hv
    in_block = r < C

    dPt = tl.load(dP + (slot * C + r) * C + c).to(tl.float32)
    dAt = tl.zeros((C, C), tl.float32)
    if CORRECT > 0:
        dAt = tl.load(dA + (slot * C + r) * C + c).to(tl.float32)
    # A token's read of itself has no decay in it: left out until the decay's gradient is taken, which it would reach as
    # the difference of two equal sums.
    d_self = tl.sum(tl.where(r == c, dPt, 0.0), 1)[:, None]
    dPt = tl.where(r > c, dPt, 0.0)
    if DECAY == 1 and not ERASE:
        log_D, logit = log_decay(g, z, pos, ok, hv, HV, K, i, ok, i, DECAY, ERASE, FLOOR, C, C)
        G = tl.cumsum(log_D, 0)
        Gx = G
        if STORED and CORRECT > 0:
            Gx = exclusive(G, log_D, MODE, C)
        last = tl.sum(log_D, 0)
        dPt = dPt * exponential(tl.minimum(G[:, None] - G[None, :], 0.0), MODE)
        dAt = dAt * exponential(tl.minimum(Gx[:, None] - G[None, :], 0.0), MODE)
        d_G = tl.zeros((C,), tl.float32)
        d_x = tl.zeros((C,), tl.float32)
        d_end = tl.sum(tl.zeros((C,), tl.float32), 0)
    d_g = tl.zeros((C,), tl.float32)
    d_e = tl.zeros((C,), tl.float32)
    et = tl.full((C, 1), 1.0, tl.float32)
    if CORRECT == 1:
        et = load1(e, pos, hv, HV, ok)[:, None]

    for d in range(0, BK, D):
        kc = d + tl.arange(0, D)
        k_ok = kc < K
        ck_at = (slot * C + r) * K + kc[None, :]
        ck_ok = k_ok[None, :] & in_block
        x_q = tl.load(d_qE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        x_k = tl.load(d_kZ + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        x_e = tl.zeros((C, D), tl.float32)
        if CORRECT > 0:
            x_e = tl.load(d_eE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        if DECAY > 0 or ERASE:
            d_last = tl.load(d_total + slot * K + kc, mask=k_ok, other=0.0)
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        ek = kt
        if CORRECT == 1:
            ek = kt * et
        elif CORRECT == 2:
            ec = load(e, pos, hv, HV, K, kc, ok, k_ok)
            ek = kt * ec
        if DECAY == 2 or ERASE:
            zero = tl.zeros((D,), tl.float32)
            log_D, logit = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, zero, DECAY, ERASE, FLOOR, C, D)
            G = tl.cumsum(log_D, 0)
            ref = eighth(G, 3, C, D)
            end = eighth(G, 7, C, D)
            x = G - spread(ref, C, D)
            a = exponential(x, MODE)
            b = exponential(-x, MODE)
            ax = a
            if STORED and CORRECT > 0:
                ax = exponential(exclusive(G, log_D, MODE, C) - spread(ref, C, D), MODE)
            qa, kb, ea = qt * a, kt * b, ek * ax
            last = tl.sum(log_D, 0)
            up = spread(exponential(ref, MODE), C, D)
            down = spread(exponential(tl.minimum(last[None, :] - ref, 0.0), MODE), C, D)
            d_last += tl.sum(kb * down * x_k, 0)
            near = (r // 8) == (c // 8)
            p = tl.where(near, dPt, 0.0)
            d_qa = x_q * up + mm(p, kb, MODE)
            d_kb = x_k * down + mm(tl.trans(p), qa, MODE)
            d_ea = x_e * up
            if CORRECT > 0:
                p = tl.where(near, dAt, 0.0)
                d_ea += mm(p, kb, MODE)
                d_kb += mm(tl.trans(p), ea, MODE)
            d_qa, d_ea, d_kb = far_back(d_qa, d_ea, d_kb, dPt, dAt, qa, ea, kb, ref, end, 16, CORRECT > 0, MODE, C, D)
            if C >= 32:
                d_qa, d_ea, d_kb = far_back(
                    d_qa, d_ea, d_kb, dPt, dAt, qa, ea, kb, ref, end, 32, CORRECT > 0, MODE, C, D
                )
            dqt, dkt, dek = d_qa * a, d_kb * b, d_ea * ax
        else:
            if DECAY == 1:
                up, ux, down = (
                    exponential(G, MODE)[:, None],
                    exponential(Gx, MODE)[:, None],
                    exponential(tl.minimum(last - G, 0.0), MODE)[:, None],
                )
                d_end += tl.sum(d_last, 0) + tl.sum(tl.sum(kt * down * x_k, 0), 0)
                x_q, x_k, x_e = x_q * up, x_k * down, x_e * ux
            dqt = x_q + mm(dPt, kt, MODE)
            dkt = x_k + mm(tl.trans(dPt), qt, MODE)
            dek = x_e
            if CORRECT > 0:
                dek += mm(dAt, kt, MODE)
                dkt += mm(tl.trans(dAt), ek, MODE)
        if DECAY > 0 or ERASE:
            share = qt * dqt - kt * dkt
            if CORRECT > 0 and not STORED:
                share += ek * dek
            if DECAY == 2 or ERASE:
                d_log = tl.cumsum(share, 0, reverse=True) + d_last[None, :]
                if CORRECT > 0 and STORED:
                    d_log += tl.cumsum(ek * dek, 0, reverse=True) - ek * dek
                d_log = tl.where(log_D > FLOOR, d_log, 0.0)
                if DECAY == 2:
                    store(dg, d_log, pos, hv, HV, K, kc, ok, k_ok)
                elif DECAY == 1:
                    d_g += tl.sum(d_log, 1)
                if ERASE:
                    store(dz, -d_log * tl.sigmoid(logit), pos, hv, HV, K, kc, ok, k_ok)
            else:
                d_G += tl.sum(share, 1)
                if CORRECT > 0 and STORED:
                    d_x += tl.sum(ek * dek, 1)
        dqt += d_self * kt
        dkt += d_self * qt
        if CORRECT == 1:
            d_e += tl.sum(kt * dek, 1)
            dkt += et * dek
        elif CORRECT == 2:
            store(de, kt * dek, pos, hv, HV, K, kc, ok, k_ok)
            dkt += ec * dek
        store(dq, dqt * scale, pos, hv, HV, K, kc, ok, k_ok)
        store(dk, dkt, pos, hv, HV, K, kc, ok, k_ok)

    if DECAY == 1:
        if not ERASE:
            d_g = tl.cumsum(d_G, 0, reverse=True) + d_end + tl.cumsum(d_x, 0, reverse=True) - d_x
            d_g = tl.where(log_D > FLOOR, d_g, 0.0)
        tl.store(dg + pos.to(tl.int64) * HV + hv, d_g, mask=ok)
    if CORRECT == 1:
        tl.store(de + pos.to(tl.int64) * HV + hv, d_e, mask=ok)
