"""Attention by xformers' `memory_efficient_attention`, with its causal, local and block-diagonal biases.

Its kernels take grouped heads in forward passes only, so keys and values are repeated; its block-diagonal biases want
lengths that the host knows, so the first layer reads `cu_seqlens`, and each layer behind a cache reads its own.

Shapes: B batch, T new tokens, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridzoo.mixers.memory import host_counts
from hybridzoo.mixers.softmax.imports import device_refusal, import_refusal
from hybridzoo.mixers.softmax.packed import line_up
from hybridzoo.mixers.softmax.rule import Backend, Call, SoftmaxRule

LARGEST_HEAD = 256
HEAD_STEP = 8


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None; read from its interface at version 0.0.35."""
    if (why := device_refusal(call.device, call.number, (8, 0))) is not None:
        return why
    if call.softcap:
        return "has no soft-cap: use backend='flex' or 'flash'"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16 here, got {call.dtype}: use backend='sdpa' or 'flex'"
    if call.head_dim % HEAD_STEP or call.head_dim > LARGEST_HEAD:
        return f"takes head sizes that are multiples of {HEAD_STEP} up to {LARGEST_HEAD}, got {call.head_dim}"
    if call.compiling:
        return "cannot be traced by a compiler: use backend='flex'"
    if (why := import_refusal("xformers.ops", "memory_efficient_attention", "xformers")) is not None:
        return why
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    # The package imports without these, and says so only when it is called. Its others have no gradient of a window.
    from xformers.ops import fmha

    if fmha.flash.FwOp.is_available():
        return None
    return "has no flash kernels here: `python -m xformers.info` says what it found"


def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None) -> Tensor:
    """A batch without a cache."""
    from xformers.ops.fmha import attn_bias

    bias = attn_bias.LowerTriangularFromBottomRightMask()
    return _run(q, k, v, rule, bias if rule.window is None else bias.make_local_attention(rule.window))


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    cu_seqlens: Tensor,
    cache: tuple[Tensor, Tensor],
    length: Tensor,
) -> Tensor:
    """N sequences in one call."""
    from xformers.ops.fmha import attn_bias

    line = line_up(k, v, cu_seqlens, cache, length)
    queries = host_counts(cu_seqlens)
    keys = host_counts(line.bounds) if cache[0].shape[1] else queries
    whole = attn_bias.BlockDiagonalMask.from_seqlens(queries, keys, device=q.device)
    if rule.window is None:
        bias = whole.make_causal_from_bottomright()
    else:
        bias = whole.make_local_attention_from_bottomright(rule.window)
    end = sum(keys)
    return _run(q[None], line.k[None, :end], line.v[None, :end], rule, bias)[0]


def _run(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, bias: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    made: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=rule.scale)
    return made


XFORMERS = Backend(
    "xformers",
    "memory_efficient_attention: 16 bits, no soft-cap",
    ("xformers",),
    refusal,
    attend,
    attend_packed,
    masks_empty_slots=False,
    caps=False,
)
