"""The forward kernel: one pass over the sequence, the state in registers. Mathematics: docs/recurrence.md.

Shapes: N sequences, T tokens, H key heads, HV value heads, C = 16 slots in a tile, K key dim, V value dim, L content
chunk, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.tile import exclusive, inverse, load, load1, log_decay, masks, middles, mm, readout, row


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def forward_kernel(
    q, k, v, g, z, e, w, down, up, S0, sum0, mean0, count0, cu,
    o, S1, sum1, mean1, states, news, inverses, means, chunk_at,
    T, scale, H, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, VARLEN: tl.constexpr, SAVE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """A program takes one head of one sequence, and BV of its value channels, from the first tile to the last."""
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
        # An upper bound on the tiles before: a sequence's last may be open, and with a content grid its first too.
        tile_base = start // 16 + (2 * n if CONTENT > 0 else n)
    i = tl.arange(0, 16)
    kc, vc, rc = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BR)
    k_ok, v_ok, r_ok = kc < K, vc < V, rc < RANK
    kv_at = kc[:, None] * V + vc[None, :]
    kv_ok = k_ok[:, None] & v_ok[None, :]
    S = tl.load(S0 + head * K * V + kv_at, mask=kv_ok, other=0.0)
    same, lower, below = masks()

    first, in_chunk = 0, 0
    u = tl.zeros((BK,), tl.float32)
    o_sum = tl.zeros((BV,), tl.float32)
    o_mean = tl.zeros((BV,), tl.float32)
    chunk_row = 0
    if CONTENT > 0:
        seen = tl.load(count0 + n)
        first = seen % 16
        in_chunk = seen // 16
        chunk_row = tl.load(chunk_at + n)
        o_sum = tl.load(sum0 + head * V + vc, mask=v_ok, other=0.0)
        o_mean = tl.load(mean0 + head * V + vc, mask=v_ok, other=0.0)
        U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + vc[None, :], mask=r_ok[:, None] & v_ok[None, :], other=0.0)
        U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
        u = readout(o_mean, U1, U2)
        if SAVE:
            tl.store(means + (chunk_row.to(tl.int64) * HV + hv) * V + vc, o_mean, mask=v_ok)

    tiles = tl.cdiv(first + length, 16)
    if length == 0:
        tiles = 0
    for tile in range(tiles):
        place = tile * 16 - first + i
        ok = (place >= 0) & (place < length)
        pos = start + place
        qt = load(q, pos, h, H, K, kc, ok, k_ok) * scale
        kt = load(k, pos, h, H, K, kc, ok, k_ok)
        vt = load(v, pos, hv, HV, V, vc, ok, v_ok)
        if WRITE == 1:
            vt = vt * load1(w, pos, hv, HV, ok)[:, None]
        elif WRITE == 2:
            vt = vt * load(w, pos, hv, HV, V, vc, ok, v_ok)
        ek = kt
        if CORRECT == 1:
            ek = kt * load1(e, pos, hv, HV, ok)[:, None]
        elif CORRECT == 2:
            ek = kt * load(e, pos, hv, HV, K, kc, ok, k_ok)

        if DECAY == 2 or ERASE:
            log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, 16, BK)
            G = tl.cumsum(log_D, 0)
            Gx = G
            if STORED and CORRECT > 0:
                Gx = exclusive(G, log_D, EXACT, 16)
            last = row(G, 15)[None, :]
            middle, half = middles(G)
            k_half, q_half = kt * tl.exp(half - G), qt * tl.exp(G - half)
            k_middle = tl.where(i[:, None] < 8, kt * tl.exp(tl.minimum(middle - G, 0.0)), 0.0)
            q_middle = tl.where(i[:, None] < 8, 0.0, qt * tl.exp(tl.minimum(G - middle, 0.0)))
            P = tl.where(same, mm(q_half, tl.trans(k_half), MODE), mm(q_middle, tl.trans(k_middle), MODE))
            if CORRECT > 0:
                e_half = ek * tl.exp(Gx - half)
                e_middle = tl.where(i[:, None] < 8, 0.0, ek * tl.exp(tl.minimum(Gx - middle, 0.0)))
                A = tl.where(same, mm(e_half, tl.trans(k_half), MODE), mm(e_middle, tl.trans(k_middle), MODE))
                ek = ek * tl.exp(Gx)
            qt = qt * tl.exp(G)
            kt = kt * tl.exp(last - G)
            total = tl.exp(row(G, 15))[:, None]
        elif DECAY == 1:
            log_D, _ = log_decay(g, z, pos, ok, hv, HV, K, kc, k_ok, u, DECAY, ERASE, FLOOR, 16, BK)
            G = tl.cumsum(log_D, 0)
            Gx = G
            if STORED and CORRECT > 0:
                Gx = exclusive(G, log_D, EXACT, 16)
            last = tl.sum(log_D, 0)
            P = mm(qt, tl.trans(kt), MODE) * tl.exp(tl.minimum(G[:, None] - G[None, :], 0.0))
            if CORRECT > 0:
                A = mm(ek, tl.trans(kt), MODE) * tl.exp(tl.minimum(Gx[:, None] - G[None, :], 0.0))
                ek = ek * tl.exp(Gx)[:, None]
            qt = qt * tl.exp(G)[:, None]
            kt = kt * tl.exp(last - G)[:, None]
            total = tl.exp(last)
        else:
            P = mm(qt, tl.trans(kt), MODE)
            if CORRECT > 0:
                A = mm(ek, tl.trans(kt), MODE)

        N = vt
        if CORRECT > 0:
            X = inverse(tl.where(below, A, 0.0), EXACT, EXACT, 16)
            N = mm(X, vt - mm(ek, S, MODE), MODE)
        out = mm(qt, S, MODE) + mm(tl.where(lower, P, 0.0), N, MODE)
        tl.store(o + (pos[:, None].to(tl.int64) * HV + hv) * V + vc[None, :], out, mask=ok[:, None] & v_ok[None, :])
        if SAVE:
            slot = (tile_base + tile).to(tl.int64) * HV + hv
            tl.store(states + slot * K * V + kv_at, S, mask=kv_ok)
            if CORRECT > 0:
                tl.store(news + (slot * 16 + i[:, None]) * V + vc[None, :], N, mask=v_ok[None, :])
                if block == 0:
                    tl.store(inverses + (slot * 16 + i[:, None]) * 16 + i[None, :], X)
        if DECAY > 0 or ERASE:
            S = S * total
        S += mm(tl.trans(kt), N, MODE)

        if CONTENT > 0:
            o_sum += tl.sum(out, 0)
            in_chunk += 1
            if in_chunk == CONTENT // 16 and (tile + 1) * 16 - first <= length:
                in_chunk = 0
                chunk_row += 1
                o_mean = o_sum / CONTENT
                o_sum = tl.zeros((BV,), tl.float32)
                u = readout(o_mean, U1, U2)
                if SAVE:
                    tl.store(means + (chunk_row.to(tl.int64) * HV + hv) * V + vc, o_mean, mask=v_ok)

    tl.store(S1 + head * K * V + kv_at, S, mask=kv_ok)
    if CONTENT > 0:
        tl.store(sum1 + head * V + vc, o_sum, mask=v_ok)
        tl.store(mean1 + head * V + vc, o_mean, mask=v_ok)
