"""The decay between two tokens of a tile, and what it does to products of queries and keys.

Three kinds with one interface: none, one a head, one a key channel. In a tile, `G_i` is the sum of log-decays up to and
with token i, and `G'_i` the exponent of what the correction reads: `G_i` for predict="decayed", `G_{i-1}` for "stored".

Every exponent here is a sum of the log-decays of the tokens between two places, built by adding and never as a
difference of two long sums: weak decays stay exact beside strong ones, no factor exceeds 1, so nothing overflows, and
no floor is needed. The same holds of the gradients, which are sums over the pairs that a token's decay stands between.

Shapes: G tiles x heads, C slots in a tile (a power of two), K key dim, h half a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESET = -1000.0  # exp of it is 0 in float32 and float64; keeps -inf, a full reset, out of sums and products


class Pairs(NamedTuple):
    """Products of the tokens of a tile, and equally the gradients of these."""

    reads: Tensor  # P[i, j] = sum_d q_i exp(G_i - G_j) k_j for j <= i, else 0: [G, C, C]
    corrections: Tensor | None  # A[i, j] = sum_d (e k)_i exp(G'_i - G_j) k_j for j < i, else 0; None: no correction


class PairsGrad(NamedTuple):
    """Gradients of `Pairs` for the factors, and the part of the log-decay's gradient that comes through them."""

    q: Tensor
    ek: Tensor | None
    k: Tensor
    log_decay: Tensor | None


class NoDecay:
    """`D = 1`: pairs are plain masked products. Also what the decays that vary are built on."""

    total: Tensor | None = None  # decay over the whole tile, [G, K or 1, 1]

    def from_start(self, q: Tensor) -> Tensor:
        """`q_i exp(G_i)` `[G, C, K]`, which reads the state at the tile's start."""
        return q

    def predicted(self, ek: Tensor) -> Tensor:
        """`(e k)_i exp(G'_i)` `[G, C, K]`, which predicts from the state at the tile's start."""
        return ek

    def to_end(self, k: Tensor) -> Tensor:
        """`k_i exp(G_last - G_i)` `[G, C, K]`, which writes the state at the tile's end."""
        return k

    def pairs(self, q: Tensor, ek: Tensor | None, k: Tensor) -> Pairs:
        """`P` and `A` of the chunkwise form."""
        return Pairs(torch.bmm(q, k.mT).tril_(), None if ek is None else torch.bmm(ek, k.mT).tril_(-1))

    def pairs_grad(self, d: Pairs, forward: Pairs, q: Tensor, ek: Tensor | None, k: Tensor) -> PairsGrad:
        """The gradient of `pairs`; overwrites `d`, whose upper triangles may hold anything."""
        dP = d.reads.tril_()
        dq, dk = torch.bmm(dP, k), torch.bmm(dP.mT, q)
        if ek is None or d.corrections is None:
            return PairsGrad(dq, None, dk, None)
        dA = d.corrections.tril_(-1)
        return PairsGrad(dq, torch.bmm(dA, k), dk.baddbmm_(dA.mT, ek), None)

    def log_decay_grad(self, pairs: Tensor | None, read: Tensor, predicted: Tensor | None, written: Tensor,
                       total: Tensor) -> Tensor | None:  # fmt: skip
        """The log-decay's gradient.

        Args:
            pairs: its part from `pairs_grad`.
            read, predicted, written: `[G, C, K]`, each scaled factor above times its own gradient.
            total: `[G, K]`, the decay over the tile times its gradient.
        """
        return None


class _VaryingDecay(NoDecay):
    """What both decays that vary do with `start = exp(G_i)` and `to_last = exp(G_last - G_i)`, `[G, C, K or 1]`."""

    def __init__(self, start: Tensor, to_last: Tensor, stored: bool) -> None:
        self.start, self.to_last, self.stored = start, to_last, stored
        self.start_predicted = F.pad(start[:, :-1], (0, 0, 1, 0), value=1.0) if stored else start  # exp(G'_i)
        self.total = start[:, -1, :, None]

    def from_start(self, q: Tensor) -> Tensor:
        return q * self.start

    def predicted(self, ek: Tensor) -> Tensor:
        return ek * self.start_predicted

    def to_end(self, k: Tensor) -> Tensor:
        return k * self.to_last


class ScalarDecay(_VaryingDecay):
    """One log-decay a token and head, `[G, C]`: the pair decays are one `[C, C]` matrix a tile."""

    def __init__(self, log_decay: Tensor, stored: bool) -> None:
        g = log_decay.clamp(min=RESET)
        C = g.shape[-1]
        # Row i of the running sum over rows t of g_t [t > j] is the sum over j < t <= i.
        between = g[..., None].expand(-1, C, C).tril(-1).cumsum(-2)
        self.between = between.exp_().tril_()  # exp(G_i - G_j), 1 on the diagonal
        super().__init__(g.cumsum(-1).exp()[..., None], self.between[:, -1, :, None], stored)

    def _between_predicted(self) -> Tensor:  # exp(G'_i - G_j)
        return F.pad(self.between[:, :-1], (0, 0, 1, 0)) if self.stored else self.between

    def pairs(self, q: Tensor, ek: Tensor | None, k: Tensor) -> Pairs:
        reads = torch.bmm(q, k.mT).mul_(self.between)
        if ek is None:
            return Pairs(reads, None)
        return Pairs(reads, torch.bmm(ek, k.mT).mul_(self._between_predicted()).tril_(-1))

    def pairs_grad(self, d: Pairs, forward: Pairs, q: Tensor, ek: Tensor | None, k: Tensor) -> PairsGrad:
        through = (d.reads * forward.reads).tril_(-1)  # exponents G_i - G_j, i row, j column
        dP = d.reads.mul_(self.between)
        dq, dk, dek = torch.bmm(dP, k), torch.bmm(dP.mT, q), None
        if ek is not None and d.corrections is not None and forward.corrections is not None:
            corrected = d.corrections * forward.corrections
            if self.stored:  # exponent G_{i-1} - G_j: the same as a read one row up
                through[:, :-1].add_(corrected[:, 1:].tril_(0))
            else:
                through.add_(corrected)
            dA = d.corrections.mul_(self._between_predicted()).tril_(-1)
            dek = torch.bmm(dA, k)
            dk.baddbmm_(dA.mT, ek)
        # Token t stands between j and i when j < t <= i.
        C = through.shape[-1]
        later = torch.ones(C, C, dtype=through.dtype, device=through.device).triu()
        return PairsGrad(dq, dek, dk, torch.matmul(later, through).tril_(-1).sum(-1))

    def log_decay_grad(self, pairs: Tensor | None, read: Tensor, predicted: Tensor | None, written: Tensor,
                       total: Tensor) -> Tensor | None:  # fmt: skip
        sums = None if predicted is None else predicted.sum(-1)
        return _spread(pairs, read.sum(-1), sums, written.sum(-1), total.sum(-1, keepdim=True), self.stored)


class _Level(NamedTuple):
    """Pairs that a block's middle separates: i in its second half, j in its first. Views `[G, blocks, h, K]`."""

    h: int
    from_middle: Tensor  # exp(G_i - G_middle)
    from_middle_predicted: Tensor  # exp(G'_i - G_middle)
    to_middle: Tensor  # exp(G_middle - G_j)


class ChannelDecay(_VaryingDecay):
    """One log-decay a token and key channel, `[G, C, K]`.

    Pairs are split by the smallest aligned block of 2, 4, ..., C tokens that holds both: its middle lies between them,
    so `exp(G_i - G_j) = exp(G_i - G_middle) exp(G_middle - G_j)` with both factors at most 1, and each level is one
    matrix product a block. No `[C, C, K]` tensor is formed.
    """

    def __init__(self, log_decay: Tensor, stored: bool) -> None:
        self.log_decay = log_decay.clamp(min=RESET)
        to_last = _later(self.log_decay, 1, inclusive=False).exp_()
        super().__init__(self.log_decay.cumsum(1).exp(), to_last, stored)

    def _levels(self) -> Iterator[_Level]:
        # Sums within a token's own block, which doubles at each level: a half gains the other half's whole.
        upto = self.log_decay.clone()  # the block's start up to and with the token
        before = torch.zeros_like(upto) if self.stored else upto  # the same without the token
        after = torch.zeros_like(upto)  # the tokens after it, to the block's end
        G, C, K = upto.shape
        h = 1
        while h < C:
            upto_, before_, after_ = (x.view(G, -1, 2, h, K) for x in (upto, before, after))
            from_middle = upto_[:, :, 1].exp()
            from_middle_predicted = before_[:, :, 1].exp() if self.stored else from_middle
            yield _Level(h, from_middle, from_middle_predicted, after_[:, :, 0].exp())
            after_[:, :, 0] += upto_[:, :, 1, -1:]
            if self.stored:
                before_[:, :, 1] += upto_[:, :, 0, -1:]
            upto_[:, :, 1] += upto_[:, :, 0, -1:]
            h *= 2

    def pairs(self, q: Tensor, ek: Tensor | None, k: Tensor) -> Pairs:
        G, C, _ = q.shape
        reads = q.new_zeros(G, C, C)
        reads.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        corrections = None if ek is None else q.new_zeros(G, C, C)
        for level in self._levels():
            left, right = _factors(level, q, ek, k)
            scores = torch.matmul(left, right.mT)
            _corner(reads, level.h).copy_(scores[:, :, : level.h])
            if corrections is not None:
                _corner(corrections, level.h).copy_(scores[:, :, level.h :])
        return Pairs(reads, corrections)

    def pairs_grad(self, d: Pairs, forward: Pairs, q: Tensor, ek: Tensor | None, k: Tensor) -> PairsGrad:
        diagonal = d.reads.diagonal(dim1=1, dim2=2)[..., None]
        dq, dk, dg = diagonal * k, diagonal * q, torch.zeros_like(q)
        dek = None if ek is None else torch.zeros_like(ek)
        for level in self._levels():
            h = level.h
            left, right = _factors(level, q, ek, k)
            corners = [_corner(x, h) for x in d if x is not None]
            scores = torch.cat(corners, dim=2) if len(corners) > 1 else corners[0]
            d_left, d_right = torch.matmul(scores, right), torch.matmul(scores.mT, left)
            q_part = d_left[:, :, :h] * level.from_middle
            k_part = d_right * level.to_middle
            _half(dq, h, 1).add_(q_part)
            _half(dk, h, 0).add_(k_part)
            # A log-decay in the second half stands between the middle and what follows it there; in the first half,
            # between the middle and what precedes it.
            followed = q_part.mul_(_half(q, h, 1))
            preceded = k_part.mul_(_half(k, h, 0))
            _half(dg, h, 0).add_(_earlier(preceded, dim=2))
            if ek is not None and dek is not None:
                ek_part = d_left[:, :, h:] * level.from_middle_predicted
                _half(dek, h, 1).add_(ek_part)
                ek_part.mul_(_half(ek, h, 1))
                if self.stored:
                    _half(dg, h, 1).add_(_later(ek_part, dim=2, inclusive=False))
                else:
                    followed.add_(ek_part)
            _half(dg, h, 1).add_(_later(followed, dim=2))
        return PairsGrad(dq, dek, dk, dg)

    def log_decay_grad(self, pairs: Tensor | None, read: Tensor, predicted: Tensor | None, written: Tensor,
                       total: Tensor) -> Tensor | None:  # fmt: skip
        return _spread(pairs, read, predicted, written, total[:, None], self.stored)


def _half(x: Tensor, h: int, which: int) -> Tensor:
    """The first or second halves of the blocks of 2h tokens: a view `[G, blocks, h, K]` of `[G, C, K]`."""
    return x.view(x.shape[0], -1, 2, h, x.shape[2])[:, :, which]


def _corner(x: Tensor, h: int) -> Tensor:
    """Rows of the second, columns of the first half of each block of 2h: a view `[G, blocks, h, h]` of `[G, C, C]`."""
    G, C, _ = x.shape
    blocks = x.view(G, C // (2 * h), 2 * h, C // (2 * h), 2 * h).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1)[:, :, h:, :h]


def _factors(level: _Level, q: Tensor, ek: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (over corrected keys) and keys of a level, each with its decay to the middle."""
    left = _half(q, level.h, 1) * level.from_middle
    if ek is not None:
        left = torch.cat([left, _half(ek, level.h, 1) * level.from_middle_predicted], dim=2)
    return left, _half(k, level.h, 0) * level.to_middle


def _later(x: Tensor, dim: int, inclusive: bool = True) -> Tensor:
    """For each place along `dim`, the sum over it and what follows, or over what follows alone."""
    sums = x.flip(dim).cumsum(dim).flip(dim)
    return sums if inclusive else torch.cat([sums.narrow(dim, 1, x.shape[dim] - 1), _no(x, dim)], dim)


def _earlier(x: Tensor, dim: int) -> Tensor:
    """For each place along `dim`, the sum over what precedes it."""
    return torch.cat([_no(x, dim), x.narrow(dim, 0, x.shape[dim] - 1).cumsum(dim)], dim)


def _no(x: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(x.narrow(dim, 0, 1))


def _spread(
    pairs: Tensor | None, read: Tensor, predicted: Tensor | None, written: Tensor, total: Tensor, stored: bool
) -> Tensor:
    """Gather a token's log-decay gradient from every factor that its decay is part of (tokens along dim 1)."""
    dg = _earlier(written, 1) + total
    if pairs is not None:
        dg += pairs
    if predicted is not None and stored:
        dg += _later(predicted, 1, inclusive=False)
    elif predicted is not None:
        read = read + predicted
    return dg.add_(_later(read, 1))
