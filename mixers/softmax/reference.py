"""Softmax attention as it is defined, its scores held whole: any device and dtype, and what the others are held to.

Shapes: B batch, T queries, S keys, H query heads, H_kv key heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.mixers.softmax.dense import dense_attend, dense_attend_packed
from hybridzoo.mixers.softmax.rule import Backend, Call, SoftmaxRule


def refusal(call: Call) -> str | None:
    """It takes everything."""
    return None


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: SoftmaxRule) -> Tensor:
    """`softmax(cap(scale * q k^T)) v` in float32 or wider, given back in v's dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.to(wide)).to(v.dtype)


REFERENCE = Backend(
    "reference",
    "plain products, all scores held: any device and dtype",
    ("torch",),
    refusal,
    dense_attend(products),
    dense_attend_packed(products),
)
