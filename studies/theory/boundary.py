"""The chunkability boundary: what an erase mask over value channels does to the chunkwise form.

The plain form is written out here, token by token, and held to the `reference` backend. In a chunk, value channel j
then has decays of its own, `M_t[j]` the product of its mask up to token t, and with it a triangular system of its own:

    A_j[i, s] = A[i, s] M_i'[j] / M_s[j]        N[:, j] = (I + A_j)^-1 R[:, j]

where i' is i with predict=decayed and i - 1 with stored. One solve cannot serve them all unless the mask is one number
for all value channels. Shapes: B batch, T time, K key dim, V value dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels import gated_delta_rule
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, Tokens, run, started_tokens

EXACT = 1e-10


class Solve(NamedTuple):
    """One way of solving a chunk's systems, and its relative error from the token loop."""

    mask: str
    solve: str
    systems: int
    relative_error: float


class Timing(NamedTuple):
    """Seconds of a forward and backward pass in float32, and the ratio to the key-axis chunkwise form."""

    T: int
    form: str
    seconds: float
    slowdown: float


def by_token(tokens: Tokens, erase_value: Tensor, predict: str = "decayed") -> tuple[Tensor, Tensor]:
    """Run the recurrence with a value-axis erase, in plain words; return `o [B, T, V]` and the final state `[B, K, V]`.

    `erase_value [B, T, V]` are logits of the mask: `S <- S diag(1 - sigmoid)` beside the decay of key channels.
    """
    q, k, v, log_decay, erase_logits, correct, write = tokens
    S = torch.zeros(k.shape[0], k.shape[2], v.shape[2], dtype=k.dtype)
    outputs = []
    for t in range(k.shape[1]):
        log_D = torch.zeros_like(k[:, t]) if log_decay is None else log_decay[:, t]
        if erase_logits is not None:
            log_D = log_D - F.softplus(erase_logits[:, t])
        decayed = log_D.exp()[:, :, None] * S * torch.sigmoid(-erase_value[:, t])[:, None, :]
        target = v[:, t] if write is None else write[:, t, None] * v[:, t]
        if correct is not None:
            seen = decayed if predict == "decayed" else S
            target = target - correct[:, t, None] * (k[:, t, None, :] @ seen)[:, 0]
        S = decayed + k[:, t, :, None] * target[:, None, :]
        outputs.append((q[:, t, None, :] @ S)[:, 0])
    return torch.stack(outputs, dim=1), S


def in_chunks(tokens: Tokens, erase_value: Tensor, C: int, shared: bool = False) -> Tensor:
    """Run chunks of `C` tokens one after another, with predict=decayed: `o [B, T, V]`.

    Not `shared`: one triangular solve a value channel, which is exact. `shared`: a single solve, for the mean over
    value channels of the log mask; exact only where they agree. Decays must be mild: exponents are not factored here.
    """
    S = torch.zeros(tokens.k.shape[0], tokens.k.shape[2], tokens.v.shape[2], dtype=tokens.k.dtype)
    outputs = []
    for start in range(0, tokens.k.shape[1], C):
        cut = Tokens(*(None if x is None else x[:, start : start + C] for x in tokens))  # type: ignore[arg-type]
        o, S = _chunk(cut, erase_value[:, start : start + C], S, shared)
        outputs.append(o)
    return torch.cat(outputs, dim=1)


def without_correction(tokens: Tokens, erase_value: Tensor) -> Tensor:
    """Return `o` of the uncorrected rule from the key-axis recurrence alone: the mask is folded into v and o.

    `M_t[j]` scales what channel j wrote before t, so v is divided by it and o multiplied: there is no system to lose.
    """
    M = F.logsigmoid(-erase_value).cumsum(1)
    o, _ = run(tokens._replace(v=tokens.v * (-M).exp(), correct=None), "decayed")
    return o * M.exp()


def probe(settings: Settings) -> Result:
    """Check the two forms against each other, count the systems, and time them."""
    generator = torch.Generator().manual_seed(settings.seed)
    B, C, K, V = settings.pick((1, 8, 4, 3), (2, 32, 8, 8), (4, 64, 16, 16))
    tokens = started_tokens(B, C, K, V, generator)
    each = torch.randn(B, C, V, generator=generator, dtype=F64)
    alike = each[..., :1].expand(-1, -1, V)
    agreement = _agreement(tokens, each, alike)
    solves = []
    for name, mask in (("one a value channel", each), ("one number a token", alike)):
        truth, _ = by_token(tokens, mask)
        for shared in (False, True):
            error = _relative(in_chunks(tokens, mask, C, shared), truth)
            solves.append(Solve(name, "one shared" if shared else "one a value channel", 1 if shared else V, error))
    uncorrected = _relative(without_correction(tokens, each), by_token(tokens._replace(correct=None), each)[0])
    tied = _tied_channel_write(tokens, generator)
    timings = time_forms(settings)
    found = {(row.mask, row.solve): row.relative_error for row in solves}
    lost = found["one a value channel", "one shared"]
    own = found["one a value channel", "one a value channel"]
    longest = max(row.T for row in timings)
    slow = {row.form: row for row in timings if longest == row.T}
    loop, many = slow["value-axis, token by token"], slow["value-axis, a solve a channel"]
    statements = (
        Statement(
            "A value-axis erase has no chunkwise form with one triangular solve for all value channels.",
            HOLDS if lost > 1e-3 and own < EXACT else FAILS,
            f"one shared solve is off by {lost:.1%}; {V} solves, one a value channel, by {own:.0e}; with one number a "
            f"token for the mask a shared solve is off by {found['one number a token', 'one shared']:.0e}",
        ),
        Statement(
            "Throughput then collapses to that of the serial recurrence.",
            OPEN,  # said of GPUs: what a CPU takes neither shows nor refutes it
            f"on this CPU, over {longest} tokens, the token loop takes {loop.slowdown:.1f} times as long as the "
            f"key-axis chunkwise form; chunks with a solve a value channel take {many.slowdown:.1f} times; the claim "
            "is about GPUs",
        ),
        Statement(
            "Erasing on the key axis only is necessary and sufficient for the shared solve.",
            FAILS if uncorrected < EXACT or tied > 1e-3 else HOLDS,
            f"not necessary: without a correction a value-axis erase folds into v and o, to {uncorrected:.0e}; "
            "sufficient only with one write gate a token: one a value channel, tied to the correction, has a system a "
            f"channel too, for which one shared solve is off by {tied:.1%}",
        ),
        Statement(
            "The reference backend's value-axis erase is the plain recurrence (ours).",
            HOLDS if agreement < EXACT else FAILS,
            f"largest relative difference {agreement:.0e}; with one number a token it equals a key-axis erase",
        ),
    )
    return Result(
        name="boundary",
        title="The chunkability boundary",
        claim=(
            "Erasing on the key axis only is necessary and sufficient for the chunkwise form: with a value-axis erase "
            "it falls into a solve for each value channel, and throughput to that of the serial recurrence."
        ),
        source=f"{PAPER}, abstract and Theorem 11",
        statements=statements,
        finding=(
            "One shared solve is lost, as claimed, and the value-axis erase runs token by token here, "
            f"{loop.slowdown:.0f} times slower on this CPU over {longest} tokens. But a chunkwise form with a solve "
            f"a value channel exists ({many.slowdown:.1f} times slower), and neither half of necessary and "
            "sufficient holds."
        ),
        tables={
            "solves": Table("One chunk, by what its systems share", Solve._fields, tuple(solves)),
            "time": Table("Seconds, forward and backward", Timing._fields, tuple(timings)),
        },
        shown=("solves", "time"),
        panels=(_panel(timings),),
        facts={"threads": torch.get_num_threads()},
    )


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _agreement(tokens: Tokens, each: Tensor, alike: Tensor) -> float:
    """Return the largest relative difference among forms that must agree."""
    worst = 0.0
    for predict in ("decayed", "stored"):
        q, k, v, *gates = (None if x is None else x.unsqueeze(2) for x in tokens)
        log_decay, erase_logits, correct, write = gates
        reference, _ = gated_delta_rule(
            *(q, k, v, log_decay, erase_logits, None, correct, write),  # type: ignore[arg-type]
            predict=predict,
            scale=1.0,
            erase_value=each.unsqueeze(2),
            backend="reference",
        )
        worst = max(worst, _relative(by_token(tokens, each, predict)[0], reference[:, :, 0]))
        assert tokens.log_decay is not None
        key_axis = tokens._replace(log_decay=tokens.log_decay + F.logsigmoid(-alike[..., :1]))
        worst = max(worst, _relative(by_token(tokens, alike, predict)[0], run(key_axis, predict)[0]))
    return worst


def _tied_channel_write(tokens: Tokens, generator: torch.Generator) -> float:
    """Return how far one shared solve is off where each value channel has its own gate, tied to the correction.

    No erase and no decay here: `S[:, j] <- (I - w_j k k^T) S[:, j] + k w_j v_j`; the shared solve takes the mean gate.
    """
    q, k, v = tokens[:3]
    w = torch.rand(*v.shape, generator=generator, dtype=F64)
    A = (k @ k.mT).tril(-1)
    eye = torch.eye(k.shape[1], dtype=F64)
    systems = eye + w.permute(0, 2, 1)[..., None] * A[:, None]
    R = w * v
    own = torch.linalg.solve_triangular(systems, R.mT[..., None], upper=False, unitriangular=True)[..., 0].mT
    mean = eye + w.mean(-1)[..., None] * A
    shared = torch.linalg.solve_triangular(mean, R, upper=False, unitriangular=True)
    P = (q @ k.mT).tril()
    return _relative(P @ shared, P @ own)


def time_forms(settings: Settings) -> list[Timing]:
    """Time the key-axis chunkwise form, the value-axis token loop, and chunks with a solve a value channel."""
    generator = torch.Generator().manual_seed(settings.seed)
    lengths = settings.pick((32,), (64, 256, 1024), (256, 1024, 4096))
    K, C = settings.pick((4, 16), (32, 32))
    rows = []
    for T in lengths:
        drawn = started_tokens(1, T, K, K, generator)
        tokens = Tokens(*(None if x is None else x.float().requires_grad_() for x in drawn))  # type: ignore[arg-type]
        mask = (torch.randn(1, T, K, generator=generator) - 3).requires_grad_()
        forms: dict[str, Callable[[], Tensor]] = {
            "key-axis, chunkwise": partial(_output, run, tokens, backend="torch"),
            "value-axis, token by token": partial(_output, by_token, tokens, mask),
            "value-axis, a solve a channel": partial(in_chunks, tokens, mask, C),
        }
        seconds = {name: _seconds(form, settings.pick(1, 3)) for name, form in forms.items()}
        rows += [Timing(T, name, taken, taken / seconds["key-axis, chunkwise"]) for name, taken in seconds.items()]
    return rows


def _chunk(tokens: Tokens, erase_value: Tensor, S: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """One chunk of `in_chunks`, from the state `S`: the chunkwise form with every M in its place."""
    q, k, v, log_decay, erase_logits, correct, write = tokens
    assert log_decay is not None
    assert erase_logits is not None
    assert correct is not None
    assert write is not None
    G = (log_decay - F.softplus(erase_logits)).cumsum(1)
    M = F.logsigmoid(-erase_value).cumsum(1)
    lower = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    between = (G[:, :, None] - G[:, None]).where(lower, torch.zeros(())).exp()  # above the diagonal it would overflow
    ratio = (M[:, :, None] - M[:, None]).where(lower, torch.zeros(())).exp()  # [B, i, s, V]
    A = torch.einsum("bik,bisk,bsk->bis", correct[..., None] * k, between, k).tril(-1)
    P = torch.einsum("bik,bisk,bsk->bis", q, between, k).tril()
    held = M.exp()
    R = write[..., None] * v - held * ((correct[..., None] * k * G.exp()) @ S)
    # Each solve takes the diagonal as ones.
    if shared:
        mean = M.mean(-1)
        system = A * (mean[:, :, None] - mean[:, None]).where(lower[..., 0], torch.zeros(())).exp()
        N = torch.linalg.solve_triangular(system, R, upper=False, unitriangular=True)
    else:
        systems = (A[..., None] * ratio).permute(0, 3, 1, 2)  # [B, V, i, s]
        N = torch.linalg.solve_triangular(systems, R.mT[..., None], upper=False, unitriangular=True)[..., 0].mT
    o = held * ((q * G.exp()) @ S) + torch.einsum("bis,bisv,bsv->biv", P, ratio, N)
    last = (M[:, -1:] - M).exp() * N
    S = G[:, -1].exp()[:, :, None] * S * held[:, -1, None, :] + (k * (G[:, -1:] - G).exp()).mT @ last
    return o, S


def _output(rule: Callable[..., tuple[Tensor, Tensor]], *args: object, **words: object) -> Tensor:
    return rule(*args, **words)[0]


def _seconds(form: Callable[[], Tensor], repeats: int) -> float:
    """Return the fastest of `repeats` forward and backward passes."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        form().sum().backward()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _panel(rows: list[Timing]) -> Panel:
    lines = tuple(
        Line(
            form,
            tuple(float(r.T) for r in rows if r.form == form),
            tuple(r.seconds for r in rows if r.form == form),
        )
        for form in dict.fromkeys(row.form for row in rows)
    )
    return Panel("Time by length", "tokens", "seconds, forward and backward", lines, True, True)
