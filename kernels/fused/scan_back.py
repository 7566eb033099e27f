"""The serial part of the backward pass: the gradient of the state goes back through the prepared blocks of a window.

`N^ = P^T O^ + (k exp(G_last - G)) S^`, `R^ = X^T N^` of `R = w v - W S`, and `S^ <- exp(G_last) S^ + (q exp(G))^T O^ -
W^T R^`, held as `S^T [V, K]`. qE and kZ are as in scan.py.

With a content gate every output of a chunk has a share in the mean that the next chunk reads: once that chunk's
gradients are known, so is what is added to this one's.

Shapes: C slots in a block, K key dim, V value dim, HV value heads, T tokens, N sequences, L content chunk, r content
rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.places import grid_ends, rows_of, scratch_slot, sequence
from hybridzoo.kernels.fused.tile import mm


@triton.jit(do_not_specialize=["T", "first", "count", "origin", "span"])  # a new length compiles nothing
def scan_back_kernel(
    W, qE, kZ, P, X, total, down, up, rows, slopes, du_blocks, do, dS1, dsum1, dmean1, count0, cu,
    dS0, dstates, dnews, d_sum, du_rows, T, first, count, origin, span, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, DECAYS: tl.constexpr,
    CORRECT: tl.constexpr, PLAIN: tl.constexpr, CONTENT: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence, value head and part of its value channels; it leaves the state's gradient where the next
    window is to find it."""
    head, part = tl.program_id(0), tl.program_id(1)
    n, hv = head // HV, head % HV
    h = hv // (HV // H)
    start, length, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
    begin, end = grid_ends(seen, length, C)
    lo, hi = tl.maximum(first, begin), tl.minimum(first + count, end)
    i = tl.arange(0, C)
    kc, vc = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = kc < K, vc < V
    vk_at = vc[:, None] * K + kc[None, :]
    vk_ok = v_ok[:, None] & k_ok[None, :]
    ends_at = head.to(tl.int64) * K * V + kc[None, :] * V + vc[:, None]
    v_at = head.to(tl.int64) * V + vc
    dS = tl.load(dS1 + ends_at, mask=vk_ok, other=0.0)
    shared = tl.zeros((BV,), tl.float32)
    if CONTENT > 0:
        chunk, closed = first * C // CONTENT, (seen + length) // CONTENT  # `closed` is the open chunk's number
        if chunk == closed:
            shared = tl.load(dsum1 + v_at, mask=v_ok, other=0.0)
        elif chunk < closed:
            if chunk + 1 == closed:
                shared = tl.load(dmean1 + v_at, mask=v_ok, other=0.0)
            du = tl.zeros((BK,), tl.float32)
            for j in range(CONTENT // C):  # the blocks of the chunk that this one's mean was read in
                du += tl.load(du_blocks + ((n * (CONTENT // C) + j) * HV + hv) * K + kc, mask=k_ok, other=0.0)
            row = (tl.load(rows + n) + chunk + 1).to(tl.int64) * HV + hv
            if part == 0:
                tl.store(du_rows + row * K + kc, du, mask=k_ok)
            rc = tl.arange(0, BR)
            r_ok = rc < RANK
            kr_ok = k_ok[:, None] & r_ok[None, :]
            U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=kr_ok, other=0.0)
            rv_ok = r_ok[:, None] & v_ok[None, :]
            U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + vc[None, :], mask=rv_ok, other=0.0)
            d_hidden = tl.sum(U2 * du[:, None], 0) * tl.load(slopes + row * RANK + rc, mask=r_ok, other=0.0)
            shared = (shared + tl.sum(U1 * d_hidden[:, None], 0)) / CONTENT
        tl.store(d_sum + v_at, shared, mask=v_ok)
    for back in tl.range(lo, hi, num_stages=STAGES):
        at = lo + hi - 1 - back
        slot = scratch_slot(n, at, base, origin, span, CONTENT, VARLEN).to(tl.int64) * HV + hv
        tl.store(dstates + slot * K * V + vk_at, dS, mask=vk_ok)
        row = slot * C + i
        place, ok, key_row, key_ok = rows_of(at, row, start, length, seen, h, H, PLAIN, C)
        vc_ok = ok[None, :] & v_ok[:, None]
        dO = tl.load(do + ((start + place)[None, :].to(tl.int64) * HV + hv) * V + vc[:, None], mask=vc_ok, other=0.0)
        if CONTENT > 0:
            dO = tl.where(vc_ok, dO.to(tl.float32) + shared[:, None], 0.0)
        dN = mm(dO, tl.load(P + (slot * C + i[:, None]) * C + i[None, :]), MODE)
        kT_at, kT_ok = key_row[None, :] * K + kc[:, None], key_ok[None, :] & k_ok[:, None]
        kT = tl.load(kZ + kT_at, mask=kT_ok, other=0.0)
        dN += mm(dS, kT, MODE)
        if CORRECT:  # R^ from here on
            kept = (base + at - begin).to(tl.int64) * HV + hv
            dN = mm(dN, tl.load(X + (kept * C + i[:, None]) * C + i[None, :]), MODE)
        tl.store(dnews + row[None, :] * V + vc[:, None], dN, mask=v_ok[:, None])
        if DECAYS:
            dS = dS * tl.load(total + slot * K + kc, mask=k_ok, other=0.0)[None, :]
        q_at, q_ok = key_row[:, None] * K + kc[None, :], key_ok[:, None] & k_ok[None, :]
        d_read = mm(dO, tl.load(qE + q_at, mask=q_ok, other=0.0), MODE)
        if PLAIN:
            d_read = d_read * scale
        dS += d_read
        if CORRECT:
            dS -= mm(dN, tl.load(W + row[:, None] * K + kc[None, :], mask=k_ok[None, :], other=0.0), MODE)
    tl.store(dS0 + ends_at, dS, mask=vk_ok)
