"""The chunkability boundary: what an erase mask over value channels does to the chunkwise form.

The plain form is written out here, token by token, and held to the `reference` backend. In a chunk, value channel j
then has decays of its own, `M_t[j]` the product of its mask up to token t, and with it a triangular system of its own:

    A_j[i, s] = A[i, s] M_i'[j] / M_s[j]        N[:, j] = (I + A_j)^-1 R[:, j]

where i' is i with predict=decayed and i - 1 with stored. One solve cannot serve them all unless the mask is one number
for all value channels. Times are of the CPU, and of a GPU with device cuda.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels import gated_delta_rule
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement
from hybridzoo.studies.theory.rule import F64, Tokens, over_heads, run, started_tokens
from hybridzoo.studies.theory.timing import WARM, fused_refusal, gpu_facts, in_words, median_seconds

EXACT = 1e-10
APART = 2.0  # times as long from which on one form is said to be slower than another
KEY_LOOP, LOOP, MANY = "key-axis, token by token", "value-axis, token by token", "value-axis, a solve a channel"


class Solve(NamedTuple):
    """One way of solving a chunk's systems, and its relative error from the token loop."""

    mask: str
    solve: str
    systems: int
    relative_error: float


class Timing(NamedTuple):
    """Seconds of a forward and backward pass, and the ratio to the key-axis chunkwise form there."""

    T: int
    form: str
    seconds: float
    slowdown: float
    device: str = "cpu"


def by_token(tokens: Tokens, erase_value: Tensor, predict: str = "decayed") -> tuple[Tensor, Tensor]:
    """Run the recurrence with a value-axis erase, in plain words; return `o [B, T, V]` and the final state `[B, K, V]`.

    `erase_value [B, T, V]` are logits of the mask: `S <- S diag(1 - sigmoid)` beside the decay of key channels.
    """
    q, k, v, log_decay, erase_logits, correct, write = tokens
    S = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
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
    S = tokens.k.new_zeros(tokens.k.shape[0], tokens.k.shape[2], tokens.v.shape[2])
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
    device, where = settings.resolve_device(), settings.device_name
    on_gpu = time_on(device, settings) if device.type == "cuda" else []
    found = {(row.mask, row.solve): row.relative_error for row in solves}
    lost = found["one a value channel", "one shared"]
    own = found["one a value channel", "one a value channel"]
    longest = max(row.T for row in timings)
    slow = {row.form: row for row in timings if longest == row.T}
    loop, many = slow[LOOP], slow[MANY]
    statements = (
        Statement(
            "A value-axis erase has no chunkwise form with one triangular solve for all value channels.",
            HOLDS if lost > 1e-3 and own < EXACT else FAILS,
            f"one shared solve is off by {lost:.1%}; {V} solves, one a value channel, by {own:.0e}; with one number a "
            f"token for the mask a shared solve is off by {found['one number a token', 'one shared']:.0e}",
        ),
        _throughput(
            on_gpu,
            f"{where}, {in_words(gpu_shape(settings))}",
            f"on this CPU, over {longest} tokens, the token loop takes {loop.slowdown:.1f} times as long as the "
            f"key-axis chunkwise form; chunks with a solve a value channel take {many.slowdown:.1f} times",
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
            f"{loop.slowdown:.0f} times slower on this CPU over {longest} tokens{_on_gpu_in_words(on_gpu, where)}. But "
            f"a chunkwise form with a solve a value channel exists ({many.slowdown:.1f} times the key axis's time on "
            "this CPU), and neither half of necessary and sufficient holds."
        ),
        tables={
            "solves": Table("One chunk, by what its systems share", Solve._fields, tuple(solves)),
            "time": Table("Seconds, forward and backward", Timing._fields, (*timings, *on_gpu)),
        },
        shown=("solves", "time"),
        panels=(
            _panel("Time by length, on the CPU" if on_gpu else "Time by length", timings),
            *((_panel(f"Time by length, on {where}", on_gpu),) if on_gpu else ()),
        ),
        facts={
            "threads": torch.get_num_threads(),
            "device": where,
            **(gpu_facts(device, gpu_shape(settings), content=False) if on_gpu else {}),
        },
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
            LOOP: partial(_output, by_token, tokens, mask),
            MANY: partial(in_chunks, tokens, mask, C),
        }
        seconds = {name: _seconds(form, settings.pick(1, 3)) for name, form in forms.items()}
        rows += [Timing(T, name, taken, taken / seconds["key-axis, chunkwise"]) for name, taken in seconds.items()]
    return rows


def gpu_shape(settings: Settings) -> tuple[int, int, int, int]:
    """Return B, the longest T, H and K = V of what is timed on a GPU: the token loop keeps a state for every token."""
    return settings.pick((1, 32, 2, 16), (8, 1024, 12, 64))


def time_on(device: torch.device, settings: Settings, dtype: torch.dtype = torch.bfloat16) -> list[Timing]:
    """Time the same forms on `device`, over heads and in `dtype`: chunkwise by every backend that runs there.

    The value-axis loop is the `reference` backend's, beside the same without that mask. Chunks with a solve a value
    channel are the plain PyTorch of `in_chunks`, in float32.
    """
    B, longest, H, K = gpu_shape(settings)
    generator = torch.Generator(device).manual_seed(settings.seed)
    backends = ["torch"] if fused_refusal(device, content=False) else ["triton", "torch"]
    rows = []
    for T in settings.pick((longest,), (longest // 4, longest)):
        drawn = started_tokens(B * H, T, K, K, generator)
        mask, d_flat = (torch.randn(B * H, T, K, generator=generator, device=device) for _ in range(2))
        flat = [x.float().requires_grad_() for x in (*drawn, mask - 3) if x is not None]
        # [B, T, H] and what follows
        heads = [over_heads(x, B, H, dtype) for x in (*flat, d_flat)]
        d_heads = heads.pop()
        gates, both = [x.requires_grad_() for x in heads[:-1]], heads
        heads[-1].requires_grad_()
        forms = {
            **{f"key-axis, chunkwise ({backend})": partial(_pass, gates, d_heads, backend) for backend in backends},
            KEY_LOOP: partial(_pass, gates, d_heads, "reference"),
            LOOP: partial(_pass, both, d_heads, "reference"),
            MANY: partial(_pass_in_chunks, flat, d_flat, settings.pick(16, 32)),
        }
        # What is token by token takes about a second a call, and compiles nothing.
        often = {name: (3, 1) if name in (KEY_LOOP, LOOP, MANY) else (10, WARM) for name in forms}
        seconds = {
            name: median_seconds(form, device, *settings.pick((1, 1), often[name])) for name, form in forms.items()
        }
        first = next(iter(seconds.values()))
        rows += [Timing(T, name, taken, taken / first, device.type) for name, taken in seconds.items()]
    return rows


def _pass(leaves: Sequence[Tensor], d_o: Tensor, backend: str) -> None:
    """One forward and backward pass with gradients for all `leaves`: what `Tokens` holds, and perhaps a value mask."""
    q, k, v, log_decay, erase_logits, correct, write, *mask = leaves
    o, _ = gated_delta_rule(
        *(q, k, v, log_decay, erase_logits, None, correct, write),
        scale=1.0,
        erase_value=mask[0] if mask else None,
        backend=backend,
    )
    torch.autograd.grad(o, leaves, d_o)


def _pass_in_chunks(leaves: Sequence[Tensor], d_o: Tensor, C: int) -> None:
    """The same by a solve a value channel, over heads laid out as sequences."""
    torch.autograd.grad(in_chunks(Tokens(*leaves[:-1]), leaves[-1], C), leaves, d_o)


def _throughput(on_gpu: Sequence[Timing], where: str, said: str) -> Statement:
    """Judge by a GPU's times alone: what a CPU takes, `said` beside them, neither shows nor refutes the claim.

    A form that is exact and much faster than the loop refutes a collapse to it, as long as both are made of the same
    PyTorch operations.
    """
    text = "Throughput then collapses to that of the serial recurrence."
    if not on_gpu:
        return Statement(text, OPEN, f"{said}; the claim is about GPUs")
    T = max(row.T for row in on_gpu)
    found = {row.form: row for row in on_gpu if row.T == T}
    loop, many = found[LOOP], found[MANY]
    chunkwise = ", ".join(f"{name} {1e3 * row.seconds:.2f} ms" for name, row in found.items() if "chunkwise" in name)
    said = (
        f"on {where}, forward and backward: {chunkwise}; the reference backend's value-axis loop takes "
        f"{loop.slowdown:.0f} times as long as the first (without that mask {found[KEY_LOOP].slowdown:.0f}), and "
        f"chunks with a solve a value channel, PyTorch operations like the loop, {many.slowdown:.1f} times; a serial "
        f"kernel was not measured; {said}"
    )
    if loop.seconds > APART * many.seconds:
        return Statement(text, FAILS, said)
    return Statement(text, HOLDS if loop.slowdown > APART else OPEN, said)


def _on_gpu_in_words(on_gpu: Sequence[Timing], where: str) -> str:
    if not on_gpu:
        return ""
    last = {row.form: row for row in on_gpu}
    return (
        f", {last[LOOP].slowdown:.0f} times slower on {where}, where a solve a value channel is "
        f"{last[MANY].slowdown:.0f} times slower"
    )


def _chunk(tokens: Tokens, erase_value: Tensor, S: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """One chunk of `in_chunks`, from the state `S`: the chunkwise form with every M in its place."""
    q, k, v, log_decay, erase_logits, correct, write = tokens
    assert log_decay is not None
    assert erase_logits is not None
    assert correct is not None
    assert write is not None
    G = (log_decay - F.softplus(erase_logits)).cumsum(1)
    M = F.logsigmoid(-erase_value).cumsum(1)
    later = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).triu(1)[None, :, :, None]
    between = (G[:, :, None] - G[:, None]).masked_fill(later, 0.0).exp()  # above the diagonal it would overflow
    ratio = (M[:, :, None] - M[:, None]).masked_fill(later, 0.0).exp()  # [B, i, s, V]
    A = torch.einsum("bik,bisk,bsk->bis", correct[..., None] * k, between, k).tril(-1)
    P = torch.einsum("bik,bisk,bsk->bis", q, between, k).tril()
    held = M.exp()
    R = write[..., None] * v - held * ((correct[..., None] * k * G.exp()) @ S)
    # Each solve takes the diagonal as ones.
    if shared:
        mean = M.mean(-1)
        system = A * (mean[:, :, None] - mean[:, None]).masked_fill(later[..., 0], 0.0).exp()
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


def _panel(title: str, rows: Sequence[Timing]) -> Panel:
    lines = tuple(
        Line(
            form,
            tuple(float(r.T) for r in rows if r.form == form),
            tuple(r.seconds for r in rows if r.form == form),
        )
        for form in dict.fromkeys(row.form for row in rows)
    )
    return Panel(title, "tokens", "seconds, forward and backward", lines, True, True)
