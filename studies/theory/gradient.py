"""Gradient flow along the state: how much of a change of the state is left after some tokens, and by which path.

With token gates `dS_T / dS_t` is the product of the transition matrices between, the same for every value channel; with
a content gate the state also reaches later gates through the outputs. Both are held to autograd through the recurrence.

Shapes: B batch, T time, K key dim, V value dim, r content rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels import ContentGate, DeltaState, gated_delta_rule
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, PAPER, UNSEEN, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, Tokens, kept, started_tokens, transitions
from hybridzoo.studies.theory.stability import claimed_ratio
from hybridzoo.studies.theory.trained import frozen_gates, trained_tokens

FLOOR = 1e-300


class Row(NamedTuple):
    """How much of a change of the state is left after `distance` tokens; norms are the largest over the batch."""

    gates: str
    predict: str
    distance: int
    measured: float
    claimed: float
    largest_channels: float


def jacobian(tokens: Tokens, predict: str, content: ContentGate | None = None) -> Tensor:
    """Return `dS_T / dS_0` of one sequence by autograd, `[K V, K V]`, from an empty state."""
    q, k, v, log_decay, erase_logits, correct, write = (None if x is None else x[:1].unsqueeze(2) for x in tokens)
    assert q is not None
    assert k is not None
    assert v is not None
    K, V = k.shape[-1], v.shape[-1]
    start = DeltaState.zeros(1, 1, K, V, content is not None, dtype=F64)

    def final(S: Tensor) -> Tensor:
        args = (q, k, v, log_decay, erase_logits, content, correct, write)
        state = gated_delta_rule(
            *args, predict=predict, scale=1.0, state=start._replace(S=S.view(1, 1, K, V)), backend="reference"
        )[1]
        assert state is not None
        return state.S.flatten()

    full: Tensor = torch.autograd.functional.jacobian(final, start.S.flatten())
    return full


def products(tokens: Tokens, predict: str) -> Tensor:
    """Return `A_t ... A_1` for every t: `[B, T, K, K]`."""
    D = kept(tokens)
    e = tokens.correct if tokens.correct is not None else torch.zeros_like(D[..., 0])
    A = transitions(tokens.k, D, e, predict)
    product, found = torch.eye(D.shape[-1], dtype=F64).expand_as(A[:, 0]), []
    for t in range(A.shape[1]):
        product = A[:, t] @ product
        found.append(product)
    return torch.stack(found, dim=1)


def overwritten_keys(K: int, V: int) -> Tokens:
    """Return tokens that write every key of an orthonormal basis once, fully corrected, with no decay and no erase."""
    k = torch.eye(K, dtype=F64)[None]
    on = torch.ones(1, K, dtype=F64)
    return Tokens(k, k, torch.zeros(1, K, V, dtype=F64), None, None, on, on)


def probe(settings: Settings) -> Result:
    """Measure |dS_T/dS_t| over the distance, and hold the transition products to autograd."""
    generator = torch.Generator().manual_seed(settings.seed)
    T, K, V = settings.pick((16, 4, 2), (128, 16, 4), (512, 32, 4))
    started = started_tokens(settings.pick(2, 8), T, K, V, generator)
    tokens, content = trained_tokens(settings, settings.pick(2, 8))
    gates = {
        "as carve starts": started,
        "trained carve": frozen_gates(tokens, content, "stored", tokens.k.shape[-1] ** -0.5),
        "delta rule": started._replace(log_decay=None, erase_logits=None),
        "every key overwritten": overwritten_keys(K, V),
    }
    rows = [row for name, one in gates.items() for p in ("decayed", "stored") for row in _rows(name, one, p)]
    above = [row for row in rows if row.measured > row.claimed * (1 + 1e-9)]
    below = [row for row in rows if row.measured < row.claimed * (1 - 1e-9)]
    within = all(row.measured <= row.largest_channels * (1 + 1e-9) for row in rows if row.predict == "decayed")
    token_error, content_share = _paths(tokens, content)
    gone = next(row for row in rows if row.gates == "every key overwritten" and row.distance == K)
    longest = max((row for row in rows if row.gates == "trained carve"), key=lambda row: (row.distance, row.measured))
    statements = (
        Statement(
            "|dS_T/dS_t| is at most ((1 - b_min) g_min)^(T - t).",
            UNSEEN if above else HOLDS,
            f"above it in {len(above)} of {len(rows)} rows; {longest.gates}, {longest.predict}, {longest.distance} "
            f"tokens: {longest.measured:.3g} left, {max(longest.claimed, FLOOR):.2g} or less claimed",
        ),
        Statement(
            "|dS_T/dS_t| is at least ((1 - b_min) g_min)^(T - t).",
            UNSEEN if below else HOLDS,
            f"below it in {len(below)} of {len(rows)} rows; {K} full overwrites of {K} orthonormal keys, no decay, no "
            f"erase: {gone.measured:.2g} left, {gone.claimed:.2g} claimed",
        ),
        Statement(
            "With predict=decayed it is at most the product of the largest (1 - b) g of each token (ours).",
            HOLDS if within else FAILS,
            f"in all {sum(row.predict == 'decayed' for row in rows)} rows",
        ),
        Statement(
            "With token gates the product of the transitions is the whole gradient (ours).",
            HOLDS if token_error < 1e-9 else FAILS,
            f"relative difference from autograd {token_error:.1e}; with the trained content gate {content_share:.2%} "
            "of the gradient takes the other path, from the state through the outputs into later gates",
        ),
    )
    return Result(
        name="gradient",
        title="Gradient flow along the state",
        claim="Gradients flow along the state at the contraction's ratio, ((1 - b_min) g_min)^(T - t), read both ways.",
        source=f"{PAPER}, gradient flow; its constant was not at hand, so the ratio is that of its stability theorem",
        statements=statements,
        finding=(
            "The ratio bounds the gradient from neither side. From above the slowest channel decides; from below a "
            "full correction removes what a key held, gradient included, without any decay. A content gate adds a "
            f"second path, {content_share:.2%} of the gradient in the trained mixer."
        ),
        tables={"distance": Table("What is left of a change of the state", Row._fields, tuple(rows))},
        panels=tuple(_panel(rows, predict) for predict in ("decayed", "stored")),
        facts={"autograd_difference": token_error, "content_path": content_share},
    )


def _rows(name: str, tokens: Tokens, predict: str) -> list[Row]:
    norms = torch.linalg.matrix_norm(products(tokens, predict), 2).amax(0)
    largest = kept(tokens).amax(-1).log().cumsum(1).amax(0).exp()
    ratio = claimed_ratio(tokens)
    distances = sorted({1, *(2**i for i in range(1, 20) if 2**i <= len(norms)), len(norms)})
    return [Row(name, predict, d, float(norms[d - 1]), ratio**d, float(largest[d - 1])) for d in distances]


def _paths(tokens: Tokens, content: ContentGate) -> tuple[float, float]:
    """Return how far products are from autograd without content, and what content adds, each a share of the whole.

    `tokens` of one trained mixer with its `content` gate; the first sequence is measured.
    """
    one = Tokens(*(None if x is None else x[:1] for x in tokens))  # type: ignore[arg-type]
    eye = torch.eye(one.v.shape[-1], dtype=F64)
    fixed = frozen_gates(one, content, "stored", 1.0)
    error = 0.0
    for predict in ("decayed", "stored"):
        full = jacobian(fixed, predict)
        error = max(error, float((full - torch.kron(products(fixed, predict)[0, -1], eye)).norm() / full.norm()))
    full = jacobian(one, "stored", content)
    return error, float((full - torch.kron(products(fixed, "stored")[0, -1], eye)).norm() / full.norm())


def _panel(rows: list[Row], predict: str) -> Panel:
    lines = []
    for name in dict.fromkeys(row.gates for row in rows):
        mine = [row for row in rows if (row.gates, row.predict) == (name, predict)]
        x = tuple(float(row.distance) for row in mine)
        lines.append(Line(name, x, tuple(max(row.measured, FLOOR) for row in mine)))
    for name in ("as carve starts", "every key overwritten"):
        mine = [row for row in rows if (row.gates, row.predict) == (name, predict)]
        x = tuple(float(row.distance) for row in mine)
        lines.append(Line(f"claimed, {name}", x, tuple(max(row.claimed, FLOOR) for row in mine), "dashes"))
    return Panel(
        f"predict={predict}", "tokens between", "|dS_T / dS_t|", tuple(lines), log_x=True, log_y=True, least=1e-8
    )
