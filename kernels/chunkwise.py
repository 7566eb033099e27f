"""The chunkwise form of the gated delta rule on tiles, forward and backward, in plain batched PyTorch.

In a tile with state `S` at its start (design of the maths in docs/recurrence.md; P, A and the decays in decays.py)::

    N = (I + A)^-1 (w v - ((e k) exp(G')) S)          one solve shared by all value channels
    O = (q exp(G)) S + P N                            q already scaled
    S <- exp(G_last) S + (k exp(G_last - G))^T N

All that does not read S is done for many tiles at once; only two products a step are serial. With a content gate a
segment is one content chunk, since its gates wait for the outputs of the chunk before; without one it is as many steps
as stay in cache. The backward pass runs the segments in reverse from the states kept at tile starts.

Shapes: M tiles, N sequences, HV value heads, G tiles x HV (of the segment at hand, or of all), C slots in a tile, K key
dim, V value dim, r content rank, L content chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.decays import ChannelDecay, NoDecay, Pairs, ScalarDecay
from hybridzoo.kernels.state import ContentGate
from hybridzoo.kernels.tiles import Tiling
from hybridzoo.kernels.triangular import unit_lower_inverse

# A segment's temporaries are a dozen [G, C, K] tensors; about this many tile-heads keep them in a CPU's caches and
# still amortise the launch of each op.
SEGMENT_TILES = 32


class Operands(NamedTuple):
    """The op's inputs cut into tiles, `[G, C, dim]`, or `[G, C]` for gates with one value a head; None: gate off."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    correct: Tensor | None
    write: Tensor | None


class Carry(NamedTuple):
    """What segments hand on, longest sequence first: `S [N * HV, K, V]`, `o_sum` and `o_mean [N, HV, V]`."""

    S: Tensor
    o_sum: Tensor
    o_mean: Tensor


class Saved(NamedTuple):
    """What the backward pass needs of the forward one."""

    states: Tensor  # [G, K, V] at each tile's start
    news: Tensor  # [G, C, V]: N
    inverse: Tensor  # [G, C, C]: (I + A)^-1; empty without a correction
    means: Tensor  # [chunks, HV, V]: m that each content chunk read, sequences within segments; empty without a gate


class Gradients(NamedTuple):
    """Gradients of `Operands`, of the carry, and of the content gate's pair."""

    operands: Operands
    carry: Carry
    down: Tensor | None
    up: Tensor | None


class _Segment:
    """Steps `first` to `last` of a tiling, with what is known before their states are."""

    def __init__(
        self, x: Operands, tiling: Tiling, steps: range, HV: int, readout: Tensor | None, stored: bool
    ) -> None:
        self.steps = [(tiling.starts[s] * HV, tiling.starts[s + 1] * HV) for s in steps]
        self.all = slice(self.steps[0][0], self.steps[-1][1])
        self.gates = Operands(*(None if part is None else part[self.all] for part in x))  # type: ignore[arg-type]
        self.q, self.k, v = self.gates[:3]
        write, correct = self.gates.write, self.gates.correct
        self.ek = None if correct is None else _wide(correct) * self.k
        self.wv = v if write is None else _wide(write) * v
        self.erase: Tensor | None = None  # z + u
        self.empty: Tensor | None = None  # [G, C]
        if tiling.empty is not None:
            empty = tiling.empty[tiling.starts[steps[0]] : tiling.starts[steps[-1] + 1]]
            self.empty = empty.expand(-1, HV, -1).flatten(0, 1)
        log_D = self.gates.log_decay
        if self.gates.erase is not None:
            self.erase = self.gates.erase
            if readout is not None:
                repeats = len(steps)  # every step of a content chunk holds the same sequences
                self.erase = self.erase + readout.flatten(0, 1).repeat(repeats, 1)[:, None]
            log_D = F.logsigmoid(-self.erase) if log_D is None else _wide(log_D) + F.logsigmoid(-self.erase)
        self.decay = NoDecay()
        if log_D is not None:
            log_D = self.blank(log_D)
            self.decay = ScalarDecay(log_D, stored) if log_D.ndim == 2 else ChannelDecay(log_D, stored)

    def blank(self, x: Tensor) -> Tensor:
        """Zero the slots without a token: `[G, C]` or `[G, C, K]`."""
        if self.empty is None:
            return x
        return x.masked_fill(self.empty if x.ndim == 2 else self.empty[..., None], 0.0)

    def rows(self, start: int, end: int) -> slice:
        """Where a step's tiles lie within the segment."""
        return slice(start - self.all.start, end - self.all.start)


def _wide(gate: Tensor) -> Tensor:
    return gate if gate.ndim == 3 else gate[..., None]


def _segments(tiling: Tiling, content: bool, HV: int) -> Iterator[range]:
    if content:
        for first in range(0, tiling.n_steps, tiling.steps_per_chunk):
            yield range(first, first + tiling.steps_per_chunk)
        return
    first = 0
    for step in range(tiling.n_steps):
        tiles = tiling.starts[step + 1] - tiling.starts[first]
        if tiles * HV >= SEGMENT_TILES or step == tiling.n_steps - 1:
            yield range(first, step + 1)
            first = step + 1


def forward(
    x: Operands, tiling: Tiling, carry: Carry, content: ContentGate | None, stored: bool, saved: Saved | None
) -> Tensor:
    """Run all tiles and return `o [G, C, V]`; `carry` is taken to the end in place, and `saved` filled in if given."""
    S, o_sum, o_mean = carry
    K, V, HV = x.k.shape[2], x.v.shape[2], o_sum.shape[1]
    o = torch.empty_like(x.v)
    mean_row = 0
    for index, steps in enumerate(_segments(tiling, content is not None, HV)):
        readout = None
        if content is not None:
            n = len(tiling.closes[index])
            readout = content_readout(content, o_mean[:n])[1]
            if saved is not None:
                saved.means[mean_row : mean_row + n] = o_mean[:n]
                mean_row += n
        segment = _Segment(x, tiling, steps, HV, readout, stored)
        decay = segment.decay
        pairs = decay.pairs(segment.q, segment.ek, segment.k)
        news, predicted = segment.wv, None
        if segment.ek is not None and pairs.corrections is not None:
            # What the backward pass needs is written where it is kept: copies cost as much as products here.
            keep = (None, None) if saved is None else (saved.inverse[segment.all], saved.news[segment.all])
            inverse = unit_lower_inverse(pairs.corrections, out=keep[0])
            news = torch.bmm(inverse, segment.wv, out=keep[1])
            predicted = torch.bmm(inverse, decay.predicted(segment.ek))
        elif saved is not None:
            saved.news[segment.all] = news
        states = saved.states[segment.all] if saved is not None else x.v.new_empty(len(news), K, V)
        written = decay.to_end(segment.k)
        for step in segment.steps:
            rows = segment.rows(*step)
            running = S[: step[1] - step[0]]
            states[rows] = running
            if predicted is not None:
                news[rows].baddbmm_(predicted[rows], running, alpha=-1)
            if decay.total is not None:
                running.mul_(decay.total[rows])
            running.baddbmm_(written[rows].mT, news[rows])
        out = torch.bmm(decay.from_start(segment.q), states, out=o[segment.all])
        out.baddbmm_(pairs.reads, news)
        if content is not None:
            _roll_mean(out, tiling, index, o_sum, o_mean, content.chunk)
    return o


def _roll_mean(out: Tensor, tiling: Tiling, index: int, o_sum: Tensor, o_mean: Tensor, chunk: int) -> None:
    """Add a chunk's outputs to the sums, and turn the sums of full chunks into means."""
    closes = tiling.closes[index]
    n, (HV, V) = len(closes), o_sum.shape[1:]
    # Slots without a token have a zero query, hence a zero output.
    o_sum[:n] += out.view(tiling.steps_per_chunk, n, HV, -1, V).sum((0, 3))
    full = closes[:, None, None]
    o_mean[:n] = torch.where(full, o_sum[:n] / chunk, o_mean[:n])
    o_sum[:n].masked_fill_(full, 0.0)


def content_readout(content: ContentGate, o_mean: Tensor) -> tuple[Tensor, Tensor]:
    """`U1 m [n, HV, r]` and `u = U2 tanh(U1 m) [n, HV, K]` (CARVE eq. 7)."""
    x = torch.einsum("hrv,nhv->nhr", content.down, o_mean)
    return x, torch.einsum("hkr,nhr->nhk", content.up, torch.tanh(x))


@dataclass
class _ContentGrad:
    """The content gate's share of the backward pass: gradients on their way from gates to the outputs before."""

    content: ContentGate
    o_sum: Tensor  # gradient of the open sum after the segment at hand
    o_mean: Tensor  # gradient of the mean after it
    down: Tensor
    up: Tensor

    def outputs(self, d_out: Tensor, tiling: Tiling, index: int) -> Tensor:
        """Add to a segment's output gradients what its mean or its open sum passes on."""
        closes = tiling.closes[index]
        n, HV, V = len(closes), *self.o_sum.shape[1:]
        full = closes[:, None, None]
        d_sum = torch.where(full, self.o_mean[:n] / self.content.chunk, self.o_sum[:n])
        self.o_sum[:n] = d_sum
        # Where the chunk closed, the mean it read before is another tensor, with no gradient yet.
        self.o_mean[:n].masked_fill_(full, 0.0)
        steps = tiling.steps_per_chunk
        return (d_out.view(steps, n, HV, -1, V) + d_sum[:, :, None]).view(d_out.shape)

    def readout(self, d_erase: Tensor, mean: Tensor, steps: int) -> None:
        """Take the gradient of `z + u` `[G, C, K]` back to the pair and to the mean it was read from."""
        n, HV, _ = mean.shape
        du = d_erase.sum(1).view(steps, n, HV, -1).sum(0)
        x, _ = content_readout(self.content, mean)
        self.up += torch.einsum("nhk,nhr->hkr", du, torch.tanh(x))
        # tanh' as 1 - tanh^2 has no digits left where tanh is near 1.
        d_x = torch.einsum("hkr,nhk->nhr", self.content.up, du) * torch.cosh(x) ** -2
        self.down += torch.einsum("nhr,nhv->hrv", d_x, mean)
        self.o_mean[:n] += torch.einsum("hrv,nhr->nhv", self.content.down, d_x)


def backward(
    x: Operands,
    tiling: Tiling,
    saved: Saved,
    d_o: Tensor,
    d_carry: Carry,
    content: ContentGate | None,
    stored: bool,
) -> Gradients:
    """The gradient of `forward`, given those of `o [G, C, V]` and of the final carry (which is overwritten)."""
    d = Operands(*(None if part is None else torch.empty_like(part) for part in x))  # type: ignore[arg-type]
    dS, d_sum, d_mean = d_carry
    HV = d_sum.shape[1]
    gate = None
    mean_row = sum(len(running) for running in tiling.closes)
    if content is not None:
        gate = _ContentGrad(content, d_sum, d_mean, torch.zeros_like(content.down), torch.zeros_like(content.up))
    segments = list(_segments(tiling, content is not None, HV))
    for index, steps in reversed(list(enumerate(segments))):
        mean = readout = None
        if content is not None:
            mean_row -= len(tiling.closes[index])
            mean = saved.means[mean_row : mean_row + len(tiling.closes[index])]
            readout = content_readout(content, mean)[1]
        segment = _Segment(x, tiling, steps, HV, readout, stored)
        d_out = d_o[segment.all]
        if gate is not None:
            d_out = gate.outputs(d_out, tiling, index)
        d_erase = _segment_backward(segment, saved, d_out, dS, d)
        if gate is not None and mean is not None and d_erase is not None:
            gate.readout(d_erase, mean, len(steps))
    return Gradients(d, d_carry, None if gate is None else gate.down, None if gate is None else gate.up)


def _segment_backward(segment: _Segment, saved: Saved, d_out: Tensor, dS: Tensor, d: Operands) -> Tensor | None:
    """Fill in a segment's part of `d`, take `dS` back to its start, and return the gradient of `z + u`."""
    q, k, ek, decay, rows = segment.q, segment.k, segment.ek, segment.decay, segment.all
    states, news = saved.states[rows], saved.news[rows]
    pairs = decay.pairs(q, ek, k)
    reading, written = decay.from_start(q), decay.to_end(k)
    inverse = predicting = through = None
    if ek is not None:
        inverse = saved.inverse[rows]
        predicting = decay.predicted(ek)
        through = torch.bmm(inverse, predicting)
    d_news = torch.bmm(pairs.reads.mT, d_out)
    d_after = torch.empty_like(states)  # gradient of the state at each tile's end
    for step in reversed(segment.steps):
        at = segment.rows(*step)
        running = dS[: step[1] - step[0]]
        d_after[at] = running
        d_news[at].baddbmm_(written[at], running)
        if decay.total is not None:
            running.mul_(decay.total[at])
        running.baddbmm_(reading[at].mT, d_out[at])
        if through is not None:
            running.baddbmm_(through[at].mT, d_news[at], alpha=-1)

    d_reads = torch.bmm(d_out, news.mT)
    d_reading = torch.bmm(d_out, states.mT)
    d_written = torch.bmm(news, d_after.mT)
    d_wv, d_corrections, d_predicting = d_news, None, None
    if inverse is not None:  # d_wv is the gradient of w v - ((e k) exp(G')) S, which the solve turns into N
        d_wv = torch.bmm(inverse.mT, d_news)
        d_corrections = torch.bmm(d_wv, news.mT).neg_()
        d_predicting = torch.bmm(d_wv, states.mT).neg_()
    grads = decay.pairs_grad(Pairs(d_reads, d_corrections), pairs, q, ek, k)
    torch.add(grads.q, decay.from_start(d_reading), out=d.q[rows])
    dk = torch.add(grads.k, decay.to_end(d_written), out=d.k[rows])
    if ek is not None and grads.ek is not None and d_predicting is not None:
        d_ek = grads.ek + decay.predicted(d_predicting)
        dk += _gate_grad(d_ek, k, segment.gates.correct, d.correct, rows)
    d.v[rows] = _gate_grad(d_wv, segment.gates.v, segment.gates.write, d.write, rows)
    if decay.total is None:
        return None
    d_log_D = decay.log_decay_grad(
        grads.log_decay,
        read=reading * d_reading,
        predicted=None if predicting is None or d_predicting is None else predicting * d_predicting,
        written=written * d_written,
        total=(states * d_after).sum(-1) * decay.total[..., 0],
    )
    return _decay_grad(segment, d_log_D, d, rows)


def _gate_grad(d_product: Tensor, x: Tensor, gate: Tensor | None, d_gate: Tensor | None, rows: slice) -> Tensor:
    """Gradient of `gate * x` for x; writes that of the gate into its place."""
    if gate is None or d_gate is None:
        return d_product
    d_gate[rows] = (d_product * x).sum(-1) if gate.ndim == 2 else d_product * x
    return d_product * _wide(gate)


def _decay_grad(segment: _Segment, d_log_D: Tensor | None, d: Operands, rows: slice) -> Tensor | None:
    if d_log_D is None:
        return None
    if d.log_decay is not None:
        d.log_decay[rows] = d_log_D.sum(-1) if d.log_decay.ndim < d_log_D.ndim else d_log_D
    if d.erase is None or segment.erase is None:
        return None
    d_erase = segment.blank(torch.sigmoid(segment.erase).mul_(d_log_D).neg_())
    d.erase[rows] = d_erase
    return d_erase
