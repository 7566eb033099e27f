"""Which block of tokens a program takes: where its tokens are, what is kept of it, and where its scratch memory is.

A sequence is cut into blocks on its own grid. With a content gate the grid goes on from the calls before: `seen` tokens
of the open chunk come before the first token, so the first block may be short, as the last may always be. A launch
takes a window: `count` blocks of every sequence from block `first` on.

Device functions only.

Shapes: C slots in a block, T tokens of a row, N sequences, L content chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(cu, count0, n, T, C: tl.constexpr, CONTENT: tl.constexpr, VARLEN: tl.constexpr):
    """Sequence `n`: its first token in the row of all, its length, tokens seen, and its first block of what is kept."""
    seen = 0
    spare = 1 if CONTENT > 0 else 0  # the grid of content chunks may cut off a first block as well
    if CONTENT > 0 and count0 is not None:
        seen = tl.load(count0 + n)
    if VARLEN:
        start = tl.load(cu + n).to(tl.int32)
        length = tl.load(cu + n + 1).to(tl.int32) - start
        base = start // C + n * (1 + spare)  # a bound on the blocks before: the last of each sequence may be open
    else:
        start, length = n * T, T
        base = n * (tl.cdiv(T, C) + spare)
    return start, length, seen, base


@triton.jit
def grid_ends(seen, length, C: tl.constexpr):
    """The first block of a sequence's grid that has a token of this call, and the first after those."""
    begin = seen // C
    return begin, tl.where(length > 0, tl.cdiv(seen + length, C), begin)


@triton.jit
def scratch_slot(n, at, base, begin, origin, span, WHOLE: tl.constexpr):
    """Where block `at` of sequence `n` is in scratch memory, which holds `span` blocks of each from `origin` on.

    Where how many blocks a sequence has is data, it holds all of them (WHOLE), numbered as they are kept.
    """
    if WHOLE:
        return base + at - begin
    else:
        return n * span + at - origin


@triton.jit
def slots_of(at, length, seen, C: tl.constexpr):
    """The slots of a sequence's block `at`: which of its tokens they are, `[C]`, and whether there are such."""
    place = at * C - seen + tl.arange(0, C)
    return place, (place >= 0) & (place < length)


@triton.jit
def rows_of(at, row, start, length, seen, h, H, PLAIN: tl.constexpr, C: tl.constexpr):
    """Block `at` of a sequence: its tokens' places `[C]` and which are tokens; rows of its queries and keys, and which.

    Those are scratch memory's, `row`; with PLAIN the call's own.
    """
    place, ok = slots_of(at, length, seen, C)
    key_row, key_ok = row, tl.arange(0, C) >= 0
    if PLAIN:
        key_row, key_ok = (start + place).to(tl.int64) * H + h, ok
    return place, ok, key_row, key_ok


@triton.jit
def block_at(n, at, cu, count0, first, origin, span, T, C: tl.constexpr, CONTENT: tl.constexpr, VARLEN: tl.constexpr,
             WHOLE: tl.constexpr):  # fmt: skip
    """Block `at` of sequence `n`: positions `[C]` and which are tokens; its slots; any token?

    Returns `leads, pos, ok, kept, slot, live`: whether it is the first with a token from block `first` on, `pos` in the
    row of all tokens, `kept` and `slot` the block's place in what is kept for the backward pass and in scratch
    memory. Without a token (`live` false) `kept` has no meaning.
    """
    start, length, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
    begin, end = grid_ends(seen, length, C)
    place, ok = slots_of(at, length, seen, C)
    kept = (base + at - begin).to(tl.int64)
    slot = scratch_slot(n, at, base, begin, origin, span, WHOLE).to(tl.int64)
    leads, live = at == tl.maximum(first, begin), (at >= begin) & (at < end)
    return leads, start + place, ok, kept, slot, live


@triton.jit
def block(program, owners, cu, count0, first, count, T, C: tl.constexpr, CONTENT: tl.constexpr,
          VARLEN: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Block number `program` of a window, or of all (WHOLE): its sequence, its number there, and what block_at says."""
    if WHOLE:
        n = tl.load(owners + program)
        _, _, seen, base = sequence(cu, count0, n, T, C, CONTENT, VARLEN)
        at = program - base + seen // C
    else:
        n = program // count
        at = first + program % count
    leads, pos, ok, kept, slot, live = block_at(n, at, cu, count0, first, first, count, T, C, CONTENT, VARLEN, WHOLE)
    return n, at, leads, pos, ok, kept, slot, live


@triton.jit
def state_of(head, vc, K, V, BK: tl.constexpr):
    """Where the value channels `vc` of a head's `S [K, V]` are, as `S^T [vc, BK]`, and which are channels."""
    kc = tl.arange(0, BK)
    at = head.to(tl.int64) * K * V + kc[None, :] * V + vc[:, None]
    return at, (vc < V)[:, None] & (kc < K)[None, :]


@triton.jit
def begun(start, at, ok):
    """What a state or its gradient `start` is at the places `at`: zeros for a fresh one, which is None."""
    if start is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(start + at, mask=ok, other=0.0)


@triton.jit
def content_chunks(seen, length, CONTENT: tl.constexpr):
    """How many content chunks a sequence has tokens in, at least one; and the number of the one left open."""
    return tl.maximum(1, tl.cdiv(seen + length, CONTENT)), (seen + length) // CONTENT


@triton.jit
def chunk_row(n, start, chunk, CONTENT: tl.constexpr):
    """The row of what a sequence's content chunk reads: as many before as chunks can have begun there."""
    return start // CONTENT + 2 * n + chunk
