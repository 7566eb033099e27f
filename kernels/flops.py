"""FLOPs of the gated delta rule: one formula for accounts, and for torch's FlopCounterMode, which reads 0 without it.

Shapes: T tokens of all sequences, HV value heads, K key dim, V value dim, C tokens in a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels import chunkwise_op as _registers_chunkwise  # noqa: F401
from hybridzoo.kernels.fused import op as _registers_fused  # noqa: F401
from hybridzoo.kernels.fused import step_op as _registers_step  # noqa: F401
from hybridzoo.kernels.tiles import MAX_TILE


def gated_delta_rule_flops(
    tokens: int, n_v_heads: int, head_dim: int, head_v_dim: int, corrected: bool, decode: bool = False
) -> int:
    """Forward FLOPs of `tokens` tokens, a multiply-add counted as 2 and element-wise work left out.

    In tiles of C = 64, a token and head costs `2CK + 2CV` for its pairs and what they read, and `4KV` to read and write
    the state; a correction adds `2CK` for its pairs, `2C^2/3` for the triangular inverse, `2CK + 2CV` to apply it, and
    `2KV` to predict. Decoding goes through the recurrence itself: `2KV` each to read and write, `2KV` to predict.
    """
    C, K, V = MAX_TILE, head_dim, head_v_dim
    if decode:
        return tokens * n_v_heads * (6 if corrected else 4) * K * V
    per_token = 2 * C * (K + V) + 4 * K * V
    if corrected:
        per_token += 2 * C * (2 * K + V) + 2 * C * C // 3 + 2 * K * V
    return tokens * n_v_heads * per_token


@register_flop_formula([torch.ops.hybridzoo.chunkwise_delta_rule, torch.ops.hybridzoo.fused_delta_rule])
def _forward(q: Any, k: Any, v: Any, *gates: Any, out_shape: Any = None, **options: Any) -> int:
    return _from_shapes(q, v, gates)


@register_flop_formula(
    [torch.ops.hybridzoo.chunkwise_delta_rule_backward, torch.ops.hybridzoo.fused_delta_rule_backward]
)
def _backward(q: Any, k: Any, v: Any, *gates: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * _from_shapes(q, v, gates)


@register_flop_formula([torch.ops.hybridzoo.fused_step, torch.ops.hybridzoo.fused_step_])
def _step(q: Any, k: Any, v: Any, *gates: Any, out_shape: Any = None, **options: Any) -> int:
    return _from_shapes(q, v, gates, decode=True)


def _from_shapes(q: Any, v: Any, gates: tuple[Any, ...], decode: bool = False) -> int:
    B, T, _, K = q
    HV, V = v[2:]
    correct = gates[4]  # after log_decay, erase_logits, down and up
    return gated_delta_rule_flops(B * T, HV, K, V, corrected=correct is not None, decode=decode)
