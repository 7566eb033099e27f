"""The serial part of the forward pass: the state goes through the prepared blocks of a window.

`N = X (w v - W S)`, `O = (q exp(G)) S + P N`, `S <- exp(G_last) S + (k exp(G_last - G))^T N`. The state is held
as `S^T [V, K]`: then a row of every product belongs to a row of S^T, and no warp needs another's part. Where nothing
fades (PLAIN), qE and kZ are the queries and keys themselves.

With a content gate the sum of a chunk's outputs is taken along, whose mean the next chunk reads (content.py).

Shapes: C slots in a block, K key dim, V value dim, HV value heads, T tokens, N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.places import begun, grid_ends, rows_of, scratch_slot, sequence, slots_of, state_of
from hybridzoo.kernels.fused.tile import mm


@triton.jit
def write_gates(w, at, start, length, seen, hv, HV, C: tl.constexpr):
    """A scalar write gate at the tokens of block `at`, as it is stored: `[C]`, 0 outside."""
    place, ok = slots_of(at, length, seen, C)
    return tl.load(w + (start + place).to(tl.int64) * HV + hv, mask=ok, other=0.0)


@triton.jit
def scan_blocks(
    S, v, w, W, qE, kZ, P, X, total, o, states, news, lo, hi, n, start, length, seen, base, origin, span, h, hv, vc,
    scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, PLAIN: tl.constexpr, CONTENT: tl.constexpr, WHOLE: tl.constexpr, SAVE: tl.constexpr,
    MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take the state `S^T [BV, BK]` of the value channels `vc` through blocks `lo` to `hi` of sequence `n`.

    Returns it, and with a content gate the sum of the outputs `[BV]`.
    """
    i = tl.arange(0, C)
    kc = tl.arange(0, BK)
    k_ok, v_ok = kc < K, vc < V
    vk_at = vc[:, None] * K + kc[None, :]
    vk_ok = v_ok[:, None] & k_ok[None, :]
    begin = seen // C
    o_sum = tl.zeros((BV,), tl.float32)
    if WRITE == 1:
        ahead = write_gates(w, lo, start, length, seen, hv, HV, C)
    for at in tl.range(lo, hi, num_stages=STAGES):
        if WRITE == 1:
            # Asked for a step ahead by hand: no asynchronous copy takes two bytes, so the compiler's pipeline leaves
            # them out, and each step of the chain would wait for them.
            gates = ahead
            ahead = write_gates(w, at + 1, start, length, seen, hv, HV, C)
        slot = scratch_slot(n, at, base, begin, origin, span, WHOLE).to(tl.int64) * HV + hv
        kept = (base + at - begin).to(tl.int64) * HV + hv
        row = slot * C + i
        place, ok, key_row, key_ok = rows_of(at, row, start, length, seen, h, H, PLAIN, C)
        kT_at, kT_ok = key_row[None, :] * K + kc[:, None], key_ok[None, :] & k_ok[:, None]
        if SAVE:
            tl.store(states + kept * K * V + vk_at, S, mask=vk_ok)
        token = (start + place).to(tl.int64) * HV + hv
        cv_at, cv_ok = token[None, :] * V + vc[:, None], ok[None, :] & v_ok[:, None]
        N = tl.load(v + cv_at, mask=cv_ok, other=0.0).to(tl.float32)
        if WRITE == 1:
            N = N * gates.to(tl.float32)[None, :]
        elif WRITE == 2:
            N = N * tl.load(w + cv_at, mask=cv_ok, other=0.0).to(tl.float32)
        if CORRECT:
            N -= mm(S, tl.load(W + row[None, :] * K + kc[:, None], mask=k_ok[:, None], other=0.0), MODE)
            N = mm(N, tl.load(X + ((kept if SAVE else slot) * C + i[None, :]) * C + i[:, None]), MODE)
        out = mm(S, tl.load(qE + kT_at, mask=kT_ok, other=0.0), MODE)
        if PLAIN:
            out = out * scale
        out += mm(N, tl.load(P + (slot * C + i[None, :]) * C + i[:, None]), MODE)
        tl.store(o + cv_at, out, mask=cv_ok)
        if SAVE:
            tl.store(news + (kept * C + i[None, :]) * V + vc[:, None], N, mask=v_ok[:, None])
        if DECAYS:
            S = S * tl.load(total + slot * K + kc, mask=k_ok, other=0.0)[None, :]
        kZ_at, kZ_ok = key_row[:, None] * K + kc[None, :], key_ok[:, None] & k_ok[None, :]
        S += mm(N, tl.load(kZ + kZ_at, mask=kZ_ok, other=0.0), MODE)
        if CONTENT > 0:
            o_sum += tl.sum(out, 1)
    return S, o_sum


@triton.jit(do_not_specialize=["T", "first", "count"])  # a new length compiles nothing
def scan_kernel(
    v, w, W, qE, kZ, P, X, total, S0, cu, o, S1, states, news, T, first, count, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, PLAIN: tl.constexpr, VARLEN: tl.constexpr, SAVE: tl.constexpr, MODE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence, value head and part of its value channels, without a content gate."""
    head, part = tl.program_id(0), tl.program_id(1)
    n, hv = head // HV, head % HV
    start, length, seen, base = sequence(cu, None, n, T, C, 0, VARLEN)
    _, end = grid_ends(seen, length, C)
    vc = part * BV + tl.arange(0, BV)
    ends_at, ends_ok = state_of(head, vc, K, V, BK)
    S = begun(S0, ends_at, ends_ok)
    S, _ = scan_blocks(
        S, v, w, W, qE, kZ, P, X, total, o, states, news, first, tl.minimum(first + count, end), n, start, length, seen,
        base, first, count, hv // (HV // H), hv, vc, scale, H, HV, K, V, C, BK, BV, DECAYS, CORRECT, WRITE, PLAIN, 0,
        VARLEN, SAVE, MODE, STAGES,
    )  # fmt: skip
    if S1 is not None:
        tl.store(S1 + ends_at, S, mask=ends_ok)
