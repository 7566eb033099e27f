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

from hybridzoo.kernels.fused.tile import exponential, wide


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


@triton.jit
def snapped(x, MODE: tl.constexpr):
    """`x` at the nearest multiple of log 2: what lies between two such references is a power of two, which rounding
    does not see. So a rounded factor is the same in all products, and what is to cancel does."""
    if MODE == "ieee":
        return x
    else:
        return tl.floor(x * 1.4426950408889634 + 0.5) * 0.6931471805599453


@triton.jit
def channel_factors(log_D, EXCLUSIVE: tl.constexpr, MODE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The factors of a channel decay `log_D [C, D]`, whose exponents are sums from or to the fourth of each eight.

    Returns: the sums at each eight's fourth and last token, about, `ref` and `end [C / 8, D]`; `exp(G - ref)`, its
    inverse, and the correction's `exp(G' - ref)`, `G'` exclusive or not; the whole block's sum `[D]`; `exp(ref)` and
    `exp(G_last - ref)`. All without a note `[C, D]`.
    """
    log_D = wide(log_D, MODE)
    G = tl.cumsum(log_D, 0)
    ref = snapped(eighth(G, 3, C, D), MODE)
    end = snapped(eighth(G, 7, C, D), MODE)
    x = G - spread(ref, C, D)
    a = exponential(x, MODE)
    ax = a
    if EXCLUSIVE:
        ax = exponential(G - log_D - spread(ref, C, D), MODE)
    last = tl.sum(log_D, 0)
    up = spread(exponential(ref, MODE), C, D)
    down = spread(exponential(last[None, :] - ref, MODE), C, D)
    return ref, end, a, exponential(-x, MODE), ax, last, up, down


@triton.jit
def scalar_factors(log_D, EXCLUSIVE: tl.constexpr, MODE: tl.constexpr, C: tl.constexpr):
    """The factors of a scalar decay `log_D [C]`.

    Returns: the whole block's sum; `exp(G)`, `exp(G')` and `exp(G_last - G)`, `[C, 1]`; `exp(G_i - G_j)` and
    `exp(G'_i - G_j)`, of use for pairs in which i is the later token, `[C, C]`.
    """
    log_D = wide(log_D, MODE)
    G = tl.cumsum(log_D, 0)
    Gx = G
    if EXCLUSIVE:
        Gx = G - log_D
    last = tl.sum(log_D, 0)
    up = exponential(G, MODE)[:, None]
    ux = exponential(Gx, MODE)[:, None]
    down = exponential(tl.minimum(last - G, 0.0), MODE)[:, None]
    pairs = exponential(tl.minimum(G[:, None] - G[None, :], 0.0), MODE)
    corrected = exponential(tl.minimum(Gx[:, None] - G[None, :], 0.0), MODE)
    return last, up, ux, down, pairs, corrected
