"""The serial part of the backward pass: the gradient of the state goes back through the prepared blocks of a window.

`N^ = P^T O^ + (k exp(G_last - G)) S^`, `R^ = X^T N^` of `R = w v - W S`, and `S^ <- exp(G_last) S^ + (q exp(G))^T O^ -
W^T R^`, held as `S^T [V, K]`. qE and kZ are as in scan.py.

With a content gate every output of a chunk has a share in the mean that the next chunk reads: once that chunk's
gradients are known, so is what is added to this one's.

Shapes: C slots in a block, K key dim, V value dim, HV value heads, T tokens, N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.places import begun, grid_ends, rows_of, scratch_slot, sequence, state_of
from hybridzoo.kernels.fused.tile import mm


@triton.jit
def scan_back_blocks(
    dS, shared, W, qE, kZ, P, X, total, do, dstates, dnews, lo, hi, n, start, length, seen, base, origin, span, h, hv,
    vc, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    PLAIN: tl.constexpr, CONTENT: tl.constexpr, WHOLE: tl.constexpr, MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take the gradient of the state `S^T [BV, BK]` back through blocks `hi` to `lo` of sequence `n`, and return it.

    `shared [BV]`: what is added to every output's gradient, with a content gate.
    """
    i = tl.arange(0, C)
    kc = tl.arange(0, BK)
    k_ok, v_ok = kc < K, vc < V
    vk_at = vc[:, None] * K + kc[None, :]
    vk_ok = v_ok[:, None] & k_ok[None, :]
    begin = seen // C
    for back in tl.range(lo, hi, num_stages=STAGES):
        at = lo + hi - 1 - back
        slot = scratch_slot(n, at, base, begin, origin, span, WHOLE).to(tl.int64) * HV + hv
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
    return dS


@triton.jit(do_not_specialize=["T", "first", "count", "later"])  # a new length compiles nothing
def scan_back_kernel(
    W, qE, kZ, P, X, total, do, dS1, cu, dS0, dstates, dnews, T, first, count, later, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    PLAIN: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence, value head and part of its value channels, without a content gate; it leaves the state's
    gradient in dS0, where the window before it finds it (`later`: one after this has been there)."""
    head, part = tl.program_id(0), tl.program_id(1)
    n, hv = head // HV, head % HV
    start, length, seen, base = sequence(cu, None, n, T, C, 0, VARLEN)
    _, end = grid_ends(seen, length, C)
    vc = part * BV + tl.arange(0, BV)
    ends_at, ends_ok = state_of(head, vc, K, V, BK)
    if later:
        dS = tl.load(dS0 + ends_at, mask=ends_ok, other=0.0)
    else:
        dS = begun(dS1, ends_at, ends_ok)
    dS = scan_back_blocks(
        dS, None, W, qE, kZ, P, X, total, do, dstates, dnews, first, tl.minimum(first + count, end), n, start, length,
        seen, base, first, count, hv // (HV // H), hv, vc, scale, H, HV, K, V, C, BK, BV, DECAYS, CORRECT, PLAIN, 0,
        VARLEN, MODE, STAGES,
    )  # fmt: skip
    tl.store(dS0 + ends_at, dS, mask=ends_ok)
