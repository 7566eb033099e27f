"""The two structures that `gated_delta_rule` takes and gives besides plain tensors.

Shapes: N sequences, HV value heads, K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ContentGate(NamedTuple):
    """CARVE's content readout (arXiv 2606.27229v2, eqs. 5-10): `u_c = up tanh(down m_c)`, renewed every `chunk` tokens.

    `down [HV, r, V]`, `up [HV, K, r]`; a pair shared by all heads is an expanded view. `m_c` is the mean of the scaled
    output over the previous content chunk of the same sequence and head, zero in the first.
    """

    down: Tensor
    up: Tensor
    chunk: int = 64


class DeltaState(NamedTuple):
    """Where a sequence stands: all that later tokens need of earlier ones. A pytree of tensors.

    `S [N, HV, K, V]`, and for the content gate `o_sum [N, HV, V]` (sum of outputs in the open content chunk), `o_mean
    [N, HV, V]` (mean over the last full one) and `count [N]` int32 (tokens in the open chunk, below L), all on the
    device. Without a content gate `o_sum` and `o_mean` are `[N, HV, 0]` and `count` is zero. float32, or float64 where
    the inputs are.
    """

    S: Tensor
    o_sum: Tensor
    o_mean: Tensor
    count: Tensor  # type: ignore[assignment]  # the word of the design; nobody counts fields

    @staticmethod
    def zeros(
        n: int,
        n_v_heads: int,
        head_dim: int,
        head_v_dim: int,
        content: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DeltaState:
        """Return the state of `n` sequences before their first token."""
        tail = head_v_dim if content else 0
        return DeltaState(
            S=torch.zeros(n, n_v_heads, head_dim, head_v_dim, device=device, dtype=dtype),
            o_sum=torch.zeros(n, n_v_heads, tail, device=device, dtype=dtype),
            o_mean=torch.zeros(n, n_v_heads, tail, device=device, dtype=dtype),
            count=torch.zeros(n, device=device, dtype=torch.int32),
        )
