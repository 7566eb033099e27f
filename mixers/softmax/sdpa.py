"""Attention by `torch.nn.functional.scaled_dot_product_attention`, which picks among torch's own fused kernels.

Shapes: B batch, T queries, S keys, H query heads, H_kv key heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.mixers.softmax.dense import dense_attend, dense_attend_packed
from hybridzoo.mixers.softmax.rule import Backend, Call, SoftmaxRule


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.softcap:
        return "has no soft-cap: use backend='reference', or on a GPU 'flex' or 'flash'"
    return None


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: SoftmaxRule) -> Tensor:
    """One call of torch's, shaped so that a fused kernel takes it."""
    B, H, T, D = q.shape
    groups = H // k.shape[1]
    if T == 1 and groups > 1:
        # One query a row: let a group's heads be the rows of one product, so that keys and values are read once.
        y = F.scaled_dot_product_attention(q.reshape(B, -1, groups, D), k, v, attn_mask=mask, scale=rule.scale)
        return y.reshape(B, H, 1, D)
    if groups > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Of CUDA's fused kernels, those that take a mask or float32 know no grouped heads; the fallback would hold all
        # T x S scores.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    grouped = False
    if groups > 1:  # a plain bool, also where a compiler has made the head counts symbols
        grouped = True
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=grouped
    )


SDPA = Backend(
    "sdpa",
    "torch's own fused kernels, a mask for windows: any device and dtype",
    ("torch",),
    refusal,
    dense_attend(products),
    dense_attend_packed(products),
    caps=False,
)
