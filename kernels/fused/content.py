"""Both passes with a content gate, each in one launch: a group of programs takes a head from chunk to chunk.

What decays a content chunk has is known once the outputs of the chunk before are: chunks wait for each other, but only
those of one sequence and head. A group of programs therefore goes through all chunks of its head, and does in each what
launches do without a content gate: its blocks are prepared, one by each program; the state goes through them, some of
the value channels in each program; backward, gradients follow in two steps. After every step the group meets, and
nobody else waits.

A program may wait only for one that runs. Programs take their seats in the order in which they start, so all of a group
run, or the last ones are the next to start once any program ends. Where programs run one after another, as in the
interpreter, a group is one program.

Shapes: C slots in a block, K key dim, V value dim, BV value channels of a program, HV value heads, T tokens,
N sequences, L content chunk, r content rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.gradients import gradients_of_block
from hybridzoo.kernels.fused.places import block, chunk_row, content_chunks, grid_ends, sequence, state_of
from hybridzoo.kernels.fused.prepare import prepare_block
from hybridzoo.kernels.fused.scan import scan_blocks
from hybridzoo.kernels.fused.scan_back import scan_back_blocks

# Numbers between the counters of two groups, so that no two are in one line of the cache.
COUNTER = tl.constexpr(32)


@triton.jit
def seat(counters, GROUP: tl.constexpr):
    """The head that a program works on, its part of the group's work, and where the group counts."""
    ticket = tl.program_id(0)
    if GROUP > 1:
        ticket = tl.atomic_add(counters, 1)
    head = ticket // GROUP
    return head, ticket % GROUP, counters + (head + 1) * COUNTER


@triton.jit
def meet(counter, met, GROUP: tl.constexpr):
    """Wait for the group, so that each program reads what all have written; return `met`, how many have come by now."""
    met += GROUP
    if GROUP > 1:
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release")
        while tl.atomic_add(counter, 0, sem="acquire") < met:
            pass
    tl.debug_barrier()
    return met


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def forward_kernel(
    q, k, v, g, z, e, w, down, up, cu, count0, S0, sum0, mean0, W, qE, kZ, P, X, total, counters, o, S1, sum1, mean1,
    states, news, readouts, T, scale, H, HV, K, V,
    GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr,
    BR: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr,
    WRITE: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr,
    SAVE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, MERGE: tl.constexpr, FLOOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """GROUP programs a sequence and value head, each with BV of the EVERY value channels."""
    SPAN: tl.constexpr = CONTENT // C
    head, part, counter = seat(counters, GROUP)
    n, hv = head // HV, head % HV
    h = hv // (HV // H)
    start, length, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
    begin, end = grid_ends(seen, length, C)
    chunks, _ = content_chunks(seen, length, CONTENT)
    vc = part * BV + tl.arange(0, BV)
    v_ok = vc < V
    v_at = head.to(tl.int64) * V + vc
    ends_at, ends_ok = state_of(head, vc, K, V, BK)
    S = tl.load(S0 + ends_at, mask=ends_ok, other=0.0)
    o_sum = tl.load(sum0 + v_at, mask=v_ok, other=0.0)
    mean = tl.load(mean0 + v_at, mask=v_ok, other=0.0)
    met = 0
    for chunk in range(chunks):
        first = chunk * SPAN
        chunk_at = readouts + (chunk_row(n, start, chunk, CONTENT).to(tl.int64) * HV + hv) * (V + K)
        tl.store(chunk_at + vc, mean, mask=v_ok)
        met = meet(counter, met, GROUP)
        for b in range(part, SPAN, GROUP):
            _, _, leads, pos, ok, kept, slot, live = block(
                n * SPAN + b, None, cu, count0, first, SPAN, first, SPAN, T, C, CONTENT, VARLEN
            )
            if live:
                prepare_block(
                    q, k, g, z, e, down, up, chunk_at, W, qE, kZ, P, X, total, pos, ok, leads, slot * HV + hv,
                    (kept if SAVE else slot) * HV + hv, h, hv, scale, H, HV, K, V, C, BK, EVERY, D, BR, RANK, DECAY,
                    ERASE, CORRECT, STORED, CONTENT, NORM, False, MODE, EXACT, MERGE, FLOOR,
                )  # fmt: skip
        met = meet(counter, met, GROUP)
        S, here = scan_blocks(
            S, v, w, W, qE, kZ, P, X, total, o, states, news, tl.maximum(first, begin), tl.minimum(first + SPAN, end),
            n, start, length, seen, base, first, SPAN, h, hv, vc, scale, H, HV, K, V, C, BK, BV, True, CORRECT > 0,
            WRITE, False, CONTENT, VARLEN, SAVE, MODE, STAGES,
        )  # fmt: skip
        o_sum += here
        if seen + length >= (chunk + 1) * CONTENT:
            mean = o_sum / CONTENT
            o_sum = tl.zeros((BV,), tl.float32)
    tl.store(S1 + ends_at, S, mask=ends_ok)
    tl.store(sum1 + v_at, o_sum, mask=v_ok)
    tl.store(mean1 + v_at, mean, mask=v_ok)


@triton.jit
def through_readout(du_blocks, du_row, slopes, down, up, n, hv, vc, HV, K, V, store_du, SPAN: tl.constexpr,
                    BK: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """The gradient `[BV]` of the mean that a chunk read, from those of its readout that its blocks left."""
    kc, rc = tl.arange(0, BK), tl.arange(0, BR)
    k_ok, r_ok = kc < K, rc < RANK
    du = tl.zeros((BK,), tl.float32)
    for b in range(SPAN):
        du += tl.load(du_blocks + ((n * SPAN + b).to(tl.int64) * HV + hv) * K + kc, mask=k_ok, other=0.0)
    if store_du:
        tl.store(du_row + kc, du, mask=k_ok)
    U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
    U1_ok = r_ok[:, None] & (vc < V)[None, :]
    U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + vc[None, :], mask=U1_ok, other=0.0)
    d_hidden = tl.sum(U2 * du[:, None], 0) * tl.load(slopes + rc, mask=r_ok, other=0.0)
    return tl.sum(U1 * d_hidden[:, None], 0)


@triton.jit(do_not_specialize=["T"])  # a new length compiles nothing
def backward_kernel(
    q, k, v, g, z, e, w, down, up, cu, count0, W, qE, kZ, P, X, total, counters, states, news, readouts, slopes, o, do,
    dS1, dsum1, dmean1, dstates, dnews, dP, dA, along, dq, dk, dv, dg, dz, de, dw, du_blocks, du_rows, dS0, d_sum,
    dmean0, T, scale, H, HV, K, V,
    GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr,
    STATES_K: tl.constexpr, STATES_V: tl.constexpr, PAIRS_K: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    MERGE: tl.constexpr, FLOOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """GROUP programs a sequence and value head, each with BV of the EVERY value channels.

    The gradient of a mean reaches the outputs of the chunk whose mean it is, and the sum that the chunk began with.
    """
    SPAN: tl.constexpr = CONTENT // C
    PARTS: tl.constexpr = BK // STATES_K
    head, part, counter = seat(counters, GROUP)
    n, hv = head // HV, head % HV
    h = hv // (HV // H)
    start, length, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
    begin, end = grid_ends(seen, length, C)
    chunks, left_open = content_chunks(seen, length, CONTENT)
    vc = part * BV + tl.arange(0, BV)
    v_ok = vc < V
    v_at = head.to(tl.int64) * V + vc
    ends_at, ends_ok = state_of(head, vc, K, V, BK)
    dS = tl.load(dS1 + ends_at, mask=ends_ok, other=0.0)
    d_mean = tl.load(dmean1 + v_at, mask=v_ok, other=0.0)
    met = 0
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * SPAN
        row = chunk_row(n, start, chunk, CONTENT).to(tl.int64) * HV + hv
        chunk_at = readouts + row * (V + K)
        shared = d_mean / CONTENT
        if chunk == left_open:
            shared = tl.load(dsum1 + v_at, mask=v_ok, other=0.0)
        else:
            d_mean = tl.zeros((BV,), tl.float32)
        tl.store(d_sum + v_at, shared, mask=v_ok)
        for b in range(part, SPAN, GROUP):
            _, _, leads, pos, ok, _, slot, live = block(
                n * SPAN + b, None, cu, count0, first, SPAN, first, SPAN, T, C, CONTENT, VARLEN
            )
            if live:
                prepare_block(
                    q, k, g, z, e, down, up, chunk_at, W, qE, kZ, P, None, total, pos, ok, leads, slot * HV + hv, None,
                    h, hv, scale, H, HV, K, V, C, BK, EVERY, D, BR, RANK, DECAY, ERASE, CORRECT, STORED, CONTENT, NORM,
                    True, MODE, EXACT, MERGE, FLOOR,
                )  # fmt: skip
        met = meet(counter, met, GROUP)
        dS = scan_back_blocks(
            dS, shared, W, qE, kZ, P, X, total, do, dstates, dnews, tl.maximum(first, begin),
            tl.minimum(first + SPAN, end), n, start, length, seen, base, first, SPAN, h, hv, vc, scale, H, HV, K, V, C,
            BK, BV, True, CORRECT > 0, False, CONTENT, VARLEN, MODE, STAGES,
        )  # fmt: skip
        met = meet(counter, met, GROUP)
        for item in range(part, SPAN * PARTS, GROUP):
            _, _, _, pos, ok, kept, slot, live = block(
                n * SPAN + item // PARTS, None, cu, count0, first, SPAN, first, SPAN, T, C, CONTENT, VARLEN
            )
            if live:
                gradients_of_block(
                    q, k, v, g, z, e, w, None, states, dstates, news, dnews, o, do, d_sum, qE, kZ, W, total, dP, dA,
                    along, dq, dk, dv, dg, dz, de, dw, None, n, pos, ok, kept * HV + hv, slot * HV + hv,
                    item % PARTS * STATES_K, h, hv, scale, H, HV, K, V, C, BK, EVERY, STATES_K, STATES_K, STATES_V,
                    True, False, DECAY, ERASE, CORRECT, WRITE, STORED, CONTENT, NORM, MODE, FLOOR,
                )  # fmt: skip
        met = meet(counter, met, GROUP)
        for b in range(part, SPAN, GROUP):
            _, _, _, pos, ok, kept, slot, live = block(
                n * SPAN + b, None, cu, count0, first, SPAN, first, SPAN, T, C, CONTENT, VARLEN
            )
            du_at = du_blocks + ((n * SPAN + b).to(tl.int64) * HV + hv) * K
            if live:
                gradients_of_block(
                    q, k, v, g, z, e, w, chunk_at + V, states, dstates, news, dnews, o, do, d_sum, qE, kZ, W, total, dP,
                    dA, along, dq, dk, dv, dg, dz, de, dw, du_at, n, pos, ok, kept * HV + hv, slot * HV + hv, 0, h, hv,
                    scale, H, HV, K, V, C, BK, EVERY, BK, PAIRS_K, STATES_V, False, True, DECAY, ERASE, CORRECT, WRITE,
                    STORED, CONTENT, NORM, MODE, FLOOR,
                )  # fmt: skip
            else:
                kc = tl.arange(0, BK)
                tl.store(du_at + kc, tl.zeros((BK,), tl.float32), mask=kc < K)
        met = meet(counter, met, GROUP)
        d_mean += through_readout(
            du_blocks, du_rows + row * K, slopes + row * RANK, down, up, n, hv, vc, HV, K, V, part == 0, SPAN, BK, BR,
            RANK,
        )  # fmt: skip
    tl.store(dS0 + ends_at, dS, mask=ends_ok)
    tl.store(dmean0 + v_at, d_mean, mask=v_ok)
