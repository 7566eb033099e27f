"""What the probes share of the recurrence: gates to run it with, its transition matrices, and recall through it.

May import kernels. Everything here is float64, one head, and small enough to be checked by hand.

Shapes: B batch, T time, K key dim, V value dim, n pairs, r content rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels import ContentGate, gated_delta_rule

F64 = torch.float64


class Tokens(NamedTuple):
    """What one head reads at every token: `q, k [B, T, K]` of unit length, `v [B, T, V]`, and its gates.

    `log_decay` and `erase_logits` are `[B, T, K]`, `correct` and `write` `[B, T]`; None is off.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    erase_logits: Tensor | None = None
    correct: Tensor | None = None
    write: Tensor | None = None


def run(
    tokens: Tokens,
    predict: str = "decayed",
    content: ContentGate | None = None,
    backend: str = "reference",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over one head; return the outputs `[B, T, V]` and the final state `[B, K, V]`."""
    q, k, v, log_decay, erase_logits, correct, write = (None if x is None else x.unsqueeze(2) for x in tokens)
    assert q is not None
    assert k is not None
    assert v is not None
    o, state = gated_delta_rule(
        *(q, k, v, log_decay, erase_logits, content, correct, write),
        predict=predict,
        scale=scale,
        backend=backend,
    )
    assert state is not None
    return o[:, :, 0], state.S[:, 0]


def over_heads(x: Tensor, B: int, H: int, dtype: torch.dtype) -> Tensor:
    """Lay sequences `[B H, T, ...]` out as heads `[B, T, H, ...]`, a leaf of its own."""
    return x.detach().to(dtype).unflatten(0, (B, H)).transpose(1, 2).contiguous()


def unit_keys(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw directions uniformly: `shape` with the last axis of unit length."""
    return F.normalize(torch.randn(*shape, generator=generator, dtype=F64, device=generator.device), dim=-1)


def orthogonal_keys(batch: int, n: int, K: int, generator: torch.Generator) -> Tensor:
    """Draw `n <= K` orthonormal keys for each of `batch` sequences: `[B, n, K]`."""
    q, _ = torch.linalg.qr(torch.randn(batch, K, K, generator=generator, dtype=F64))
    return q.mT[:, :n]


def started_tokens(batch: int, T: int, K: int, V: int, generator: torch.Generator, spread: float = 1.0) -> Tokens:
    """Draw tokens whose gates are as `carve` starts (mixers/gates.py), with logits of standard deviation `spread`.

    Rates uniform in [1, 16], steps log-uniform in [.001, .1] a channel, erase logits around -5, tied gates around 1/2.
    On the generator's device.
    """
    words: dict[str, Any] = {"generator": generator, "dtype": F64, "device": generator.device}

    def normal(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, **words)

    rate = 1 + 15 * torch.rand(batch, 1, K, **words)
    step = (math.log(1e-3) + math.log(100) * torch.rand(batch, 1, K, **words)).exp()
    bias = step + torch.log(-torch.expm1(-step))
    beta = torch.sigmoid(normal(batch, T))
    return Tokens(
        q=unit_keys(batch, T, K, generator=generator),
        k=unit_keys(batch, T, K, generator=generator),
        v=torch.randn(batch, T, V, **words),
        log_decay=-rate * F.softplus(normal(batch, T, K) + bias),
        erase_logits=normal(batch, T, K) - 5,
        correct=beta,
        write=beta,
    )


def kept(tokens: Tokens) -> Tensor:
    """Return the diagonal of `D_t = exp(g_t) (1 - b_t)`, `[B, T, K]`: what is left of each channel after one token."""
    log_D = torch.zeros_like(tokens.k)
    if tokens.log_decay is not None:
        log_D = log_D + tokens.log_decay
    if tokens.erase_logits is not None:
        log_D = log_D - F.softplus(tokens.erase_logits)
    return log_D.exp()


def transitions(k: Tensor, kept: Tensor, correct: Tensor, predict: str) -> Tensor:
    """Return `A_t` with `S_t = A_t S_{t-1} + k_t (w_t v_t)^T`: `[..., K, K]`.

    `k`, `kept [..., K]`; `correct` is `e`, `[...]` or `[..., K]`. `A = (I - k (e k)^T) D` for `decayed`, and
    `D - k (e k)^T` for `stored`.
    """
    e = correct if correct.ndim == k.ndim else correct[..., None]
    outer = k[..., :, None] * (e * k)[..., None, :]
    D = torch.diag_embed(kept)
    return D - (outer * kept[..., None, :] if predict == "decayed" else outer)


def growth(A: Tensor, generator: torch.Generator, skip: int = 0) -> Tensor:
    """Return the top Lyapunov exponent of the products of `A [B, T, K, K]`, in nats a token: `[B]`.

    The state's columns all follow the same products, so this is the rate at which the homogeneous part of the state
    grows or fades. A random direction is carried along and renormalised (Benettin et al. 1980); the first `skip`
    tokens turn it towards the top direction and are not counted. `-inf` where the product is zero.
    """
    x = F.normalize(torch.randn(A.shape[0], A.shape[-1], 1, generator=generator, dtype=A.dtype), dim=1)
    total = torch.zeros(A.shape[0], dtype=A.dtype)
    for t in range(A.shape[1]):
        x = A[:, t] @ x
        norm = x.norm(dim=(1, 2), keepdim=True)
        x = x / norm.clamp_min(1e-300)
        if t >= skip:
            total = total + norm[:, 0, 0].log()
    return total / (A.shape[1] - skip)


def recall(keys: Tensor, values: Tensor, *, correct: bool = True) -> Tensor:
    """Write pairs one after another into an empty state, then read every key: `[B, n, V]`.

    One call of the recurrence with full writes, `correct` or not, followed by one token a query that writes nothing.
    """
    batch, n = keys.shape[:2]
    on = torch.cat([torch.ones(batch, n, dtype=F64), torch.zeros(batch, n, dtype=F64)], dim=1)
    tokens = Tokens(
        q=torch.cat([keys, keys], dim=1),
        k=torch.cat([keys, keys], dim=1),
        v=torch.cat([values, torch.zeros_like(values)], dim=1),
        correct=on if correct else None,
        write=on,
    )
    return run(tokens, backend="torch")[0][:, n:]


def largest_error(read: Tensor, values: Tensor) -> float:
    """Return the largest error among reads `[B, n, V]`, relative to the largest value (one may be near zero)."""
    return float((read - values).norm(dim=-1).max() / values.norm(dim=-1).max())
