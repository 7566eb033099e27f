"""Softmax attention as a token mixer: full or sliding window, grouped heads, RoPE or none, with a cache.

Projections are named as in Llama checkpoints. May import kernels; the attention itself is in softmax.py.

Shapes: B batch, T time, C cached slots, H query heads, H_kv key heads, D head dim, N sequences, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hybridzoo.kernels.norms import l2_norm
from hybridzoo.kernels.packing import locate
from hybridzoo.kernels.rotary import rotary
from hybridzoo.mixers.base import ConvInit, MixerConfig, QkInit, TokenMixer, require_above_zero, require_positive
from hybridzoo.mixers.parts import RMSNorm, ShortConvolution, count_sequences
from hybridzoo.mixers.registry import register_mixer
from hybridzoo.mixers.schema import SpecError
from hybridzoo.mixers.softmax import AttentionBackend, SoftmaxRule, append_packed, attend, attend_packed


class AttentionState(NamedTuple):
    """`conv`: tails `[N, channels, W-1]` of q, k and v, or none; `k, v [N, C, H_kv, D]` right-aligned; `length [N]`.

    Slot `c` of row `n` holds position `length[n] - C + c`, rotated already; a negative position is an empty slot. With
    a window, C never exceeds it.
    """

    conv: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    length: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Words of `attention`. `head_dim` is `d_model / n_heads` unless given; `n_kv_heads` is `n_heads`.

    `window` counts the token itself. `qk_norm`: `rmsnorm` has a learned weight over the head's channels; `l2` has none
    and scores are then `sqrt(D) cos(q, k)`. `output_gate` multiplies the heads by `sigmoid(g_proj(x))` before `o_proj`
    (arXiv 2505.06708). `softcap` bounds scores as `c tanh(s / c)`, at the price of holding them all.
    """

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope: bool = True
    rope_base: float = 10000.0
    qk_norm: Literal["none", "rmsnorm", "l2"] = "none"
    output_gate: bool = False
    softcap: float | None = None
    qkv_bias: bool = False
    conv_size: int = 0
    conv_init: ConvInit = "default"
    qk_init: QkInit = "independent"
    norm_eps: float = 1e-5
    backend: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "window")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise SpecError(f".n_heads: {self.n_heads} does not divide d_model {self.d_model}, and head_dim is not set")
        if self.n_heads % self.kv_heads:
            raise SpecError(f".n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.rope and self.dim % 2:
            raise SpecError(f".head_dim: rope turns pairs of channels and needs an even size, got {self.dim}")
        if self.conv_size < 0:
            raise SpecError(f".conv_size: must be 0 (none) or more, got {self.conv_size}")
        require_above_zero(self, "rope_base", "softcap", "norm_eps")

    @property
    def dim(self) -> int:
        """D, the size of a head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """H_kv."""
        return self.n_kv_heads or self.n_heads

    @property
    def resolved(self) -> dict[str, Any]:
        return {"n_kv_heads": self.kv_heads, "head_dim": self.dim}


@register_mixer(
    "attention",
    source="Vaswani 2017, arXiv 1706.03762; grouped heads 2305.13245; RoPE 2104.09864",
    summary="softmax attention, full or over a sliding window",
)
class Attention(TokenMixer):
    """Softmax attention with a right-aligned cache of keys and values. Words: `AttentionConfig`."""

    Config: ClassVar[type[MixerConfig]] = AttentionConfig
    config: AttentionConfig

    def _build(self) -> None:
        c = self.config
        inner, kv = c.n_heads * c.dim, c.kv_heads * c.dim
        self.q_proj = nn.Linear(c.d_model, inner, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, kv, bias=c.qkv_bias)
        self.g_proj = nn.Linear(c.d_model, inner, bias=False) if c.output_gate else None
        self.o_proj = nn.Linear(inner, c.d_model, bias=False)
        self.q_conv1d = ShortConvolution(inner, c.conv_size) if c.conv_size else None
        self.k_conv1d = ShortConvolution(kv, c.conv_size) if c.conv_size else None
        self.v_conv1d = ShortConvolution(kv, c.conv_size) if c.conv_size else None
        self.q_norm = RMSNorm(c.dim, c.norm_eps) if c.qk_norm == "rmsnorm" else None
        self.k_norm = RMSNorm(c.dim, c.norm_eps) if c.qk_norm == "rmsnorm" else None
        # l2: unit vectors times sqrt(D) each, as RMS norms without weights would have them.
        scale = c.dim**0.5 if c.qk_norm == "l2" else c.dim**-0.5
        self.rule = SoftmaxRule(scale, c.window, c.softcap, c.backend)

    @property
    def _convs(self) -> tuple[ShortConvolution, ...]:
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return tuple(conv for conv in convs if conv is not None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every projection as `nn.Linear` does and every convolution by `conv_init`; `qk_init` last."""
        for module in self.children():
            if isinstance(module, ShortConvolution):
                module.reset_parameters(self.config.conv_init)
            elif isinstance(module, (nn.Linear, RMSNorm)):
                module.reset_parameters()
        if self.config.qk_init == "equal":
            self._copy_queries_to_keys()

    def _copy_queries_to_keys(self) -> None:
        # A key head takes the rows of the first query head that reads it.
        c = self.config
        pairs = [(self.q_proj.weight, self.k_proj.weight)]
        if self.q_proj.bias is not None and self.k_proj.bias is not None:
            pairs.append((self.q_proj.bias, self.k_proj.bias))
        if self.q_conv1d is not None and self.k_conv1d is not None:
            pairs.append((self.q_conv1d.weight, self.k_conv1d.weight))
        for query, key in pairs:
            heads = query.view(c.kv_heads, c.n_heads // c.kv_heads, c.dim, *query.shape[1:])
            key.copy_(heads[:, 0].reshape(key.shape))

    def forward(
        self, x: Tensor, state: AttentionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend; see `TokenMixer.forward`. Raises `ValueError` for a state of another batch or mixer."""
        c = self.config
        N = count_sequences(x, self.q_proj.weight, cu_seqlens)
        T = x.shape[1]
        if state is not None:
            self._check_state(state, N)
        tails = state.conv if state is not None else (None,) * len(self._convs)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        new_tails = []
        for i, (conv, tail) in enumerate(zip(self._convs, tails, strict=True)):
            projected[i], new_tail = conv(projected[i], tail, cu_seqlens)
            new_tails.append(new_tail)
        q, k, v = (p.unflatten(-1, (p.shape[-1] // c.dim, c.dim)) for p in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif c.qk_norm == "l2":
            q, k = l2_norm(q), l2_norm(k)
        if cu_seqlens is None:
            y, kept = self._batched(q, k, v, state)
            length = torch.full((N,), T, dtype=torch.int32, device=x.device)
        else:
            y, kept = self._packed(
                q, k, v, state if state is not None else self.init_state(N, x.device, k.dtype), cu_seqlens
            )
            length = cu_seqlens.diff().int()
        y = y.flatten(-2)
        if self.g_proj is not None:
            y = y * torch.sigmoid(self.g_proj(x))
        if state is not None:
            length = length + state.length
        return self.o_proj(y), AttentionState(tuple(new_tails), *kept, length)

    def _batched(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        positions = torch.arange(q.shape[1], device=q.device)[None]
        length = None
        if state is not None:
            length = state.length
            positions = positions + length[:, None]
        if self.config.rope:
            q, k = rotary(q, k, positions, self.config.rope_base)
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        y = attend(q, k, v, self.rule, length)
        first = 0 if self.config.window is None else max(0, k.shape[1] - self.config.window)
        if first:  # a copy: a view would keep every older key alive for as long as the state lives
            k, v = k[:, first:].clone(), v[:, first:].clone()
        return y, (k, v)

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, cu_seqlens: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.config.rope:
            sequence, position = locate(cu_seqlens, q.shape[1])
            q, k = rotary(q, k, (position + state.length[sequence])[None], self.config.rope_base)
        y = attend_packed(q[0], k[0], v[0], self.rule, cu_seqlens, (state.k, state.v), state.length)
        window = self.config.window
        return y[None], (
            append_packed(state.k, k[0], cu_seqlens, window),
            append_packed(state.v, v[0], cu_seqlens, window),
        )

    def init_state(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """Return an empty cache for `n` sequences."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = tuple(conv.init_tail(n, device, dtype) for conv in self._convs)
        k, v = (torch.zeros(n, 0, self.config.kv_heads, self.config.dim, device=device, dtype=dtype) for _ in "kv")
        return AttentionState(conv, k, v, torch.zeros(n, dtype=torch.int32, device=device))

    def _check_state(self, state: AttentionState, n: int) -> None:
        c = self.config
        if not isinstance(state, AttentionState):
            raise ValueError(
                f"attention: expected an AttentionState, got {type(state).__name__}: another mixer's state"
            )
        C = state.k.shape[1] if state.k.dim() == 4 else 0
        expected = (n, C, c.kv_heads, c.dim)
        for name, field in (("k", state.k), ("v", state.v)):
            if tuple(field.shape) != expected:
                raise ValueError(
                    f"attention: state.{name} must be [N, C, H_kv, D] = {list(expected)}, got {list(field.shape)}"
                )
        if tuple(state.length.shape) != (n,):
            raise ValueError(f"attention: state.length must be [N] = [{n}], got {list(state.length.shape)}")
        if len(state.conv) != len(self._convs):
            raise ValueError(f"attention: state holds {len(state.conv)} convolution tails, needs {len(self._convs)}")
        if c.window is not None and c.window < C:
            raise ValueError(f"attention: state holds {C} slots, more than the window of {c.window}")

    def state_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Cached keys and values, the convolutions' tails, and the length."""
        tails = sum(conv.channels * (conv.size - 1) for conv in self._convs) * dtype.itemsize
        return self.kv_bytes(context, dtype) + tails + 4

    def kv_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """A key and a value of `H_kv D` each for the last `min(context, window)` tokens."""
        c = self.config
        kept = context if c.window is None else min(context, c.window)
        return 2 * kept * c.kv_heads * c.dim * dtype.itemsize

    def flops_per_token(self, context: int, decode: bool = False) -> int:
        """Projections, convolutions, and two products of size D for each query head and visible key."""
        c = self.config
        inner, kv = c.n_heads * c.dim, c.kv_heads * c.dim
        projections = 2 * c.d_model * (2 * inner + 2 * kv + (inner if c.output_gate else 0))  # q, o; k, v; gate
        convolutions = 2 * sum(conv.channels * conv.size for conv in self._convs)
        return round(projections + convolutions + 4 * inner * self._visible(context, decode))

    def _visible(self, context: int, decode: bool) -> float:
        # Keys that a query sees. Token t of n sees min(t, w): with w <= n, w(w+1)/2 pairs in the growing part and w for
        # each of the n - w tokens after it; the mean over tokens counts causal pairs exactly.
        n, w = context, self.config.window
        if decode:
            return n + 1 if w is None else min(n + 1, w)
        w = n if w is None else min(n, w)
        return (w * (w + 1) / 2 + (n - w) * w) / n if n else 0
