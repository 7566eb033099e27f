"""The backward kernel: the tiles in reverse, from the states that the forward pass kept at each tile's start.

With `dS` the gradient of the state after a tile, and hats for gradients::

    N^ = P^T O^ + (k Z) S^         R^ = X^T N^ = (w v)^
    P^ = O^ N^T (j <= i)           A^ = -R^ N^T (j < i)
    (q E)^ = O^ S^T     (k Z)^ = N S^^T     (e k E')^ = -R^ S^T
    S^ <- total S^ + (q E)^T O^ - (e k E')^T R^

Every exponent of a tile is a sum of log-decays from one of its places to another, so a place's share of the gradient is
`q q^ + (e k)(e k)^ - k k^`, and a token's own is the sum over the places after it.

Shapes: as in forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.tile import exclusive, load, load1, log_decay, masks, middles, mm, readout, row, store


@triton.jit
def scaled(x, G):
    """`x exp(G)` for `G [C, K]` or `[C]`."""
    if len(G.shape) == 1:
        return x * tl.exp(G)[:, None]
    else:
        return x * tl.exp(G)


@triton.jit
def half_factors(x, G, middle, half, SIDE: tl.constexpr):
    """A row's (SIDE 1) or column's (SIDE -1) factors for pairs within halves and across the middle."""
    i = tl.arange(0, 16)
    near = tl.exp(SIDE * (G - half))
    far = tl.exp(tl.minimum(SIDE * (G - middle), 0.0))
    across = (i[:, None] >= 8) if SIDE == 1 else (i[:, None] < 8)
    return near, tl.where(across, far, 0.0)


@triton.jit
def pair_products(x, Gx, k, G, MODE: tl.constexpr):
    """`sum_d x_i exp(Gx_i - G_j) k_j`, of use for `j <= i` only: `[C, C]`."""
    if len(G.shape) == 1:
        return mm(x, tl.trans(k), MODE) * tl.exp(tl.minimum(Gx[:, None] - G[None, :], 0.0))
    else:
        i = tl.arange(0, 16)
        middle, half = middles(G)
        xn, xf = half_factors(x, Gx, middle, half, 1)
        kn, kf = half_factors(k, G, middle, half, -1)
        same = (i[:, None] // 8) == (i[None, :] // 8)
        return tl.where(same, mm(x * xn, tl.trans(k * kn), MODE), mm(x * xf, tl.trans(k * kf), MODE))


@triton.jit
def pair_gradients(dM, x, Gx, k, G, MODE: tl.constexpr):
    """Gradients of `pair_products` for x and k, given that of the products, zero where they are of no use."""
    if len(G.shape) == 1:
        dM = dM * tl.exp(tl.minimum(Gx[:, None] - G[None, :], 0.0))
        return mm(dM, k, MODE), mm(tl.trans(dM), x, MODE)
    else:
        i = tl.arange(0, 16)
        middle, half = middles(G)
        xn, xf = half_factors(x, Gx, middle, half, 1)
        kn, kf = half_factors(k, G, middle, half, -1)
        same = (i[:, None] // 8) == (i[None, :] // 8)
        near, far = tl.where(same, dM, 0.0), tl.where(same, 0.0, dM)
        dx = mm(near, k * kn, MODE) * xn + mm(far, k * kf, MODE) * xf
        dk = mm(tl.trans(near), x * xn, MODE) * kn + mm(tl.trans(far), x * xf, MODE) * kf
        return dx, dk


@triton.jit
def readout_gradient(du, m, U1, U2):
    """Gradient of the mean, given that of `u = U2 tanh(U1 m)`."""
    x = tl.sum(U1 * m[None, :], 1)
    hidden = 2 / (1 + tl.exp(-2 * x)) - 1
    d_hidden = tl.sum(U2 * du[:, None], 0) * (1 - hidden * hidden)
    return tl.sum(U1 * d_hidden[:, None], 0)


@triton.jit(do_not_specialize=["T", "tokens"])  # a new length compiles nothing
def backward_kernel(
    q, k, v, g, z, e, w, down, up, count0, cu,
    states, news, inverses, means, chunk_at,
    do, dS1, dsum1, dmean1,
    dq, dk, dv, dg, dz, de, dw, dS0, dsum0, dmean0, du_out,
    T, tokens, scale, H, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """A program takes what its forward one did, from the last tile to the first."""
    # Heads on the first axis, which may have 2^31 programs; the second has at most 65,535. int64, since a head of the
    # last state can begin past 2^31 elements.
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, hv = head // HV, head % HV
    h = hv // (HV // H)
    start = n * T
    length = T
    tile_base = n * (tl.cdiv(T, 16) + (1 if CONTENT > 0 else 0))  # a content grid may cut off a first tile as well
    if VARLEN:
        start = tl.load(cu + n)
        length = (tl.load(cu + n + 1) - start).to(tl.int32)
        tile_base = start // 16 + (2 * n if CONTENT > 0 else n)
    i = tl.arange(0, 16)
    kc, vc, rc = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BR)
    k_ok, v_ok, r_ok = kc < K, vc < V, rc < RANK
    kv_at = kc[:, None] * V + vc[None, :]
    kv_ok = k_ok[:, None] & v_ok[None, :]
    _, lower, below = masks()
    dS = tl.load(dS1 + head * K * V + kv_at, mask=kv_ok, other=0.0)
    # Each block of value channels has a part of its own of what is summed over them.
    part = block.to(tl.int64) * tokens * HV
    dq += part * K
    dk += part * K
    if DECAY > 0:
        dg += part * (K if DECAY == 2 else 1)
    if ERASE:
        dz += part * K
    if CORRECT > 0:
        de += part * (K if CORRECT == 2 else 1)
    if WRITE == 1:
        dw += part

    first = 0
    u = tl.zeros((BK,), tl.float32)
    if CONTENT > 0:
        seen = tl.load(count0 + n)
        first = seen % 16
        closed = (seen + length) // CONTENT
        chunk_row = tl.load(chunk_at + n) + closed
        U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + vc[None, :], mask=r_ok[:, None] & v_ok[None, :], other=0.0)
        U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
        d_sum = tl.load(dsum1 + head * V + vc, mask=v_ok, other=0.0)
        d_mean = tl.load(dmean1 + head * V + vc, mask=v_ok, other=0.0)
        m = tl.load(means + (chunk_row.to(tl.int64) * HV + hv) * V + vc, mask=v_ok, other=0.0)
        u = readout(m, U1, U2)
        du = tl.zeros((BK,), tl.float32)

    tiles = tl.cdiv(first + length, 16)
    if length == 0:
        tiles = 0
    for back in range(tiles):
        tile = tiles - 1 - back
        place = tile * 16 - first + i
        ok = (place >= 0) & (place < length)
        pos = start + place
        if CONTENT > 0:
            if (seen // 16 + tile + 1) % (CONTENT // 16) == 0 and (tile + 1) * 16 - first <= length:
                tl.store(du_out + (chunk_row.to(tl.int64) * HV + hv) * K + kc, du, mask=k_ok)
                d_sum = (d_mean + readout_gradient(du, m, U1, U2)) / CONTENT
                d_mean = tl.zeros((BV,), tl.float32)
                du = tl.zeros((BK,), tl.float32)
                chunk_row -= 1
                m = tl.load(means + (chunk_row.to(tl.int64) * HV + hv) * V + vc, mask=v_ok, other=0.0)
                u = readout(m, U1, U2)

        slot = (tile_base + tile).to(tl.int64) * HV + hv
        S = tl.load(states + slot * K * V + kv_at, mask=kv_ok, other=0.0)
        dO = load(do, pos, hv, HV, V, vc, ok, v_ok)
        if CONTENT > 0:
            dO += tl.where(ok[:, None], d_sum[None, :], 0.0)
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        ek = kt
        if CORRECT == 1:
            et = load1(e, pos, hv, HV, ok)[:, None]
            ek = kt * et
        elif CORRECT == 2:
            et = load(e, pos, hv, HV, K, kc, ok, k_ok)
            ek = kt * et
        vt = load(v, pos, hv, HV, V, vc, ok, v_ok)
        if CORRECT > 0:
            N = tl.load(news + (slot * 16 + i[:, None]) * V + vc[None, :], mask=v_ok[None, :], other=0.0)
            X = tl.load(inverses + (slot * 16 + i[:, None]) * 16 + i[None, :])
        else:
            N = vt
            if WRITE == 1:
                N = vt * load1(w, pos, hv, HV, ok)[:, None]
            elif WRITE == 2:
                N = vt * load(w, pos, hv, HV, V, vc, ok, v_ok)

        if DECAY > 0 or ERASE:
            log_D, logit = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, 16, BK)
        else:
            log_D = tl.zeros((16,), tl.float32)
        G = tl.cumsum(log_D, 0)
        Gx = G
        if STORED and CORRECT > 0:
            Gx = exclusive(G, log_D, "ieee", 16)
        if DECAY == 2 or ERASE:
            last = row(G, 15)[None, :]
            total = tl.exp(row(G, 15))[:, None]
        else:
            last = tl.sum(log_D, 0)
            total = tl.exp(last)
        qE, kZ = scaled(qt, G), scaled(kt, last - G)

        P = tl.where(lower, pair_products(qt, G, kt, G, MODE), 0.0)
        dN = mm(tl.trans(P), dO, MODE) + mm(kZ, dS, MODE)
        # A token's read of itself has no decay in it: left out until the decay's gradient is taken, which it would
        # reach as the difference of two equal sums.
        dP = tl.where(below, mm(dO, tl.trans(N), MODE), 0.0)
        d_self = tl.sum(dO * N.to(tl.float32), 1)[:, None]
        dqt, dkt = pair_gradients(dP, qt, G, kt, G, MODE)
        dqt += scaled(mm(dO, tl.trans(S), MODE), G)
        d_kZ = mm(N, tl.trans(dS), MODE)
        dkt += scaled(d_kZ, last - G)
        d_last = tl.sum(kZ * d_kZ, 0) + tl.sum(S.to(tl.float32) * (dS * total), 1)
        dS = dS * total + mm(tl.trans(qE), dO, MODE)
        d_after = qt * dqt
        if CORRECT > 0:
            eE = scaled(ek, Gx)
            dR = mm(tl.trans(X), dN, MODE)
            dA = tl.where(below, -mm(dR, tl.trans(N), MODE), 0.0)
            dek, dk_corrected = pair_gradients(dA, ek, Gx, kt, G, MODE)
            dek -= scaled(mm(dR, tl.trans(S), MODE), Gx)
            dkt += dk_corrected
            dS -= mm(tl.trans(eE), dR, MODE)
            d_predicted = ek * dek
            if not STORED:
                d_after += d_predicted
        else:
            dR = dN
        d_after -= kt * dkt
        dqt += d_self * kt
        dkt += d_self * qt
        if DECAY > 0 or ERASE:
            d_log = tl.cumsum(d_after, 0, reverse=True) + d_last[None, :]
            if STORED and CORRECT > 0:
                d_log += tl.cumsum(d_predicted, 0, reverse=True) - d_predicted
            if DECAY == 2 or ERASE:
                d_log = tl.where(log_D > FLOOR, d_log, 0.0)
            if DECAY == 2:
                store(dg, d_log, pos, hv, HV, K, kc, ok, k_ok)
            elif DECAY == 1:
                d_scalar = tl.sum(d_log, 1)
                if not ERASE:
                    d_scalar = tl.where(log_D > FLOOR, d_scalar, 0.0)
                tl.store(dg + pos.to(tl.int64) * HV + hv, d_scalar, mask=ok)
            if ERASE:
                d_logit = -d_log * tl.sigmoid(logit)
                store(dz, d_logit, pos, hv, HV, K, kc, ok, k_ok)
                if CONTENT > 0:
                    du += tl.sum(tl.where(ok[:, None], d_logit, 0.0), 0)
        if CORRECT == 1:
            tl.store(de + pos.to(tl.int64) * HV + hv, tl.sum(kt * dek, 1), mask=ok)
            dkt += et * dek
        elif CORRECT == 2:
            store(de, kt * dek, pos, hv, HV, K, kc, ok, k_ok)
            dkt += et * dek
        store(dq, dqt * scale, pos, hv, HV, K, kc, ok, k_ok)
        store(dk, dkt, pos, hv, HV, K, kc, ok, k_ok)
        if WRITE == 1:
            wt = load1(w, pos, hv, HV, ok)
            tl.store(dw + pos.to(tl.int64) * HV + hv, tl.sum(vt * dR, 1), mask=ok)
            dR = dR * wt[:, None]
        elif WRITE == 2:
            wt = load(w, pos, hv, HV, V, vc, ok, v_ok)
            store(dw, vt * dR, pos, hv, HV, V, vc, ok, v_ok)
            dR = dR * wt
        store(dv, dR, pos, hv, HV, V, vc, ok, v_ok)

    tl.store(dS0 + head * K * V + kv_at, dS, mask=kv_ok)
    if CONTENT > 0:
        tl.store(du_out + (chunk_row.to(tl.int64) * HV + hv) * K + kc, du, mask=k_ok)
        tl.store(dsum0 + head * V + vc, d_sum, mask=v_ok)
        tl.store(dmean0 + head * V + vc, d_mean + readout_gradient(du, m, U1, U2), mask=v_ok)
