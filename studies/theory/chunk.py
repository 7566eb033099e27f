"""The content chunk: what a longer one saves in time and costs in a staler gate, and the length that balances the two.

Staleness is the relative difference of the outputs from those of a gate renewed at every token (L = 1), of the same
weights on the same tokens, by the token loop in float64. Time is of the chunkwise form, forward and backward, here: on
the CPU, and with device cuda on a GPU. What models score that were trained at each length is in lengths.py.

Shapes: B batch, T time, K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels import ContentGate, gated_delta_rule
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.lengths import OFF, curves
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, Tokens, over_heads, run, started_tokens
from hybridzoo.studies.theory.timing import fused_refusal, gpu_facts, in_words, median_seconds
from hybridzoo.studies.theory.trained import trained_tokens

CLAIMED, FIRST, LAST = 0.0018, 16, 128  # of the outputs, flat over these lengths
FLAT = 1.25  # the largest over the smallest that is still called flat
LONGEST = 4096  # tokens beyond which a fitted length is no longer printed as a number
NEAR = 2.0  # how far from the claimed level is still called near
SAVES = 1.05  # the time of the shortest over that of the longest from which on a longer chunk is said to save time


class Stale(NamedTuple):
    """How far outputs and final states are from those of a gate renewed at every token (L = 0: no content gate)."""

    inputs: str
    L: int
    output_difference: float
    state_difference: float


class Timing(NamedTuple):
    """Seconds of one forward and backward pass of the chunkwise form (L = 0: no content gate), and where.

    The fastest of several on a CPU, their median on a GPU.
    """

    L: int
    seconds: float
    device: str = "cpu"
    backend: str = "torch"
    dtype: str = "float32"


class Fit(NamedTuple):
    """The length that balances time `1 + overhead / L` against staleness `level * L^exponent`, and its range over
    draws; one draw has none."""

    inputs: str
    overhead: float
    level: float
    exponent: float
    best_L: float
    low: float | None
    high: float | None


def staleness(
    tokens: Tokens, content: ContentGate, lengths: Sequence[int], predict: str = "stored"
) -> list[tuple[float, float]]:
    """Return the relative difference of outputs and of final states from chunks of one token, for each of `lengths`.

    A length of 0 switches the readout off.
    """
    scale = tokens.k.shape[-1] ** -0.5
    exact, exact_S = run(tokens, predict, content._replace(chunk=1), scale=scale)
    found = []
    for L in lengths:
        o, S = run(tokens, predict, content._replace(chunk=L) if L else None, scale=scale)
        found.append((float((o - exact).norm() / exact.norm()), float((S - exact_S).norm() / exact_S.norm())))
    return found


def content_gate(K: int, V: int, r: int, strength: float, generator: torch.Generator) -> ContentGate:
    """Draw a content pair whose readout has entries of about `strength` where its hidden units are saturated."""
    device = generator.device
    down = torch.randn(1, r, V, generator=generator, dtype=F64, device=device) * V**-0.5
    up = strength * torch.randn(1, K, r, generator=generator, dtype=F64, device=device) * r**-0.5
    return ContentGate(down, up)


def probe(settings: Settings) -> Result:
    """Measure staleness, time and trained quality against L, and fit the lengths that are best."""
    generator = torch.Generator().manual_seed(settings.seed)
    T, K, V = settings.pick((48, 4, 4), (256, 16, 16), (1024, 32, 32))
    lengths = settings.pick((2, 4, 8, 16), (2, 4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32, 64, 128, 256))
    draws = settings.pick(1, 2, 5)
    stale: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(draws):
        for name, tokens, content in _inputs(settings, T, K, V, generator):
            fitting = [OFF, *(L for L in lengths if tokens.k.shape[1] >= 2 * L)]  # else no gate is renewed, or one
            for L, found in zip(fitting, staleness(tokens, content, fitting), strict=True):
                stale.setdefault((name, L), []).append(found)
    rows = [
        Stale(name, L, statistics.fmean(o for o, _ in seen), statistics.fmean(s for _, s in seen))
        for (name, L), seen in stale.items()
    ]
    device = settings.resolve_device()
    timings = time_chunks(settings, [L for L in lengths if settings.pick(4, 8) <= L])
    on_gpu = time_on(device, settings) if device.type == "cuda" else []
    decisive = _fastest(on_gpu) or timings  # a length is chosen for a GPU where one was timed
    fits = [_fit(name, stale, decisive) for name in dict.fromkeys(row.inputs for row in rows)]
    trained = curves(settings, FIRST, LAST, NEAR * CLAIMED)
    statements = (
        *(_flatness(rows), _level(rows), _worth(rows), _best(fits, settings.device_name)),
        *(_saves(on_gpu, f"{settings.device_name}, {in_words(gpu_shape(settings))}"), *trained.statements),
    )
    slope = {fit.inputs: fit.exponent for fit in fits}
    steepest = max(slope, key=lambda name: slope[name])
    return Result(
        name="chunk",
        title="Pareto chunk size",
        claim="A content chunk costs 0.18 % against a gate renewed every token, for any length from 16 to 128 tokens.",
        source=f"{PAPER}, Pareto-optimal chunk size",
        statements=statements,
        finding=(
            "The difference depends on the inputs and on how strong the readout is; it is no constant. Where tokens "
            "are independent it is flat because a longer mean says next to nothing: it is about as far from a gate "
            "renewed every token as no content gate at all is. It grows most for "
            f"{steepest}, as L to the power {slope[steepest]:.2f}. The chunkwise form takes "
            f"{timings[0].seconds / timings[-1].seconds:.1f} times as long at L = {timings[0].L} as at {timings[-1].L}"
            f"{_on_gpu_in_words(on_gpu, settings.device_name)}. {trained.finding}"
        ),
        tables={
            "staleness": Table("Difference from a gate renewed at every token", Stale._fields, tuple(rows)),
            "time": Table("Seconds a forward and backward pass", Timing._fields, (*timings, *on_gpu)),
            "fit": Table(
                "The length that balances time and staleness, one per cent against one", Fit._fields, (*fits,)
            ),
            **trained.tables,
        },
        shown=("staleness", *(("time",) if on_gpu else ()), "fit", "quality", "best"),
        panels=(
            _staleness_panel(rows),
            _time_panel("Time on the CPU" if on_gpu else "Time", timings, bool(on_gpu)),
            *((_time_panel(f"Time on {settings.device_name}", on_gpu, True),) if on_gpu else ()),
            trained.panel,
        ),
        facts={
            "threads": torch.get_num_threads(),
            "device": settings.device_name,
            **(gpu_facts(device, gpu_shape(settings), content=True) if on_gpu else {}),
        },
    )


def _inputs(
    settings: Settings, T: int, K: int, V: int, generator: torch.Generator
) -> list[tuple[str, Tokens, ContentGate]]:
    tokens = started_tokens(settings.pick(1, 2), T, K, V, generator)
    open_gates = tokens._replace(erase_logits=torch.randn(*tokens.k.shape, generator=generator, dtype=F64) - 2)
    weak, strong = (content_gate(K, V, 4, strength, generator) for strength in (1.0, 4.0))
    trained, content = trained_tokens(settings, settings.pick(4, 16))
    return [
        ("start, weak readout", tokens, weak),
        ("start, strong readout", tokens, strong),
        ("open, strong readout", open_gates, strong),
        ("open, topics of 64", with_topics(open_gates, 64, generator), strong),
        ("trained", joined(trained, settings.pick(2, 8)), content),
    ]


def with_topics(tokens: Tokens, length: int, generator: torch.Generator) -> Tokens:
    """Return `tokens` with a mean of values and of queries and keys that changes every `length` tokens.

    Independent tokens give outputs whose mean is close to zero, so that a mean over more of them says less.
    """
    B, T, K = tokens.k.shape
    topics = -(-T // length)

    def held(width: int) -> torch.Tensor:
        means = torch.randn(B, topics, width, generator=generator, dtype=F64)
        return means.repeat_interleave(length, dim=1)[:, :T]

    address = 0.5 * held(K)
    q, k = (F.normalize(x + address, dim=-1) for x in (tokens.q, tokens.k))
    return tokens._replace(q=q, k=k, v=tokens.v + 2 * held(tokens.v.shape[-1]))


def joined(tokens: Tokens, episodes: int) -> Tokens:
    """Return the same tokens in `episodes` times fewer sequences, each so many of them one after another."""
    return Tokens(*(None if x is None else x.reshape(-1, episodes * x.shape[1], *x.shape[2:]) for x in tokens))  # type: ignore[arg-type]


def time_chunks(settings: Settings, lengths: Sequence[int]) -> list[Timing]:
    """Time the chunkwise form with a content gate, forward and backward in float32, at every L."""
    B, T, H, K = settings.pick((1, 64, 1, 8), (1, 512, 2, 32), (4, 2048, 4, 64))
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = started_tokens(B * H, T, K, K, generator)
    inputs = [None if x is None else over_heads(x, B, H, torch.float32).requires_grad_() for x in tokens]
    q, k, v, log_decay, erase_logits, correct, write = inputs
    gate = content_gate(K, K, 4, 1.0, generator)
    down, up = (x.float().expand(H, -1, -1).contiguous() for x in gate[:2])
    found = []
    for L in lengths:
        seconds = []
        for _ in range(settings.pick(1, 3, 8)):
            started = time.perf_counter()
            o, _ = gated_delta_rule(
                *(q, k, v, log_decay, erase_logits, ContentGate(down, up, L), correct, write),  # type: ignore[arg-type]
                predict="stored",
                backend="torch",
            )
            o.sum().backward()
            seconds.append(time.perf_counter() - started)
        found.append(Timing(L, min(seconds)))
    return found


def gpu_shape(settings: Settings) -> tuple[int, int, int, int]:
    """Return B, T, H and K = V of what is timed on a GPU: large enough that it is the GPU which takes the time."""
    return settings.pick((1, 64, 2, 16), (8, 4096, 16, 128))


def time_on(device: torch.device, settings: Settings, dtype: torch.dtype = torch.bfloat16) -> list[Timing]:
    """Time the chunkwise form on `device` in `dtype`, forward and backward, at every L and without a content gate.

    By the fused kernels where they run, and by the same form in PyTorch operations.
    """
    B, T, H, K = gpu_shape(settings)
    generator = torch.Generator(device).manual_seed(settings.seed)
    leaves = [
        None if x is None else over_heads(x, B, H, dtype).requires_grad_()
        for x in started_tokens(B * H, T, K, K, generator)
    ]
    pair = [
        x.float().expand(H, -1, -1).contiguous().requires_grad_() for x in content_gate(K, K, 16, 1.0, generator)[:2]
    ]
    d_out = torch.randn(B, T, H, K, device=device, dtype=dtype, generator=generator)
    backends = {"torch": settings.pick(1, 5)}
    if fused_refusal(device, content=True) is None:
        backends = {"triton": settings.pick(2, 20), **backends}
    return [
        Timing(
            L,
            median_seconds(partial(_pass, leaves, pair, L, backend, d_out), device, repeats),
            *(device.type, backend, str(dtype).removeprefix("torch.")),
        )
        for backend, repeats in backends.items()
        for L in (OFF, *settings.pick((16, 32), (16, 32, 64, 128, 256)))
    ]


def _pass(leaves: Sequence[Tensor | None], pair: Sequence[Tensor], L: int, backend: str, d_out: Tensor) -> None:
    """One forward and backward pass of the recurrence of `carve`, with gradients for everything."""
    q, k, v, log_decay, erase_logits, correct, write = leaves
    content = ContentGate(pair[0], pair[1], L) if L else None
    o, _ = gated_delta_rule(
        *(q, k, v, log_decay, erase_logits, content, correct, write),  # type: ignore[arg-type]
        predict="stored",
        backend=backend,
    )
    inputs = [x for x in (*leaves, *(pair if L else ())) if x is not None]
    torch.autograd.grad(o, inputs, d_out)


def _fastest(on_gpu: Sequence[Timing]) -> list[Timing]:
    """Return the lengths of the first backend that was timed, which is the fused one where there is one."""
    return [t for t in on_gpu if t.L and t.backend == on_gpu[0].backend]


def fit_time(timings: Sequence[Timing]) -> tuple[float, float]:
    """Fit `seconds = a + b / L` by least squares of relative errors; return a (above 0) and b (at least 0)."""
    x = torch.tensor([[1.0, 1 / t.L] for t in timings], dtype=F64)
    y = torch.tensor([t.seconds for t in timings], dtype=F64)
    a, b = torch.linalg.lstsq(x / y[:, None], torch.ones(len(y), 1, dtype=F64)).solution[:, 0].tolist()
    return max(a, 1e-12), max(b, 0.0)


def fit_power(lengths: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Fit `value = level * L^exponent` by least squares of logarithms; return both."""
    x = [math.log(L) for L in lengths]
    y = [math.log(max(v, 1e-16)) for v in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((xi - mean_x) ** 2 for xi in x)
    exponent = sum((xi - mean_x) * (yi - mean_y) for xi, yi in zip(x, y, strict=True)) / spread if spread else 0.0
    return math.exp(mean_y - exponent * mean_x), exponent


def best_length(overhead: float, level: float, exponent: float) -> float:
    """Return the L that minimises `overhead / L + level * L^exponent`: infinite where staleness does not grow."""
    if exponent <= 0 or level <= 0:
        return math.inf
    return (overhead / (level * exponent)) ** (1 / (exponent + 1))


def _fit(name: str, stale: dict[tuple[str, int], list[tuple[float, float]]], timings: Sequence[Timing]) -> Fit:
    """Fit on the means; the range is over the draws, each with a fit of its own."""
    a, b = fit_time(timings)
    seen = {L: [o for o, _ in values] for (inputs, L), values in stale.items() if inputs == name and L}
    level, exponent = fit_power(list(seen), [statistics.fmean(values) for values in seen.values()])
    each = [
        best_length(b / a, *fit_power(list(seen), draw))
        for draw in zip(*seen.values(), strict=True)  # a draw's own staleness at every L
    ]
    low, high = (min(each), max(each)) if len(each) > 1 else (None, None)
    return Fit(name, b / a, level, exponent, best_length(b / a, level, exponent), low, high)


def _claimed_range(rows: Sequence[Stale]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if FIRST <= row.L <= LAST:
            values.setdefault(row.inputs, []).append(row.output_difference)
    return {name: v for name, v in values.items() if len(v) > 1}


def _flatness(rows: Sequence[Stale]) -> Statement:
    spans = {name: max(v) / max(min(v), 1e-300) for name, v in _claimed_range(rows).items()}
    text = f"The difference is flat over L = {FIRST} to {LAST}."
    if not spans:
        return Statement(text, OPEN, "these sequences are too short for two of these lengths")
    said = "; ".join(f"{name}: largest over smallest {span:.2f}" for name, span in spans.items())
    return Statement(text, FAILS if max(spans.values()) > FLAT else HOLDS, said)


def _level(rows: Sequence[Stale]) -> Statement:
    ranges = _claimed_range(rows)
    text = f"It is {100 * CLAIMED:.2g} %."
    if not ranges:
        return Statement(text, OPEN, "these sequences are too short for two of these lengths")
    levels = {name: statistics.fmean(v) for name, v in ranges.items()}
    far = [v for v in levels.values() if not CLAIMED / NEAR <= v <= CLAIMED * NEAR]
    said = "; ".join(f"{name}: {100 * v:.2g} %" for name, v in levels.items())
    return Statement(text, FAILS if far else HOLDS, f"means over these lengths: {said}")


def _worth(rows: Sequence[Stale]) -> Statement:
    """Compare the longest chunk with no content gate: where both differ as much, a stale gate is as good as none."""
    said, kept = [], []
    for name in dict.fromkeys(row.inputs for row in rows):
        off = next(row.output_difference for row in rows if row.inputs == name and row.L == OFF)
        last = max((row for row in rows if row.inputs == name), key=lambda row: row.L)
        if off:
            kept.append(last.output_difference / off)
            said.append(f"{name}: {100 * kept[-1]:.0f} % at L = {last.L}")
    text = "So a longer chunk loses nothing of what the gate does."
    if not kept:
        return Statement(text, OPEN, "no readout was at work")
    verdict = FAILS if max(kept) > 0.5 else HOLDS
    return Statement(text, verdict, f"staleness over that of no content gate: {'; '.join(said)}")


def _best(fits: Sequence[Fit], where: str = "cpu") -> Statement:
    said = "; ".join(f"{fit.inputs}: {_best_and_range(fit)}" for fit in fits)
    timed = "" if where == "cpu" else f" with the times of {where}"
    return Statement(
        "One chunk length is best for time and quality together.",
        OPEN,
        f"it depends on what a per cent of time is worth in staleness, and on the machine; one for one{timed}, L* is "
        f"{said}",
    )


def _saves(on_gpu: Sequence[Timing], where: str) -> Statement:
    """Judge by a GPU's times alone whether a longer chunk saves any there."""
    text = "On a GPU a longer content chunk takes less time (ours)."
    timed = _fastest(on_gpu)
    if not timed:
        return Statement(text, OPEN, "no GPU was timed in this run")
    times = ", ".join(f"{1e3 * t.seconds:.2f} ms at L = {t.L}" for t in timed)
    (off,) = [t for t in on_gpu if not t.L and t.backend == timed[0].backend]
    ratio = timed[0].seconds / timed[-1].seconds
    return Statement(
        text,
        HOLDS if ratio > SAVES else FAILS,
        f"on {where} in {off.dtype}, forward and backward, backend {off.backend}: {times}; without a content gate "
        f"{1e3 * off.seconds:.2f} ms",
    )


def _on_gpu_in_words(on_gpu: Sequence[Timing], where: str) -> str:
    timed = _fastest(on_gpu)
    if not timed:
        return ""
    ratio = timed[0].seconds / timed[-1].seconds
    return f" on the CPU, and {ratio:.2f} times at L = {timed[0].L} as at {timed[-1].L} on {where}"


def _best_and_range(fit: Fit) -> str:
    if fit.low is None or fit.high is None:
        return "not told, of one draw"
    return f"{_length(fit.best_L)} ({_length(fit.low)} to {_length(fit.high)} over draws, the times taken as they are)"


def _length(L: float) -> str:
    return f"{L:,.0f}" if L <= LONGEST else f"over {LONGEST:,}"


def _staleness_panel(rows: Sequence[Stale]) -> Panel:
    lines = []
    for name in dict.fromkeys(row.inputs for row in rows):
        mine = [row for row in rows if row.inputs == name and row.L]
        lines.append(Line(name, tuple(float(r.L) for r in mine), tuple(max(r.output_difference, 1e-12) for r in mine)))
    lines.append(Line("claimed", (float(FIRST), float(LAST)), (CLAIMED, CLAIMED), "dashes"))
    return Panel("Staleness", "content chunk L", "difference of outputs from L = 1", tuple(lines), True, True)


def _time_panel(title: str, timings: Sequence[Timing], named: bool) -> Panel:
    """Draw what was measured of each backend, `named` or not; the first's fit, and its time without a content gate."""
    backends = list(dict.fromkeys(t.backend for t in timings))
    first = [t for t in timings if t.L and t.backend == backends[0]]
    a, b = fit_time(first)
    x = tuple(float(t.L) for t in first)
    lines = []
    for backend in backends:
        mine = [t for t in timings if t.L and t.backend == backend]
        lines.append(
            Line(
                f"measured, {backend}" if named else "measured",
                tuple(float(t.L) for t in mine),
                tuple(t.seconds for t in mine),
                "points",
            )
        )
    lines.append(Line("fitted a + b / L", x, tuple(a + b / L for L in x), "dashes"))
    off = next((t.seconds for t in timings if not t.L), None)
    if off is not None:
        lines.append(Line("no content gate", (x[0], x[-1]), (off, off), "dashes"))
    return Panel(title, "content chunk L", "seconds, forward and backward", tuple(lines), True, len(backends) > 1)
