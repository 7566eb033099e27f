"""The serial part of the forward pass: the state goes through the prepared blocks.

`N = U - W S`, `O = (q exp(G)) S + P N`, `S <- exp(G_last) S + (k exp(G_last - G))^T N`. The state is held
as `S^T [V, K]`: then a row of every product belongs to a row of S^T, and no warp needs another's part.

Shapes: C slots in a block, K key dim, V value dim, HV value heads, T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import sequence
from hybridzoo.kernels.fused.tile import mm


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def scan_kernel(
    W, U, qE, kZ, P, total, S0, cu, o, S1, states, news, T, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    VARLEN: tl.constexpr, SAVE: tl.constexpr, MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence, value head and part of its value channels."""
    head, part = tl.program_id(0), tl.program_id(1)
    n, hv = head // HV, head % HV
    start, length, base = sequence(cu, n, T, C, VARLEN)
    i = tl.arange(0, C)
    kc, vc = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = kc < K, vc < V
    vk_at = vc[:, None] * K + kc[None, :]
    vk_ok = v_ok[:, None] & k_ok[None, :]
    ends_at = head.to(tl.int64) * K * V + kc[None, :] * V + vc[:, None]
    S = tl.load(S0 + ends_at, mask=vk_ok, other=0.0)
    kT_ok = k_ok[:, None] & (i[None, :] < C)
    for at in tl.range(tl.cdiv(length, C), num_stages=STAGES):
        slot = (base + at).to(tl.int64) * HV + hv
        kT_at = (slot * C + i[None, :]) * K + kc[:, None]
        vT_at = (slot * C + i[None, :]) * V + vc[:, None]
        if SAVE:
            tl.store(states + slot * K * V + vk_at, S, mask=vk_ok)
        Ut = tl.load(U + vT_at, mask=v_ok[:, None] & (i[None, :] < C), other=0.0)
        N = Ut.to(tl.float32)
        if CORRECT:
            N -= mm(S, tl.load(W + kT_at, mask=kT_ok, other=0.0), MODE)
        out = mm(S, tl.load(qE + kT_at, mask=kT_ok, other=0.0), MODE)
        Pt = tl.load(P + (slot * C + i[None, :]) * C + i[:, None])
        out += mm(N, Pt, MODE)
        place = at * C + i
        tl.store(
            o + ((start + place)[None, :].to(tl.int64) * HV + hv) * V + vc[:, None],
            out,
            mask=(place < length)[None, :] & v_ok[:, None],
        )
        if SAVE and CORRECT:
            tl.store(news + vT_at, N, mask=v_ok[:, None] & (i[None, :] < C))
        if DECAYS:
            S = S * tl.load(total + slot * K + kc, mask=k_ok, other=0.0)[None, :]
        kt = tl.load(kZ + (slot * C + i[:, None]) * K + kc[None, :], mask=k_ok[None, :] & (i[:, None] < C), other=0.0)
        S += mm(N, kt, MODE)
    tl.store(S1 + ends_at, S, mask=vk_ok)
