"""All gradients but the state's, a window at once, from the states at blocks' starts and their gradients.

    R^ = (w v)^                     P^ = O^ N^T (j <= i)        A^ = -R^ N^T (j < i)
    (q E)^ = O^ S^T                 (k Z)^ = N dS^T             (e k E')^ = -R^ S^T

In two steps: these, from states; then those of queries, keys and gates, through pairs of tokens. Without decays of
channels one launch does both; with them it would hold too much, and two launches do one each, through scratch memory.

A program takes some of the key channels: P^ and A^, which are small, are made by each program of a block that takes the
first step, and what is a sum over all channels is left in parts. Only unit lengths need such a sum before they can go
on, and theirs is there without the keys: outputs are linear in the query, `q q^ = o o^`, and what a key writes and
predicts is linear in it, `k k^ = N R^ + (N - w v) R^`.

Every exponent is a sum of log-decays from one place to another, and a token's gradient the sum of what crosses it. A
scalar decay's is taken so, from pairs of tokens. Of a channel's, a place's share is `q q^ + (e k)(e k)^ - k k^`, and a
token's own is the sum over the places after it. What two places share cancels in that sum only if both read the same
numbers: factors as products round them.

Shapes: C slots in a block, K key dim, V value dim, D key channels and DV value channels at a time, H key heads,
HV value heads, T tokens, N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import channel_factors, far_factors, scalar_factors
from hybridzoo.kernels.fused.places import block
from hybridzoo.kernels.fused.tile import exponential, l2_factors, load, load1, log_decay, mm, operand, store


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
def through_states(
    v, w, states, dstates, news, dnews, o, do, d_sum, dv, dw, n, pos, ok, kept, slot, hv, leads, kc, k_ok, HV, K,
    V,
    C: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, DV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Go once through the value channels. The program that `leads` stores the gradients of `v` and `w`.

    Returns: P^ and A^ `[C, C]`, not masked; (q E)^, (k Z)^ and (e k E')^ `[C, D]`; the sum of `S dS` over value
    channels `[D]`; `q q^` and `k k^` `[C]`, with NORM.
    """
    i = tl.arange(0, C)
    r = i[:, None]
    none = tl.zeros((C,), tl.float32)
    d_P, d_A = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    x_q, x_k, x_e = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    d_last = tl.zeros((D,), tl.float32)
    along_q, along_k, d_w = none, none, none
    for d in range(0, BV, DV):
        vc = d + tl.arange(0, DV)
        v_ok = vc < V
        cv_ok = v_ok[None, :]
        vk_at = vc[:, None] * K + kc[None, :]
        vk_ok = v_ok[:, None] & k_ok[None, :]
        dR = tl.load(dnews + (slot * C + r) * V + vc[None, :], mask=cv_ok, other=0.0).to(tl.float32)
        N = tl.load(news + (kept * C + r) * V + vc[None, :], mask=cv_ok, other=0.0)
        S = tl.load(states + kept * K * V + vk_at, mask=vk_ok, other=0.0)
        dS = tl.load(dstates + slot * K * V + vk_at, mask=vk_ok, other=0.0)
        dO = load(do, pos, hv, HV, V, vc, ok, v_ok)
        if CONTENT > 0:  # with their share in a content chunk's mean
            shared = tl.load(d_sum + (n * HV + hv).to(tl.int64) * V + vc, mask=v_ok, other=0.0)
            dO = tl.where(ok[:, None], dO + shared[None, :], 0.0)
        d_P += mm(dO, tl.trans(N), MODE)
        x_q += mm(dO, S, MODE)
        x_k += mm(N, dS, MODE)
        if CORRECT > 0:
            d_A -= mm(dR, tl.trans(N), MODE)
            x_e -= mm(dR, S, MODE)
        if DECAYS:
            d_last += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        if NORM:
            along_q += tl.sum(load(o, pos, hv, HV, V, vc, ok, v_ok) * dO, 1)
            along_k += tl.sum(N.to(tl.float32) * dR, 1)
            if CORRECT > 0:
                wv = load(v, pos, hv, HV, V, vc, ok, v_ok)
                if WRITE == 1:
                    wv = wv * load1(w, pos, hv, HV, ok)[:, None]
                elif WRITE == 2:
                    wv = wv * load(w, pos, hv, HV, V, vc, ok, v_ok)
                along_k += tl.sum((N.to(tl.float32) - wv) * dR, 1)
        if leads:
            if WRITE > 0:
                vt = load(v, pos, hv, HV, V, vc, ok, v_ok)
            if WRITE == 1:
                d_w += tl.sum(vt * dR, 1)
                dR = dR * load1(w, pos, hv, HV, ok)[:, None]
            elif WRITE == 2:
                store(dw, vt * dR, pos, hv, HV, V, vc, ok, v_ok)
                dR = dR * load(w, pos, hv, HV, V, vc, ok, v_ok)
            store(dv, dR, pos, hv, HV, V, vc, ok, v_ok)
    if WRITE == 1:
        if leads:
            tl.store(dw + pos.to(tl.int64) * HV + hv, d_w, mask=ok)
    return d_P, d_A, x_q, x_k, x_e, d_last, along_q, along_k


@triton.jit
def below(d_P, d_A, C: tl.constexpr):
    """The diagonal of P^ `[C]`, and P^ and A^ below it."""
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    return tl.sum(tl.where(r == c, d_P, 0.0), 1), tl.where(r > c, d_P, 0.0), tl.where(r > c, d_A, 0.0)


@triton.jit
def through_pairs(
    q, k, g, z, e, readout_at, dq, dk, dg, dz, de, du_at, d_P, d_A, d_self, x_q, x_k, x_e, d_last, along_q, along_k, rq,
    rk, pos, ok, h, hv, part, kc, k_ok, scale, H, HV, K,
    C: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    CORRECT: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """Store the gradients of queries, keys, decays, erase logits and corrections in D of the key channels.

    Takes P^ and A^ below the diagonal, and the diagonal of P^ as `d_self [C]`: a token's read of itself has no decay in
    it, and would reach the decay's gradient as the difference of two equal sums.
    """
    EXCLUSIVE: tl.constexpr = STORED and CORRECT > 0
    PARTS: tl.constexpr = BK // D
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    token_at = (pos.to(tl.int64) * HV + hv) * PARTS + part
    unit_q = load(q, pos, h, H, K, kc, ok, k_ok)
    kt = load(k, pos, h, H, K, kc, ok, k_ok)
    if NORM:
        unit_q = unit_q * rq[:, None]
        kt = kt * rk[:, None]
    qt = unit_q * scale
    ek = kt
    if CORRECT == 1:
        ec = load1(e, pos, hv, HV, ok)[:, None]
        ek = kt * ec
    elif CORRECT == 2:
        ec = load(e, pos, hv, HV, K, kc, ok, k_ok)
        ek = kt * ec
    if DECAY == 2 or ERASE:
        u = tl.zeros((D,), tl.float32)
        if CONTENT > 0:
            u = tl.load(readout_at + kc, mask=k_ok, other=0.0)
        log_D, logit = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, C, D)
        ref, end, a, b, ax, last, up, down = channel_factors(log_D, EXCLUSIVE, MODE, C, D)
        qa, kb, ea = operand(qt * a, MODE), operand(kt * b, MODE), operand(ek * ax, MODE)
        d_last = d_last * exponential(last, MODE) + tl.sum(kb * down * x_k, 0)
        near = (r // 8) == (c // 8)
        p = tl.where(near, d_P, 0.0)
        d_qa = x_q * up + mm(p, kb, MODE)
        d_kb = x_k * down + mm(tl.trans(p), qa, MODE)
        d_ea = x_e * up
        if CORRECT > 0:
            p = tl.where(near, d_A, 0.0)
            d_ea += mm(p, kb, MODE)
            d_kb += mm(tl.trans(p), ea, MODE)
        d_qa, d_ea, d_kb = far_back(d_qa, d_ea, d_kb, d_P, d_A, qa, ea, kb, ref, end, 16, CORRECT > 0, MODE, C, D)
        if C >= 32:
            d_qa, d_ea, d_kb = far_back(d_qa, d_ea, d_kb, d_P, d_A, qa, ea, kb, ref, end, 32, CORRECT > 0, MODE, C, D)
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
            tl.store(dg + token_at, tl.sum(d_log, 1), mask=ok)
        if ERASE:
            d_logit = -d_log * tl.sigmoid(logit)
            store(dz, d_logit, pos, hv, HV, K, kc, ok, k_ok)
            if CONTENT > 0:
                tl.store(du_at + kc, tl.sum(tl.where(ok[:, None], d_logit, 0.0), 0), mask=k_ok)
        dqt, dkt, dek = d_qa * a, d_kb * b, d_ea * ax
    else:
        if DECAY == 1:
            log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, i, ok, i, DECAY, ERASE, FLOOR, C, C)
            last, up, ux, down, pairs, corrected = scalar_factors(log_D, EXCLUSIVE, MODE, C)
            x_q, x_k, x_e = x_q * up, x_k * down, x_e * ux
            d_P = d_P * pairs
            d_A = d_A * corrected
            d_g = tl.sum(d_last, 0) * exponential(last, MODE)
            d_g += crossing(d_P * mm(qt, tl.trans(kt), MODE), tl.sum(qt * x_q, 1), tl.sum(kt * x_k, 1), False, C)
            if CORRECT > 0:
                none = tl.zeros((C,), tl.float32)
                d_g += crossing(d_A * mm(ek, tl.trans(kt), MODE), tl.sum(ek * x_e, 1), none, STORED, C)
            tl.store(dg + token_at, tl.where(log_D > FLOOR, d_g, 0.0), mask=ok)
        dqt = x_q + mm(d_P, kt, MODE)
        dkt = x_k + mm(tl.trans(d_P), qt, MODE)
        dek = x_e
        if CORRECT > 0:
            dek += mm(d_A, kt, MODE)
            dkt += mm(tl.trans(d_A), ek, MODE)
    dqt += d_self[:, None] * kt
    dkt += d_self[:, None] * qt
    if CORRECT == 1:
        tl.store(de + token_at, tl.sum(kt * dek, 1), mask=ok)
        dkt += ec * dek
    elif CORRECT == 2:
        store(de, kt * dek, pos, hv, HV, K, kc, ok, k_ok)
        dkt += ec * dek
    dqt = dqt * scale
    if NORM:
        dqt = rq[:, None] * (dqt - unit_q * along_q[:, None])
        dkt = rk[:, None] * (dkt - kt * along_k[:, None])
    store(dq, dqt, pos, hv, HV, K, kc, ok, k_ok)
    store(dk, dkt, pos, hv, HV, K, kc, ok, k_ok)


@triton.jit
def gradients_of_block(
    q, k, v, g, z, e, w, readout_at, states, dstates, news, dnews, o, do, d_sum, d_qE, d_kZ, d_eE, d_total, dP, dA,
    along, dq, dk, dv, dg, dz, de, dw, du_at, n, pos, ok, kept, slot, begin, h, hv, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MINE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    STATES: tl.constexpr, PAIRS: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """The step of STATES, that of PAIRS, or both, of one block of a value head and MINE key channels from `begin` on.

    `readout_at`: what the block's content chunk read; `du_at`: where the gradient of that goes.
    """
    DECAYS: tl.constexpr = DECAY > 0 or ERASE
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]
    cc_at = (slot * C + r) * C + c
    along_at = along
    along_q, along_k = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    rq, rk = along_q, along_k
    if NORM and PAIRS:
        rq, rk = l2_factors(q, k, pos, h, H, K, ok, C, BK, D)
    if NORM and not (STATES and PAIRS):
        along_at += slot * 2 * C + i
    if not STATES:
        d_P, d_A = tl.load(dP + cc_at).to(tl.float32), tl.zeros((C, C), tl.float32)
        if CORRECT > 0:
            d_A = tl.load(dA + cc_at).to(tl.float32)
        if NORM:
            along_q, along_k = tl.load(along_at), tl.load(along_at + C)
        d_self, d_P, d_A = below(d_P, d_A, C)

    for j in range(0, MINE, D):
        d = begin + j
        kc = d + tl.arange(0, D)
        k_ok = kc < K
        # Where the first step leaves what states give: in the places of what was prepared.
        ck_at = (slot * C + r) * K + kc[None, :]
        ck_ok = k_ok[None, :]
        if STATES:
            d_P, d_A, x_q, x_k, x_e, d_last, along_q, along_k = through_states(
                v, w, states, dstates, news, dnews, o, do, d_sum, dv, dw, n, pos, ok, kept, slot, hv, d == 0, kc,
                k_ok, HV, K, V, C, D, BV, DV, DECAYS, CORRECT, WRITE, CONTENT, NORM, MODE,
            )  # fmt: skip
        else:
            x_q = tl.load(d_qE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
            x_k = tl.load(d_kZ + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
            x_e, d_last = tl.zeros((C, D), tl.float32), tl.zeros((D,), tl.float32)
            if CORRECT > 0:
                x_e = tl.load(d_eE + ck_at, mask=ck_ok, other=0.0).to(tl.float32)
            if DECAYS:
                d_last = tl.load(d_total + slot * K + kc, mask=k_ok, other=0.0)
        if PAIRS:
            if STATES:
                d_self, d_P, d_A = below(d_P, d_A, C)
            through_pairs(
                q, k, g, z, e, readout_at, dq, dk, dg, dz, de, du_at, d_P, d_A, d_self, x_q, x_k, x_e, d_last, along_q,
                along_k, rq, rk, pos, ok, h, hv, d // D, kc, k_ok, scale, H, HV, K, C, D, BK, DECAY, ERASE,
                CORRECT, STORED, CONTENT, NORM, MODE, FLOOR,
            )  # fmt: skip
        else:
            tl.store(d_qE + ck_at, x_q, mask=ck_ok)
            tl.store(d_kZ + ck_at, x_k, mask=ck_ok)
            if CORRECT > 0:
                tl.store(d_eE + ck_at, x_e, mask=ck_ok)
            if DECAYS:
                tl.store(d_total + slot * K + kc, d_last, mask=k_ok)
            if d == 0:
                tl.store(dP + cc_at, d_P)
                if CORRECT > 0:
                    tl.store(dA + cc_at, d_A)
                if NORM:
                    tl.store(along_at, along_q)
                    tl.store(along_at + C, along_k)


@triton.jit(do_not_specialize=["T", "first", "count"])  # a new length compiles nothing
def gradients_kernel(
    q, k, v, g, z, e, w, owners, cu, states, dstates, news, dnews, o, do, d_qE, d_kZ, d_eE, d_total, dP, dA, along,
    dq, dk, dv, dg, dz, de, dw, T, first, count, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MINE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    STATES: tl.constexpr, PAIRS: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, STORED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """One program a block, value head and MINE of the key channels, without a content gate."""
    program, hv = tl.program_id(0) // (BK // MINE), tl.program_id(1)
    n, at, _, pos, ok, kept, slot, live = block(program, owners, cu, None, first, count, T, C, 0, VARLEN, VARLEN)
    if not live:
        return
    gradients_of_block(
        q, k, v, g, z, e, w, None, states, dstates, news, dnews, o, do, None, d_qE, d_kZ, d_eE, d_total, dP, dA, along,
        dq, dk, dv, dg, dz, de, dw, None, n, pos, ok, kept * HV + hv, slot * HV + hv,
        tl.program_id(0) % (BK // MINE) * MINE, hv // (HV // H), hv, scale, H, HV, K, V, C, BK, BV, MINE, D, DV, STATES,
        PAIRS, DECAY, ERASE, CORRECT, WRITE, STORED, 0, NORM, MODE, FLOOR,
    )  # fmt: skip
