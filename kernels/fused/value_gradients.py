"""The gradients of values, of the products of pairs, and of what a block shares with its states; a window at once.

    R^ = X^T N^ = (w v)^            P^ = O^ N^T (j <= i)        A^ = -R^ N^T (j < i)
    (q E)^ = O^ S^T                 (k Z)^ = N dS^T             (e k E')^ = -R^ S^T

`d_qE`, `d_kZ`, `d_eE` and the decay of the whole block take the places of `qE`, `kZ`, `W` and `total`.

Shapes: C slots in a block, K key dim, V value dim, D channels at a time, H key heads, HV value heads, T tokens,
N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.places import block
from hybridzoo.kernels.fused.tile import load, load1, mm, store


@triton.jit
def output_gradient(do, d_sum, n, pos, hv, HV, V, vc, ok, v_ok, CONTENT: tl.constexpr):
    """The outputs' gradient `[C, DV]`, their share in a content chunk's mean included."""
    dO = load(do, pos, hv, HV, V, vc, ok, v_ok)
    if CONTENT > 0:
        shared = tl.load(d_sum + (n * HV + hv).to(tl.int64) * V + vc, mask=v_ok, other=0.0)
        dO = tl.where(ok[:, None], dO + shared[None, :], 0.0)
    return dO


@triton.jit(do_not_specialize=["T", "first", "count", "origin", "span"])  # a new length compiles nothing
def value_gradients_kernel(
    v, w, owners, cu, count0, states, dstates, news, dnews, X, do, d_sum, dv, dw, dP, dA, d_qE, d_kZ, d_eE, total,
    T, first, count, origin, span, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DECAYS: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, CONTENT: tl.constexpr, VARLEN: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """One program a block and value head."""
    hv = tl.program_id(1)
    n, _, _, pos, ok, kept, slot, live = block(owners, cu, count0, first, count, origin, span, T, C, CONTENT, VARLEN)
    if not live:
        return
    kept = kept * HV + hv
    slot = slot * HV + hv
    i = tl.arange(0, C)
    r, c = i[:, None], i[None, :]

    dPt = tl.zeros((C, C), tl.float32)
    dAt = tl.zeros((C, C), tl.float32)
    d_w = tl.zeros((C,), tl.float32)
    if CORRECT > 0:
        Xt = tl.trans(tl.load(X + (kept * C + r) * C + c))
    if WRITE == 1:
        wt = load1(w, pos, hv, HV, ok)[:, None]
    for d in range(0, BV, DV):
        vc = d + tl.arange(0, DV)
        v_ok = vc < V
        cv_at = (slot * C + r) * V + vc[None, :]
        cv_ok = v_ok[None, :]
        dN = tl.load(dnews + cv_at, mask=cv_ok, other=0.0)
        N = tl.load(news + (kept * C + r) * V + vc[None, :], mask=cv_ok, other=0.0)
        dO = output_gradient(do, d_sum, n, pos, hv, HV, V, vc, ok, v_ok, CONTENT)
        vt = load(v, pos, hv, HV, V, vc, ok, v_ok)
        dPt += mm(dO, tl.trans(N), MODE)
        dR = dN.to(tl.float32)
        if CORRECT > 0:
            dR = mm(Xt, dN, MODE)
            dAt -= mm(dR, tl.trans(N), MODE)
            tl.store(dnews + cv_at, dR, mask=cv_ok)
        if WRITE == 1:
            d_w += tl.sum(vt * dR, 1)
            dR = dR * wt
        elif WRITE == 2:
            store(dw, vt * dR, pos, hv, HV, V, vc, ok, v_ok)
            dR = dR * load(w, pos, hv, HV, V, vc, ok, v_ok)
        store(dv, dR, pos, hv, HV, V, vc, ok, v_ok)
    if WRITE == 1:
        tl.store(dw + pos.to(tl.int64) * HV + hv, d_w, mask=ok)
    tl.store(dP + (slot * C + r) * C + c, tl.where(r >= c, dPt, 0.0))
    if CORRECT > 0:
        tl.store(dA + (slot * C + r) * C + c, tl.where(r > c, dAt, 0.0))
    tl.debug_barrier()  # R^ now lies where N^ was

    for d in range(0, BK, D):
        kc = d + tl.arange(0, D)
        k_ok = kc < K
        x = tl.zeros((C, D), tl.float32)
        y = tl.zeros((C, D), tl.float32)
        u = tl.zeros((C, D), tl.float32)
        d_last = tl.zeros((D,), tl.float32)
        for j in range(0, BV, DV):
            vc = j + tl.arange(0, DV)
            v_ok = vc < V
            vk_at = vc[:, None] * K + kc[None, :]
            vk_ok = v_ok[:, None] & k_ok[None, :]
            cv_at = r * V + vc[None, :]
            cv_ok = v_ok[None, :]
            S = tl.load(states + kept * K * V + vk_at, mask=vk_ok, other=0.0)
            dS = tl.load(dstates + slot * K * V + vk_at, mask=vk_ok, other=0.0)
            x += mm(output_gradient(do, d_sum, n, pos, hv, HV, V, vc, ok, v_ok, CONTENT), S, MODE)
            y += mm(tl.load(news + kept * C * V + cv_at, mask=cv_ok, other=0.0), dS, MODE)
            if CORRECT > 0:
                u -= mm(tl.load(dnews + slot * C * V + cv_at, mask=cv_ok, other=0.0), S, MODE)
            if DECAYS:
                d_last += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        ck_at = (slot * C + r) * K + kc[None, :]
        ck_ok = k_ok[None, :]
        tl.store(d_qE + ck_at, x, mask=ck_ok)
        tl.store(d_kZ + ck_at, y, mask=ck_ok)
        if CORRECT > 0:
            tl.store(d_eE + ck_at, u, mask=ck_ok)
        if DECAYS:
            at_k = total + slot * K + kc
            tl.store(at_k, d_last * tl.load(at_k, mask=k_ok, other=0.0), mask=k_ok)
