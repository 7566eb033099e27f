"""Pairs within a block of tokens under a channel decay, where every pair has a reference near it.

Two tokens of one eight refer to its fourth token. Others refer to the middle of the least aligned span of 16 or 32
tokens that holds both, which lies between them: then both factors are at most 1, whatever the decay. All are made of
`exp(G - G_fourth)` and its inverse, times one number an eight and channel.

Device functions only. Every name in capitals is a `constexpr`.

Shapes: C slots in a block (16 or 32), D key channels, T tokens, N sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.fused.tile import exponential


@triton.jit
def place(table, block, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Where a block begins in the row of all tokens, and how many it holds."""
    if VARLEN:
        start = tl.load(table + 2 * block)
        length = tl.load(table + 2 * block + 1)
    else:
        blocks = tl.cdiv(T, C)
        at = (block % blocks) * C
        start = (block // blocks) * T + at
        length = tl.minimum(C, T - at)
    return start, length


@triton.jit
def sequence(cu, n, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Where sequence `n` begins in the row of all tokens, how many it has, and which its first block is."""
    if VARLEN:
        start = tl.load(cu + n)
        length = tl.load(cu + n + 1) - start
        block = start // C + n  # a bound on the blocks before: the last of each sequence may be open
    else:
        start, length = n * T, T
        block = n * tl.cdiv(T, C)
    return start, length, block


@triton.jit
def spread(x, C: tl.constexpr, D: tl.constexpr):
    """`x [C / 8, D]` at each of its eight tokens: `[C, D]`."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], (C // 8, 8, D)), (C, D))


@triton.jit
def eighth(G, AT: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Token AT of every eight: `[C / 8, D]`."""
    at = tl.arange(0, 8)[None, :, None]
    return tl.sum(tl.where(at == AT, tl.reshape(G, (C // 8, 8, D)), 0.0), 1)


@triton.jit
def middle(end, SPAN: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The running sum at the middle of every SPAN tokens, given that at the end of every eight `[C / 8, D]`."""
    M: tl.constexpr = SPAN // 8
    at = tl.arange(0, M)[None, :, None]
    x = tl.sum(tl.where(at == M // 2 - 1, tl.reshape(end, (C // SPAN, M, D)), 0.0), 1)
    return tl.reshape(tl.broadcast_to(x[:, None, :], (C // SPAN, M, D)), (C // 8, D))


@triton.jit
def far_factors(ref, end, SPAN: tl.constexpr, MODE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """What turns factors of eights into those of SPAN: rows of its second half, columns of its first; 0 elsewhere."""
    second = (tl.arange(0, C // 8) % (SPAN // 8) >= SPAN // 16)[:, None]
    m = middle(end, SPAN, C, D)
    row = tl.where(second, exponential(tl.minimum(ref - m, 0.0), MODE), 0.0)
    column = tl.where(second, 0.0, exponential(tl.minimum(m - ref, 0.0), MODE))
    return spread(row, C, D), spread(column, C, D)
