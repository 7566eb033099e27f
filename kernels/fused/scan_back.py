"""The serial part of the backward pass: the state's gradient goes back through the prepared blocks.

With `dS` the gradient of the state after a block: `dN = P^T dO + (k exp(G_last - G)) dS` and
`dS <- exp(G_last) dS + (q exp(G))^T dO - W^T dN`, held as `dS^T [V, K]`.

Shapes: C slots in a block, K key dim, V value dim, HV value heads, T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.blocks import sequence
from hybridzoo.kernels.fused.tile import mm


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def scan_back_kernel(
    W, qE, kZ, P, total, do, dS1, cu, dS0, dstates, dnews, T, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    VARLEN: tl.constexpr, MODE: tl.constexpr, STAGES: tl.constexpr,
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
    dS = tl.load(dS1 + ends_at, mask=vk_ok, other=0.0)
    blocks = tl.cdiv(length, C)
    for back in tl.range(blocks, num_stages=STAGES):
        at = blocks - 1 - back
        slot = (base + at).to(tl.int64) * HV + hv
        tl.store(dstates + slot * K * V + vk_at, dS, mask=vk_ok)
        place = at * C + i
        ok = place < length
        dO = tl.load(
            do + ((start + place)[None, :].to(tl.int64) * HV + hv) * V + vc[:, None],
            mask=ok[None, :] & v_ok[:, None],
            other=0.0,
        )
        ck_at = (slot * C + i[:, None]) * K + kc[None, :]
        ck_ok = k_ok[None, :] & (i[:, None] < C)
        dN = mm(dO, tl.load(P + (slot * C + i[:, None]) * C + i[None, :]), MODE)
        kT = tl.load(kZ + (slot * C + i[None, :]) * K + kc[:, None], mask=k_ok[:, None] & (i[None, :] < C), other=0.0)
        dN += mm(dS, kT, MODE)
        tl.store(dnews + (slot * C + i[None, :]) * V + vc[:, None], dN, mask=v_ok[:, None] & (i[None, :] < C))
        if DECAYS:
            dS = dS * tl.load(total + slot * K + kc, mask=k_ok, other=0.0)[None, :]
        dS += mm(dO, tl.load(qE + ck_at, mask=ck_ok, other=0.0), MODE)
        if CORRECT:
            dS -= mm(dN, tl.load(W + ck_at, mask=ck_ok, other=0.0), MODE)
    tl.store(dS0 + ends_at, dS, mask=vk_ok)
