"""Calls of softmax attention drawn at random, and how far a backend's results are from the reference's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybridzoo.mixers.softmax import SoftmaxRule, attend, attend_packed


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of one call: a batch behind a cache, or with `lengths` sequences packed behind one."""

    tensors: dict[str, Tensor]  # q, k, v and, of the cache, old_k, old_v
    rule: SoftmaxRule
    length: Tensor
    lengths: tuple[int, ...] | None

    def results(self, backend: str, gradients: bool = True) -> dict[str, Tensor]:
        """The output `y` and every gradient by name, in float32 or wider."""
        leaves = {n: x.clone().requires_grad_(gradients) for n, x in self.tensors.items()}
        rule = self.rule._replace(backend=backend)
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        if self.lengths is None:
            keys, values = torch.cat([leaves["old_k"], k], 1), torch.cat([leaves["old_v"], v], 1)
            y = attend(q, keys, values, rule, self.length if leaves["old_k"].shape[1] else None)
        else:
            bounds = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=q.device)
            cache = (leaves["old_k"], leaves["old_v"])
            y = attend_packed(q[0], k[0], v[0], rule, bounds, cache, self.length)[None]
        found = {"y": y.detach()}
        if gradients:
            generator = torch.Generator().manual_seed(5)
            d_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            names = [n for n, x in leaves.items() if x.numel()]
            made = torch.autograd.grad(y, [leaves[n] for n in names], d_y)
            found |= {f"d_{n}": x for n, x in zip(names, made, strict=True)}
        return found

    def to(self, *what: Any) -> AttentionProblem:
        """The same on a device, or rounded to a dtype."""
        length = self.length.to(*[w for w in what if not isinstance(w, torch.dtype)]) if what else self.length
        return replace(self, tensors={n: x.to(*what) for n, x in self.tensors.items()}, length=length)


def make_attention(
    T: int = 9,
    heads: tuple[int, int] = (4, 2),
    D: int = 8,
    window: int | None = None,
    softcap: float | None = None,
    cached: tuple[int, ...] = (0, 0),
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
) -> AttentionProblem:
    """Draw a call in float64.

    `heads` are H and H_kv; `cached` says how many tokens each row, or each packed sequence, has seen. With a window no
    more than it are kept. `lengths` packs sequences into one row; else there are as many rows as `cached` has numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, tokens = (len(cached), T) if lengths is None else (1, sum(lengths))
    C = max(cached) if window is None else min(window, max(cached))
    H, H_kv = heads
    tensors = {
        "q": 2 * draw(B, tokens, H, D),
        "k": draw(B, tokens, H_kv, D),
        "v": draw(B, tokens, H_kv, D),
        "old_k": draw(len(cached), C, H_kv, D),
        "old_v": draw(len(cached), C, H_kv, D),
    }
    rule = SoftmaxRule(D**-0.5, window, softcap)
    return AttentionProblem(tensors, rule, torch.tensor(cached, dtype=torch.int32), lengths)


def apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; gradients that nearly vanish are held against that of v."""
    assert found.keys() == truth.keys()
    floor = 1e-3 * truth["d_v"].double().norm().item() if "d_v" in truth else 0.0
    errors = {}
    for name, want in truth.items():
        got, want = found[name].double().cpu(), want.double().cpu()
        assert torch.isfinite(got).all(), f"{name} is not finite"  # max() of errors would pass over a NaN
        errors[name] = (got - want).norm().item() / max(want.norm().item(), floor, 1e-30)
    return errors
