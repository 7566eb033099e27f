"""The recurrence, token by token: the oracle that every fast path is tested against.

Plain autograd PyTorch in the dtype of its inputs, float64 too, so that it is its own gradient. Slow by design.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences (B, or the number packed into one row).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.state import ContentGate, DeltaState


@without_autocast
def reference_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    content: ContentGate | None,
    correct: Tensor | None,
    write: Tensor | None,
    state: DeltaState,
    *,
    predict: str,
    scale: float,
    cu_seqlens: Tensor | None,
    erase_value: Tensor | None = None,
) -> tuple[Tensor, DeltaState]:
    """Run the recurrence of `gated_delta_rule` one token at a time; arguments and results are as there.

    `erase_value [B, T, HV, V]` holds logits of a second erase mask, over value channels: `S <- S diag(1 - sigmoid)`.
    No chunkwise form shares one solve across value channels then, which is why it exists only here.
    """
    tokens = _Tokens(q, k, v, log_decay, erase_logits, correct, write, erase_value)
    if cu_seqlens is None:
        return _run(tokens, content, state, predict, scale)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        one = _Tokens(*(None if x is None else x[:, start:end] for x in tokens))  # type: ignore[arg-type]
        o, new = _run(one, content, DeltaState(*(field[n : n + 1] for field in state)), predict, scale)
        outputs.append(o)
        states.append(new)
    return torch.cat(outputs, dim=1), DeltaState(*(torch.cat(fields) for fields in zip(*states, strict=True)))


class _Tokens(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase_logits: Tensor | None
    correct: Tensor | None
    write: Tensor | None
    erase_value: Tensor | None


def _run(
    tokens: _Tokens, content: ContentGate | None, state: DeltaState, predict: str, scale: float
) -> tuple[Tensor, DeltaState]:
    q, k, v, log_decay, erase_logits, correct, write, erase_value = tokens
    S, o_sum, o_mean, count = state
    dtype = S.dtype
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v = v.to(dtype) if write is None else v.to(dtype) * _per_channel(write, 4).to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        log_D = torch.zeros_like(k[:, t])
        if log_decay is not None:
            log_D = log_D + _per_channel(log_decay[:, t], 3).to(dtype)
        if erase_logits is not None:
            z = erase_logits[:, t].to(dtype)
            log_D = log_D + F.logsigmoid(-(z if content is None else z + content_readout(content, o_mean)))
        decayed = log_D.exp()[..., None] * S  # D_t S_{t-1}
        if erase_value is not None:
            decayed = decayed * torch.sigmoid(-erase_value[:, t].to(dtype))[..., None, :]
        target = v[:, t]  # w_t * v_t
        if correct is not None:
            erase_key = _per_channel(correct[:, t], 3).to(dtype) * k[:, t]  # e_t * k_t
            target = target - torch.einsum("nhk,nhkv->nhv", erase_key, decayed if predict == "decayed" else S)
        S = decayed + k[:, t, :, :, None] * target[..., None, :]
        o = scale * torch.einsum("nhk,nhkv->nhv", q[:, t], S)
        outputs.append(o)
        if content is not None:
            o_sum, count = o_sum + o, count + 1
            full = (count == content.chunk)[:, None, None]
            o_mean = torch.where(full, o_sum / content.chunk, o_mean)
            o_sum = torch.where(full, torch.zeros_like(o_sum), o_sum)
            count = count % content.chunk
    o = torch.stack(outputs, dim=1) if outputs else v
    return o, DeltaState(S, o_sum, o_mean, count)


def content_readout(content: ContentGate, o_mean: Tensor) -> Tensor:
    """`u_c = U2 tanh(U1 m_c)` `[N, HV, K]` from the mean output `m_c [N, HV, V]` (CARVE eq. 7)."""
    down, up = (x.to(o_mean.dtype) for x in content[:2])
    hidden = torch.tanh(torch.einsum("hrv,nhv->nhr", down, o_mean))
    return torch.einsum("hkr,nhr->nhk", up, hidden)


def _per_channel(gate: Tensor, ndim: int) -> Tensor:
    return gate if gate.ndim == ndim else gate[..., None]
