"""The kernels of attention from one token a row to the slots of its cache: keys and values are read once.

A row's slots are cut into parts, so that few rows fill a GPU too. What a part gives is a softmax of its own: the
largest score, the sum of exponentials under it, and the values weighted by those. A second kernel joins the parts; a
row of one part needs none.

Shapes: N rows, H_kv key heads, G query heads a key head, D head dim, C slots, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.tile import mm, tanh


@triton.jit(do_not_specialize=["C", "span"])  # a cache that grows compiles nothing
def slots_kernel(
    q, k, v, length, o, tops, sums, scale, cap, HKV, G, D, C, span,
    BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes one of P parts, `span` slots, of a row's key head, and the G query heads that share it.

    `o [N, HKV, P, G, D]` and `tops, sums [N, HKV, P, G]` are those of parts; of the only one (WHOLE) `o` is the result.
    """
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    gc, dc = tl.arange(0, BG), tl.arange(0, BD)
    g_ok, d_ok = gc < G, dc < D
    gd_ok = g_ok[:, None] & d_ok[None, :]
    seen = tl.minimum(tl.load(length + head // HKV) + 1, C)  # the new token too; a ring that is full has no other slots
    lo = part * span
    hi = tl.minimum(lo + span, seen)
    at_head = head.to(tl.int64) * C * D
    qt = tl.load(q + (head.to(tl.int64) * G + gc[:, None]) * D + dc[None, :], mask=gd_ok, other=0.0)
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    out = tl.zeros((BG, BD), tl.float32)
    for at in tl.range(lo, hi, BN, num_stages=STAGES):
        slot = at + tl.arange(0, BN)
        ok = slot < hi
        kt = tl.load(k + at_head + slot[None, :] * D + dc[:, None], mask=ok[None, :] & d_ok[:, None], other=0.0)
        vt = tl.load(v + at_head + slot[:, None] * D + dc[None, :], mask=ok[:, None] & d_ok[None, :], other=0.0)
        score = mm(qt, kt, MODE) * scale
        if CAPPED:
            bounded, _ = tanh(score / cap)
            score = cap * bounded
        score = tl.where(ok[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        less = tl.exp(top - higher)
        total = total * less + tl.sum(weight, 1)
        out = out * less[:, None] + mm(weight, vt, MODE)
        top = higher
    row = head.to(tl.int64) * parts + part
    if WHOLE:
        out = out / total[:, None]
    else:
        tl.store(tops + row * G + gc, top, mask=g_ok)
        tl.store(sums + row * G + gc, total, mask=g_ok)
    tl.store(o + (row * G + gc[:, None]) * D + dc[None, :], out, mask=gd_ok)


@triton.jit
def join_kernel(parts_o, tops, sums, o, G, D, P, BP: tl.constexpr, BD: tl.constexpr):
    """Join the P parts of one query head of a row: `o [N, HKV, G, D]`."""
    head, g = tl.program_id(0), tl.program_id(1)
    pc, dc = tl.arange(0, BP), tl.arange(0, BD)
    p_ok, d_ok = pc < P, dc < D
    row = (head.to(tl.int64) * P + pc) * G + g
    top = tl.load(tops + row, mask=p_ok, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))  # of a part without a slot 0
    total = tl.sum(weight * tl.load(sums + row, mask=p_ok, other=0.0), 0)
    of_parts = tl.load(parts_o + row[:, None] * D + dc[None, :], mask=p_ok[:, None] & d_ok[None, :], other=0.0)
    out = tl.sum(of_parts * weight[:, None], 0) / total
    tl.store(o + (head.to(tl.int64) * G + g) * D + dc, out, mask=d_ok)
