"""The gradients of keys, queries, corrections and decays, a window at once, from those of products and of states.

Every exponent is a sum of log-decays from one place to another, and a token's gradient the sum of what crosses it. A
scalar decay's is taken so, from pairs of tokens. Of a channel's, a place's share is `q q^ + (e k)(e k)^ - k k^`, and a
token's own is the sum over the places after it. What two places share cancels in that sum only if both read the same
numbers: factors as products round them.

Shapes: C slots in a block, K key dim, V value dim, D channels at a time, H key heads, HV value heads, T tokens,
N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import channel_factors, far_factors, scalar_factors
from hybridzoo.kernels.fused.places import block
from hybridzoo.kernels.fused.tile import l2_factors, load, load1, log_decay, mm, operand, store


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


@triton.jit
def crossing(d_pairs, d_read, d_write, LATER: tl.constexpr, C: tl.constexpr):
    """What crosses each token `[C]`: of pairs `[C, C]`, of reads of the state before, of writes to the one after.

    A token that reads has its own decay in between; with LATER it does not.
    """
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    after = tl.cumsum(d_pairs, 0, reverse=True)
    reads = c >= r
    if LATER:
        after -= d_pairs
        reads = c > r
    return tl.sum(tl.where(c < r, after + d_write[None, :], 0.0) + tl.where(reads, d_read[None, :], 0.0), 1)


@triton.jit
def through_norm(d, x, factor, along, pos, h, H, hv, HV, K, kc, ok, k_ok):
    """Turn the gradient of `y = factor x` in `d`, with `along = sum y y^`, into that of x: `factor (y^ - y along)`."""
    y = load(x, pos, h, H, K, kc, ok, k_ok) * factor
    store(d, factor * (load(d, pos, hv, HV, K, kc, ok, k_ok) - y * along), pos, hv, HV, K, kc, ok, k_ok)


@triton.jit(do_not_specialize=["T", "first", "count", "origin", "span"])  # a new length compiles nothing
def key_gradients_kernel(
    q, k, g, z, e, owners, cu, count0, readouts, rows, dP, dA, d_qE, d_kZ, d_eE, d_total, dq, dk, dg, dz, de, du_blocks,
    T, first, count, origin, span, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One program a block and value head."""
    EXCLUSIVE: tl.constexpr = STORED and CORRECT > 0
    hv = tl.program_id(1)
    h = hv // (HV // H)
    n, at, _, pos, ok, _, slot, live = block(owners, cu, count0, first, count, origin, span, T, C, CONTENT, VARLEN)
    du_at = (tl.program_id(0) * HV + hv).to(tl.int64) * K
    if not live:
        if CONTENT > 0:
            every = tl.arange(0, BK)
            tl.store(du_blocks + du_at + every, tl.zeros((BK,), tl.float32), mask=every < K)
        return
    slot = slot * HV + hv
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    if CONTENT > 0:
        row = ((tl.load(rows + n) + at * C // CONTENT).to(tl.int64) * HV + hv) * (V + K) + V
    if NORM:
        rq, rk = l2_factors(q, k, pos, h, H, K, ok, C, BK, D)
        rq, rk = rq[:, None], rk[:, None]
        along_q = tl.zeros((C,), tl.float32)
        along_k = tl.zeros((C,), tl.float32)

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
        last, up, ux, down, pairs, corrected = scalar_factors(log_D, EXCLUSIVE, MODE, C)
        dPt = dPt * pairs
        dAt = dAt * corrected
        qk, ekk = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        none = tl.zeros((C,), tl.float32)
        d_read, d_write, d_predict = none, none, none
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
        ck_ok = k_ok[None, :]
        x_q = tl.load(d_qE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        x_k = tl.load(d_kZ + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        x_e = tl.zeros((C, D), tl.float32)
        if CORRECT > 0:
            x_e = tl.load(d_eE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
        if DECAY > 0 or ERASE:
            d_last = tl.load(d_total + slot * K + kc, mask=k_ok, other=0.0)
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        if NORM:
            qt = qt * rq
            kt = kt * rk
        ek = kt
        if CORRECT == 1:
            ek = kt * et
        elif CORRECT == 2:
            ec = load(e, pos, hv, HV, K, kc, ok, k_ok)
            ek = kt * ec
        if DECAY == 2 or ERASE:
            u = tl.zeros((D,), tl.float32)
            if CONTENT > 0:
                u = tl.load(readouts + row + kc, mask=k_ok, other=0.0)
            log_D, logit = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, C, D)
            ref, end, a, b, ax, last, up, down = channel_factors(log_D, EXCLUSIVE, MODE, C, D)
            qa, kb, ea = operand(qt * a, MODE), operand(kt * b, MODE), operand(ek * ax, MODE)
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
            share, predicted = qa * d_qa - kb * d_kb, ea * d_ea
            if CORRECT > 0 and not STORED:
                share += predicted
            d_log = tl.cumsum(share, 0, reverse=True) + d_last[None, :]
            if CORRECT > 0 and STORED:
                d_log += tl.cumsum(predicted, 0, reverse=True) - predicted
            d_log = tl.where(log_D > FLOOR, d_log, 0.0)
            if DECAY == 2:
                store(dg, d_log, pos, hv, HV, K, kc, ok, k_ok)
            elif DECAY == 1:
                d_g += tl.sum(d_log, 1)
            if ERASE:
                d_logit = -d_log * tl.sigmoid(logit)
                store(dz, d_logit, pos, hv, HV, K, kc, ok, k_ok)
                if CONTENT > 0:
                    du = tl.sum(tl.where(ok[:, None], d_logit, 0.0), 0)
                    tl.store(du_blocks + du_at + kc, du, mask=k_ok)
            dqt, dkt, dek = d_qa * a, d_kb * b, d_ea * ax
        else:
            if DECAY == 1:
                d_end += tl.sum(d_last, 0)
                x_q, x_k, x_e = x_q * up, x_k * down, x_e * ux
                d_read += tl.sum(qt * x_q, 1)
                d_write += tl.sum(kt * x_k, 1)
                qk += mm(qt, tl.trans(kt), MODE)
                if CORRECT > 0:
                    d_predict += tl.sum(ek * x_e, 1)
                    ekk += mm(ek, tl.trans(kt), MODE)
            dqt = x_q + mm(dPt, kt, MODE)
            dkt = x_k + mm(tl.trans(dPt), qt, MODE)
            dek = x_e
            if CORRECT > 0:
                dek += mm(dAt, kt, MODE)
                dkt += mm(tl.trans(dAt), ek, MODE)
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
        if NORM:
            along_q += tl.sum(qt * dqt, 1)
            along_k += tl.sum(kt * dkt, 1)

    if DECAY == 1:
        if not ERASE:
            d_g = d_end + crossing(dPt * qk, d_read, d_write, False, C)
            if CORRECT > 0:
                d_g += crossing(dAt * ekk, d_predict, none, STORED, C)
            d_g = tl.where(log_D > FLOOR, d_g, 0.0)
        tl.store(dg + pos.to(tl.int64) * HV + hv, d_g, mask=ok)
    if CORRECT == 1:
        tl.store(de + pos.to(tl.int64) * HV + hv, d_e, mask=ok)
    if NORM:
        tl.debug_barrier()  # another thread reads a place than has written it
        for d in range(0, BK, D):
            kc = d + tl.arange(0, D)
            through_norm(dq, q, rq, along_q[:, None], pos, h, H, hv, HV, K, kc, ok, kc < K)
            through_norm(dk, k, rk, along_k[:, None], pos, h, H, hv, HV, K, kc, ok, kc < K)
