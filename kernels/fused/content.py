"""Both passes with a content gate, each in one launch: a group of programs takes a head from chunk to chunk.

What decays a content chunk has is known once the outputs of the chunk before are: chunks wait for each other, but only
those of one sequence and head. A group of programs therefore goes through all chunks of its head, and does in each what
launches do without a content gate. Forward its blocks are prepared, one by each program, and the state goes through
them, some of the value channels in each program. Backward, where all blocks of a window are prepared before, the
state's gradient goes through them, and all other gradients follow in two steps. After every step the group meets, but
between those two where a block is one program's; nobody else waits.

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
from hybridzoo.kernels.fused.places import begun, block_at, chunk_row, content_chunks, grid_ends, sequence, state_of
from hybridzoo.kernels.fused.prepare import prepare_block
from hybridzoo.kernels.fused.scan import scan_blocks
from hybridzoo.kernels.fused.scan_back import scan_back_blocks

# Numbers from one group's counter to the next, so that no two are in one line of the cache.
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


# The two that follow are functions to the GPU as well: inlined, what the compiler takes out of the loop over chunks
# would fill the registers that they work with. Such a function takes scalars and pointers.
@triton.jit(noinline=True)
def prepare_one(
    q, k, g, z, e, down, up, chunk_at, cu, count0, W, qE, kZ, P, X, total, n, at, first, T, h, hv, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, STORED: tl.constexpr, CONTENT: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, SAVE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    MERGE: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Prepare block `at` of sequence `n`, of the chunk whose first block is `first`."""
    leads, pos, ok, kept, slot, live = block_at(
        n, at, cu, count0, first, first, CONTENT // C, T, C, CONTENT, VARLEN, False
    )
    if live:
        prepare_block(
            q, k, g, z, e, down, up, chunk_at, W, qE, kZ, P, X, total, pos, ok, leads, slot * HV + hv,
            (kept if SAVE else slot) * HV + hv, h, hv, scale, H, HV, K, V, C, BK, EVERY, D, BR, RANK, DECAY, ERASE,
            CORRECT, STORED, CONTENT, NORM, False, MODE, EXACT, MERGE, FLOOR,
        )  # fmt: skip


@triton.jit(noinline=True)
def gradients_of_one(
    q, k, v, g, z, e, w, readout_at, cu, count0, states, dstates, news, dnews, o, do, d_sum, d_qE, d_kZ, d_eE, d_total,
    dP, dA, along, dq, dk, dv, dg, dz, de, dw, du_at, n, at, begin, origin, span, T, h, hv, scale, H, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, EVERY: tl.constexpr, MINE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    STATES: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr,
    STORED: tl.constexpr, CONTENT: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """The step of STATES, or that of pairs, of block `at` of sequence `n` and MINE key channels from `begin` on."""
    _, pos, ok, kept, slot, live = block_at(n, at, cu, count0, 0, origin, span, T, C, CONTENT, VARLEN, VARLEN)
    if live:
        gradients_of_block(
            q, k, v, g, z, e, w, readout_at, states, dstates, news, dnews, o, do, d_sum, d_qE, d_kZ, d_eE, d_total, dP,
            dA, along, dq, dk, dv, dg, dz, de, dw, du_at, n, pos, ok, kept * HV + hv, slot * HV + hv, begin, h, hv,
            scale, H, HV, K, V, C, BK, EVERY, MINE, D, DV, STATES, not STATES, DECAY, ERASE, CORRECT, WRITE, STORED,
            CONTENT, NORM, MODE, FLOOR,
        )  # fmt: skip
    elif not STATES:
        kc = begin + tl.arange(0, MINE)
        tl.store(du_at + kc, tl.zeros((MINE,), tl.float32), mask=kc < K)


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
    S, o_sum, mean = begun(S0, ends_at, ends_ok), begun(sum0, v_at, v_ok), begun(mean0, v_at, v_ok)
    met = 0
    for chunk in range(chunks):
        first = chunk * SPAN
        chunk_at = readouts + (chunk_row(n, start, chunk, CONTENT).to(tl.int64) * HV + hv) * (V + K + 2 * RANK)
        tl.store(chunk_at + vc, mean, mask=v_ok)
        met = meet(counter, met, GROUP)
        for b in range(part, SPAN, GROUP):
            prepare_one(
                q, k, g, z, e, down, up, chunk_at, cu, count0, W, qE, kZ, P, X, total, n, first + b, first, T, h, hv,
                scale, H, HV, K, V, C, BK, EVERY, D, BR, RANK, DECAY, ERASE, CORRECT, STORED, CONTENT, NORM, VARLEN,
                SAVE, MODE, EXACT, MERGE, FLOOR,
            )  # fmt: skip
        met = meet(counter, met, GROUP)
        S, here = scan_blocks(
            S, v, w, W, qE, kZ, P, X, total, o, states, news, tl.maximum(first, begin), tl.minimum(first + SPAN, end),
            n, start, length, seen, base, first, SPAN, h, hv, vc, scale, H, HV, K, V, C, BK, BV, True, CORRECT > 0,
            WRITE, False, CONTENT, False, SAVE, MODE, STAGES,
        )  # fmt: skip
        o_sum += here
        if seen + length >= (chunk + 1) * CONTENT:
            mean = o_sum / CONTENT
            o_sum = tl.zeros((BV,), tl.float32)
    if S1 is not None:
        tl.store(S1 + ends_at, S, mask=ends_ok)
        tl.store(sum1 + v_at, o_sum, mask=v_ok)
        tl.store(mean1 + v_at, mean, mask=v_ok)


@triton.jit
def through_readout(du_blocks, du_row, hidden_at, down, up, n, hv, vc, HV, K, V, leads, SPAN: tl.constexpr,
                    BK: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """The gradient `[BV]` of the mean that a chunk read, from those of its readout that its blocks left.

    The program that `leads` stores what the content pair's gradients are made of: the readout's and the hidden's.
    """
    kc, rc = tl.arange(0, BK), tl.arange(0, BR)
    k_ok, r_ok = kc < K, rc < RANK
    du = tl.zeros((BK,), tl.float32)
    for b in range(SPAN):
        du += tl.load(du_blocks + ((n * SPAN + b).to(tl.int64) * HV + hv) * K + kc, mask=k_ok, other=0.0)
    U2 = tl.load(up + (hv * K + kc[:, None]) * RANK + rc[None, :], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
    U1_ok = r_ok[:, None] & (vc < V)[None, :]
    U1 = tl.load(down + (hv * RANK + rc[:, None]) * V + vc[None, :], mask=U1_ok, other=0.0)
    d_hidden = tl.sum(U2 * du[:, None], 0) * tl.load(hidden_at + RANK + rc, mask=r_ok, other=0.0)
    if leads:
        tl.store(du_row + kc, du, mask=k_ok)
        tl.store(du_row + K + rc, d_hidden, mask=r_ok)
    return tl.sum(U1 * d_hidden[:, None], 0)


@triton.jit(do_not_specialize=["T", "first", "count", "later"])  # a new length compiles nothing
def backward_kernel(
    q, k, v, g, z, e, w, down, up, cu, count0, W, qE, kZ, P, X, total, counters, states, news, readouts, o, do,
    dS1, dsum1, dmean1, dstates, dnews, dP, dA, along, dq, dk, dv, dg, dz, de, dw, du_blocks, du_rows, dS0, d_sum,
    dmean0, T, first, count, later, scale, H, HV, K, V,
    GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr,
    STATES_K: tl.constexpr, STATES_V: tl.constexpr, PAIRS_K: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, CORRECT: tl.constexpr, WRITE: tl.constexpr, STORED: tl.constexpr,
    CONTENT: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MODE: tl.constexpr, FLOOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """GROUP programs a sequence and value head, each with BV of the EVERY value channels, over prepared blocks.

    The gradient of a mean reaches the outputs of the chunk whose mean it is, and the sum that the chunk began with.
    What the window before needs is left in dS0 and dmean0, where it finds it (`later`: one after this has been there).
    """
    SPAN: tl.constexpr = CONTENT // C
    PARTS: tl.constexpr = BK // STATES_K
    head, part, counter = seat(counters, GROUP)
    n, hv = head // HV, head % HV
    h = hv // (HV // H)
    start, length, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
    begin, end = grid_ends(seen, length, C)
    chunks, left_open = content_chunks(seen, length, CONTENT)
    low, high = first // SPAN, tl.minimum(chunks, (first + count) // SPAN)
    vc = part * BV + tl.arange(0, BV)
    v_ok = vc < V
    v_at = head.to(tl.int64) * V + vc
    ends_at, ends_ok = state_of(head, vc, K, V, BK)
    if later:
        dS, d_mean = tl.load(dS0 + ends_at, mask=ends_ok, other=0.0), tl.load(dmean0 + v_at, mask=v_ok, other=0.0)
    else:
        dS, d_mean = begun(dS1, ends_at, ends_ok), begun(dmean1, v_at, v_ok)
    met = 0
    for back in range(low, high):
        chunk = low + high - 1 - back
        at = chunk * SPAN
        row = chunk_row(n, start, chunk, CONTENT).to(tl.int64) * HV + hv
        chunk_at = readouts + row * (V + K + 2 * RANK)
        shared = d_mean / CONTENT
        if chunk == left_open:
            shared = begun(dsum1, v_at, v_ok)
        else:
            d_mean = tl.zeros((BV,), tl.float32)
        tl.store(d_sum + v_at, shared, mask=v_ok)
        dS = scan_back_blocks(
            dS, shared, W, qE, kZ, P, X, total, do, dstates, dnews, tl.maximum(at, begin), tl.minimum(at + SPAN, end),
            n, start, length, seen, base, first, count, h, hv, vc, scale, H, HV, K, V, C, BK, BV, True, CORRECT > 0,
            False, CONTENT, VARLEN, MODE, STAGES,
        )  # fmt: skip
        met = meet(counter, met, GROUP)
        for item in range(part, SPAN * PARTS, GROUP):
            gradients_of_one(
                q, k, v, g, z, e, w, None, cu, count0, states, dstates, news, dnews, o, do, d_sum, qE, kZ, W, total, dP,
                dA, along, dq, dk, dv, dg, dz, de, dw, None, n, at + item // PARTS, item % PARTS * STATES_K, first,
                count, T, h, hv, scale, H, HV, K, V, C, BK, EVERY, STATES_K, STATES_K, STATES_V, True, DECAY, ERASE,
                CORRECT, WRITE, STORED, CONTENT, NORM, VARLEN, MODE, FLOOR,
            )  # fmt: skip
        if PARTS == 1:  # each program goes on with its own blocks
            tl.debug_barrier()
        else:
            met = meet(counter, met, GROUP)
        for item in range(part, SPAN * PARTS, GROUP):
            b = item // PARTS
            du_at = du_blocks + ((n * SPAN + b).to(tl.int64) * HV + hv) * K
            gradients_of_one(
                q, k, v, g, z, e, w, chunk_at + V, cu, count0, states, dstates, news, dnews, o, do, d_sum, qE, kZ, W,
                total, dP, dA, along, dq, dk, dv, dg, dz, de, dw, du_at, n, at + b, item % PARTS * STATES_K, first,
                count, T, h, hv, scale, H, HV, K, V, C, BK, EVERY, STATES_K, PAIRS_K, STATES_V, False, DECAY, ERASE,
                CORRECT, WRITE, STORED, CONTENT, NORM, VARLEN, MODE, FLOOR,
            )  # fmt: skip
        met = meet(counter, met, GROUP)
        d_mean += through_readout(
            du_blocks, du_rows + row * (K + RANK), chunk_at + V + K, down, up, n, hv, vc, HV, K, V, part == 0, SPAN, BK,
            BR, RANK,
        )  # fmt: skip
    tl.store(dS0 + ends_at, dS, mask=ends_ok)
    tl.store(dmean0 + v_at, d_mean, mask=v_ok)
