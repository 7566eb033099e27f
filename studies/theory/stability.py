"""Stability: how fast the state contracts, against the claimed ratio (1 - b_min) g_min a token, and where it grows.

Without writes a state is carried by products of transition matrices, `A = (I - k (e k)^T) D` where the correction reads
the decayed state and `A = D - k (e k)^T` where it reads the stored one. For keys of unit length and one `e` a token,
two bounds hold (both are checked here against the matrices themselves):

    decayed, 0 <= e <= 2:   |A| <= max D              since |I - e k k^T| <= 1
    stored,  0 <= e <= 1:   |A| <= max(max D, e - min D)   since A is symmetric, x^T A x >= min D - e

The claimed ratio takes the smallest decay factor of all channels; the largest decides. Shapes: T time, K key dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, Tokens, growth, kept, run, started_tokens, transitions, unit_keys
from hybridzoo.studies.theory.trained import frozen_gates, trained_tokens

SLACK = 1e-9  # rounding in float64, relative


class Row(NamedTuple):
    """One kind of gates under one rule: claimed ratio, bound, and what the matrices do."""

    gates: str
    predict: str
    claimed_ratio: float
    bound: float
    worst_step: float
    growth_a_token: float
    largest_state: float
    final_state: float


class Extreme(NamedTuple):
    """The largest growth a token that a search over keys and gates found."""

    correct: str
    largest_e: float
    predict: str
    period: int
    growth_a_token: float


def claimed_ratio(tokens: Tokens) -> float:
    """Return (1 - b_min) g_min, both over all tokens and channels."""
    decay = 1.0 if tokens.log_decay is None else float(tokens.log_decay.min().exp())
    erase = 0.0 if tokens.erase_logits is None else float(torch.sigmoid(tokens.erase_logits).min())
    return (1 - erase) * decay


def step_bound(D: Tensor, e: Tensor, predict: str) -> Tensor:
    """Return the bound on |A| for keys of unit length and one `e` a token; `D [..., K]`, `e [...]`."""
    if predict == "decayed":
        return D.amax(-1)
    return torch.maximum(D.amax(-1), e - D.amin(-1))


def probe(settings: Settings) -> Result:
    """Measure steps, growth and states under the gates of a start, of training, at random, and at their worst."""
    generator = torch.Generator().manual_seed(settings.seed)
    T, K, V = settings.pick((24, 4, 4), (256, 16, 16), (1024, 32, 32))
    batch = settings.pick(2, 8)
    rows, states = [], []
    for name, tokens in _gates(settings, batch, T, K, V, generator):
        for predict in ("decayed", "stored"):
            row, norms = measure(name, tokens, predict, generator)
            rows.append(row)
            states.append(norms)
    extremes = search(settings, generator)
    broken = [row for row in rows if row.worst_step > row.claimed_ratio * (1 + SLACK)]
    slower = max(rows, key=lambda row: row.growth_a_token - row.claimed_ratio)
    repeated = next(row for row in rows if row.gates.startswith("repeated") and row.predict == "stored")
    decayed_ok = all(r.worst_step <= r.bound * (1 + SLACK) for r in rows if r.predict == "decayed")
    stored_ok = all(r.worst_step <= r.bound * (1 + SLACK) for r in rows if r.predict == "stored")
    as_gdn2 = [x for x in extremes if (x.correct, x.largest_e, x.predict) == ("channel", 1, "decayed")]
    channel = max(as_gdn2, key=lambda x: x.growth_a_token)
    doubled = max((x for x in extremes if x.predict == "stored" and x.largest_e == 2), key=lambda x: x.growth_a_token)
    scalar = [x for x in extremes if x.correct == "scalar" and not (x.predict == "stored" and x.largest_e == 2)]
    worst_scalar = max(x.growth_a_token for x in scalar)
    statements = (
        Statement(
            "Every token shrinks the state by the ratio (1 - b_min) g_min at least.",
            FAILS if broken else HOLDS,
            f"{len(broken)} of {len(rows)} settings have a step above it; furthest in the long run: {slower.gates}, "
            f"{slower.predict}: {slower.growth_a_token:.3f} a token, {slower.claimed_ratio:.3g} claimed",
        ),
        Statement(
            "With predict=decayed, unit keys and one e <= 2 a token, no step is above the largest of (1 - b) g (ours).",
            HOLDS if decayed_ok else FAILS,
            f"largest step over its bound: {_over(rows, 'decayed'):.6f}",
        ),
        Statement(
            "With predict=stored and e <= 1, no step is above max(max D, e - min D) <= 1 (ours).",
            HOLDS if stored_ok else FAILS,
            f"largest step over its bound: {_over(rows, 'stored'):.6f}; under a repeated key a state that is erased "
            f"wholly ({repeated.claimed_ratio:g} claimed) keeps {repeated.growth_a_token:.3f} a token, its sign turned",
        ),
        Statement(
            "One correction gate a token, as carve has, never makes the state grow.",
            HOLDS if decayed_ok and stored_ok and worst_scalar <= 1 + SLACK else FAILS,
            f"at most {worst_scalar:.3f} a token found, and the two bounds say no more than 1; beyond them, with e = 2 "
            f"and predict=stored, {doubled.growth_a_token:.3f}",
        ),
        Statement(
            "One a key channel, as gdn2 has, can make it grow (ours).",
            HOLDS if channel.growth_a_token > 1 + SLACK else OPEN,
            f"keys of unit length and gates below 1 that repeat after {channel.period} tokens let the state grow by "
            f"{channel.growth_a_token:.3f} a token, predict={channel.predict}",
        ),
    )
    return Result(
        name="stability",
        title="Stability of the state",
        claim="The state contracts, with the ratio (1 - b_min) g_min a token (b: erase, g: decay factor).",
        source=f"{PAPER}, Lyapunov stability",
        statements=statements,
        finding=(
            "The slowest channel sets the rate, not the product of the two minima: the largest (1 - b) g bounds "
            "every step with predict=decayed. With predict=stored erasing a channel under a repeated key does not "
            "forget it: the correction takes back more than is left. An e a key channel can make the state grow "
            f"({channel.growth_a_token:.2f} a token found), one e a token cannot."
        ),
        tables={
            "gates": Table("State and steps under several gates", Row._fields, tuple(rows)),
            "search": Table("Largest growth a token that a search found", Extreme._fields, tuple(extremes)),
        },
        shown=("gates", "search"),
        panels=tuple(
            Panel(
                f"predict={predict}",
                "token",
                "Frobenius norm of the state",
                tuple(
                    Line(row.gates, tuple(map(float, range(1, len(n) + 1))), n)
                    for row, n in zip(rows, states, strict=True)
                    if row.predict == predict
                ),
                log_x=True,
                log_y=True,
                least=1e-3,
            )
            for predict in ("decayed", "stored")
        ),
    )


def _over(rows: list[Row], predict: str) -> float:
    return max(row.worst_step / row.bound for row in rows if row.predict == predict and row.bound > 0)


def _gates(
    settings: Settings, batch: int, T: int, K: int, V: int, generator: torch.Generator
) -> Iterator[tuple[str, Tokens]]:
    yield "as carve starts", started_tokens(batch, T, K, V, generator)
    tokens, content = trained_tokens(settings, batch)
    yield "trained carve", frozen_gates(tokens, content, "stored", tokens.k.shape[-1] ** -0.5)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    beta = uniform(batch, T)
    yield (
        "uniform gates",
        Tokens(
            q=unit_keys(batch, T, K, generator=generator),
            k=unit_keys(batch, T, K, generator=generator),
            v=torch.randn(batch, T, V, generator=generator, dtype=F64),
            log_decay=uniform(batch, T, K).log(),
            erase_logits=torch.logit(uniform(batch, T, K)),
            correct=beta,
            write=beta,
        ),
    )
    yield "repeated key, all erased", repeated_key(batch, T, K, V, erase=math.inf)
    mixed = repeated_key(batch, T, K, V, erase=-math.inf)
    decay = torch.zeros(batch, T, K, dtype=F64)
    decay[..., 0] = -3.0  # one channel fades, the others are kept: the smallest factor says nothing of them
    off = torch.zeros(batch, T, dtype=F64)
    yield "one fading channel", mixed._replace(log_decay=decay, erase_logits=None, correct=off, write=off + 0.1)


def repeated_key(batch: int, T: int, K: int, V: int, erase: float) -> Tokens:
    """Return tokens that write at the first channel, fully corrected, while `erase` (a logit) clears all channels."""
    k = torch.zeros(batch, T, K, dtype=F64)
    k[..., 0] = 1
    logits = torch.full((batch, T, K), erase, dtype=F64)
    on = torch.ones(batch, T, dtype=F64)
    v = torch.zeros(batch, T, V, dtype=F64)
    v[:, 0] = 1  # one write, and then only what becomes of it
    return Tokens(k, k, v, None, logits, on, on)


def measure(name: str, tokens: Tokens, predict: str, generator: torch.Generator) -> tuple[Row, tuple[float, ...]]:
    """Return what the transition matrices of `tokens` do, and the state's norm after every token of the first rows."""
    D = kept(tokens)
    e = tokens.correct if tokens.correct is not None else torch.zeros_like(D[..., 0])
    A = transitions(tokens.k, D, e, predict)
    steps = torch.linalg.matrix_norm(A, 2)
    bound = step_bound(D, e, predict)
    rate = growth(A, generator, skip=A.shape[1] // 4)
    norms = _norms(tokens, A)
    row = Row(
        gates=name,
        predict=predict,
        claimed_ratio=claimed_ratio(tokens),
        bound=float(bound.max()),
        worst_step=float(steps.max()),
        growth_a_token=math.exp(float(rate.max())),
        largest_state=float(norms.max()),
        final_state=float(norms[:, -1].max()),
    )
    return row, tuple(norms.mean(0).tolist())


def _norms(tokens: Tokens, A: Tensor) -> Tensor:
    """Return the state's norm after every token, `[B, T]`, by the matrices; `run` ends in the same state."""
    write = torch.ones_like(tokens.k[..., 0]) if tokens.write is None else tokens.write
    S = torch.zeros(tokens.k.shape[0], tokens.k.shape[-1], tokens.v.shape[-1], dtype=F64)
    norms = []
    for t in range(A.shape[1]):
        S = A[:, t] @ S + tokens.k[:, t, :, None] * (write[:, t, None] * tokens.v[:, t])[:, None, :]
        norms.append(S.norm(dim=(1, 2)))
    return torch.stack(norms, dim=1)


def final_state(tokens: Tokens, predict: str) -> Tensor:
    """Return the state that the recurrence itself ends in: `[B, K, V]`."""
    return run(tokens, predict)[1]


def search(settings: Settings, generator: torch.Generator) -> list[Extreme]:
    """Search keys, corrections and decays, by gradient ascent, for the sequence whose repetition grows fastest.

    Ascends log(spectral radius) of the product of `period` transitions over many restarts; what is found is a lower
    bound on the worst case, and each is one real sequence of gates.
    """
    found = []
    for correct in ("scalar", "channel"):
        for predict in ("decayed", "stored"):
            for top in (1.0, 2.0):
                for period in settings.pick((2,), (1, 2, 3), (1, 2, 3, 4, 6)):
                    rate = _ascend(correct, predict, top, period, settings, generator)
                    found.append(Extreme(correct, top, predict, period, rate))
    return found


def _ascend(
    correct: str, predict: str, top: float, period: int, settings: Settings, generator: torch.Generator
) -> float:
    restarts, steps, K = settings.pick((8, 60, 3), (32, 150, 4), (64, 400, 6))
    shapes = ((restarts, period, K), (restarts, period, K) if correct == "channel" else (restarts, period))
    raw = [torch.randn(*shape, generator=generator, dtype=F64).requires_grad_() for shape in (*shapes, shapes[0])]
    optimiser = torch.optim.Adam(raw, lr=0.1)
    best = -math.inf
    for _ in range(steps):
        k, e, D = F.normalize(raw[0], dim=-1), top * torch.sigmoid(raw[1]), torch.sigmoid(raw[2])
        A = transitions(k, D, e, predict)
        product = A[:, 0]
        for i in range(1, period):
            product = A[:, i] @ product
        rate = torch.linalg.eigvals(product).abs().amax(-1).clamp_min(1e-12).log() / period
        best = max(best, float(rate.detach().max()))
        optimiser.zero_grad()
        (-rate.sum()).backward()
        optimiser.step()
    return math.exp(best)
