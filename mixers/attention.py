"""Softmax attention as a token mixer: full or sliding window, grouped heads, RoPE or none, with a cache.

Projections are named as in Llama checkpoints. May import kernels; the attention itself is in softmax/.

Shapes: B batch, T time, C cached slots, H query heads, H_kv key heads, D head dim, N sequences, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hybridzoo.kernels.norms import l2_norm
from hybridzoo.kernels.packing import locate
from hybridzoo.mixers.base import ConvInit, MixerConfig, QkInit, TokenMixer, require_above_zero, require_positive
from hybridzoo.mixers.kv_cache import KVCache, append, cut
from hybridzoo.mixers.parts import RMSNorm, ShortConvolution, count_sequences, length_after
from hybridzoo.mixers.registry import register_mixer
from hybridzoo.mixers.rope import Rope, RopeScaling, Turn, turn_to, turned
from hybridzoo.mixers.schema import SpecError
from hybridzoo.mixers.softmax import BACKENDS, AttentionBackend, SoftmaxRule, append_packed, attend, attend_packed

MOST_TOKENS = 2**31 - 1  # what a position is counted in
MOST_SOFTCAP, MOST_FACTOR = 1e30, 1e9  # far above any use, and in float32 still numbers whose arithmetic is finite


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
    """Words of `attention`."""

    n_heads: Annotated[int, "heads of q"]
    n_kv_heads: Annotated[int | None, "heads of k and v, a divisor of n_heads; n_heads unless given"] = None
    head_dim: Annotated[int | None, "channels of a head; d_model / n_heads unless given"] = None
    window: Annotated[int | None, "latest tokens that a token sees, itself among them; none is all"] = None
    rope: Annotated[bool, "turn q and k by their positions (RoPE)"] = True
    rope_base: Annotated[float, "the base that sets how fast channel pairs turn"] = 10000.0
    rope_scaling: Annotated[RopeScaling, "how positions are stretched for contexts longer than those trained on"] = (
        "none"
    )
    rope_factor: Annotated[float, "by how much, at least 1"] = 1.0
    rope_context: Annotated[int | None, "tokens that the model was trained on, which yarn needs"] = None
    qk_norm: Annotated[
        Literal["none", "rmsnorm", "l2"],
        "norm of q and k in each head: rmsnorm has learned weights; l2 has none, scores are sqrt(head_dim) cos(q, k)",
    ] = "none"
    output_gate: Annotated[bool, "multiply the heads by sigmoid(g_proj(x)) before o_proj (arXiv 2505.06708)"] = False
    softcap: Annotated[float | None, "c, bounds scores s as c tanh(s / c)"] = None
    qkv_bias: Annotated[bool, "biases in the projections of q, k and v"] = False
    conv_size: Annotated[int, "taps of a short causal convolution on each of q, k and v; 0 is none"] = 0
    conv_init: ConvInit = "default"
    qk_init: QkInit = "independent"
    norm_eps: Annotated[float, "epsilon of qk_norm=rmsnorm"] = 1e-5
    backend: Annotated[AttentionBackend, "what computes it; one that cannot is an error when it is called"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "n_kv_heads", "head_dim", "window", "rope_context")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise SpecError(f".n_heads: {self.n_heads} does not divide d_model {self.d_model}, and head_dim is not set")
        if self.n_heads % self.kv_heads:
            raise SpecError(f".n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.rope and self.dim % 2:
            raise SpecError(f".head_dim: rope turns pairs of channels and needs an even size, got {self.dim}")
        if self.conv_size < 0:
            raise SpecError(f".conv_size: must be 0 (none) or more, got {self.conv_size}")
        require_above_zero(self, "rope_base", "softcap", "norm_eps")
        if self.window is not None and self.window > MOST_TOKENS:
            raise SpecError(f".window: must be at most {MOST_TOKENS:,}, got {self.window:,}; null is all tokens")
        if self.softcap is not None and self.softcap > MOST_SOFTCAP:
            raise SpecError(f".softcap: must be at most {MOST_SOFTCAP:g}, got {self.softcap:g}; null is no soft-cap")
        if self.softcap is not None and self.backend != "auto" and not BACKENDS[self.backend].caps:
            able = ", ".join(name for name, backend in BACKENDS.items() if backend.caps)
            raise SpecError(f".backend: {self.backend!r} has no soft-cap (softcap is {self.softcap}); with one: {able}")
        self._check_scaling()

    def _check_scaling(self) -> None:
        if not 1 <= self.rope_factor <= MOST_FACTOR:
            raise SpecError(f".rope_factor: must be a number from 1 to {MOST_FACTOR:g}, got {self.rope_factor}")
        if self.rope_scaling == "none":
            if self.rope_factor != 1:
                raise SpecError(f".rope_factor: {self.rope_factor} needs a rope_scaling: linear, ntk or yarn")
            return
        if not self.rope:
            raise SpecError(f".rope_scaling: {self.rope_scaling!r} needs rope")
        if self.rope_scaling == "yarn" and self.rope_context is None:
            raise SpecError(".rope_context: 'yarn' needs the number of tokens that the model was trained on")
        if self.rope_scaling == "yarn" and self.rope_base <= 1:
            raise SpecError(f".rope_base: 'yarn' needs a base above 1, got {self.rope_base}")

    @property
    def dim(self) -> int:
        """D, the size of a head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rotation(self) -> Rope:
        """How positions turn queries and keys."""
        return Rope(self.rope_base, self.rope_scaling, self.rope_factor, self.rope_context)

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
        self, x: Tensor, state: AttentionState | KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | KVCache]:
        """Attend; see `TokenMixer.forward`. Raises `ValueError` for a state of another batch or mixer."""
        c = self.config
        N = count_sequences(x, self.q_proj.weight, cu_seqlens)
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
        if c.rope:
            q, k = turned(q, k, self._turn(q, state, cu_seqlens))
        kept: AttentionState | KVCache
        if isinstance(state, KVCache):
            y, kept = self._cached(q, k, v, state, tuple(new_tails), cu_seqlens)
        elif cu_seqlens is None:
            y, kept = self._batched(q, k, v, state, tuple(new_tails))
        else:
            fresh = self.init_state(N, x.device, k.dtype) if state is None else state
            y, kept = self._packed(q, k, v, fresh, tuple(new_tails), cu_seqlens)
        y = y.flatten(-2)
        if self.g_proj is not None:
            y = y * torch.sigmoid(self.g_proj(x))
        return self.o_proj(y), kept

    def _turn(self, q: Tensor, state: AttentionState | KVCache | None, cu_seqlens: Tensor | None) -> Turn:
        """What turns `q [B, T, H, D]` to its positions, which go on from the state's length."""
        length, T, rotation = None if state is None else state.length, q.shape[1], self.config.rotation
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32

        def batched() -> Turn:
            positions = torch.arange(T, device=q.device)[None]
            return turn_to(positions if length is None else positions + length[:, None], q.shape[3], rotation, wide)

        if cu_seqlens is not None:
            sequence, position = locate(cu_seqlens, T)
            positions = position if length is None else position + length[sequence]
            return turn_to(positions[None], q.shape[3], rotation, wide)
        return state.once(("turn", rotation, q.shape[3], wide, T), batched) if isinstance(state, KVCache) else batched()

    def _batched(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, tails: tuple[Tensor, ...]
    ) -> tuple[Tensor, AttentionState]:
        seen = None
        if state is not None:
            seen, k, v = state.length, append(state.k, k), append(state.v, v)
        y = attend(q, k, v, self.rule, seen)
        window = self.config.window
        return y, AttentionState(tails, cut(k, window), cut(v, window), length_after(q, seen))

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, tails: tuple[Tensor, ...], cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState]:
        y = attend_packed(q[0], k[0], v[0], self.rule, cu_seqlens, (state.k, state.v), state.length)
        new_k, new_v = (
            append_packed(old, new[0], cu_seqlens, self.config.window) for old, new in ((state.k, k), (state.v, v))
        )
        return y[None], AttentionState(tails, new_k, new_v, length_after(q, state.length, cu_seqlens))

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, tails: tuple[Tensor, ...], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        T = q.shape[1]
        if T == 1 and cu_seqlens is None:
            y = cache.attend_one(q, k, v, self.rule)
            cache.stage_tokens(None, None, tails, None, T)
            return y, cache
        old_k, old_v = cache.right_aligned()
        if cu_seqlens is not None:
            y = attend_packed(q[0], k[0], v[0], self.rule, cu_seqlens, (old_k, old_v), cache.length)[None]
        elif cache.longest:
            y = attend(q, append(old_k, k), append(old_v, v), self.rule, cache.length)
        else:
            y = attend(q, k, v, self.rule)
        cache.stage_tokens(k, v, tails, cu_seqlens, T)
        return y, cache

    def init_state(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """Return an empty cache for `n` sequences."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = tuple(conv.init_tail(n, device, dtype) for conv in self._convs)
        k, v = (torch.zeros(n, 0, self.config.kv_heads, self.config.dim, device=device, dtype=dtype) for _ in "kv")
        return AttentionState(conv, k, v, torch.zeros(n, dtype=torch.int32, device=device))

    def init_cache(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache for `n` sequences that is written in place, a ring where there is a window."""
        conv, k, v, length = self.init_state(n, device, dtype)
        return KVCache(conv, k.transpose(1, 2), v.transpose(1, 2), length, self.config.window)

    def _check_state(self, state: AttentionState | KVCache, n: int) -> None:
        c = self.config
        if not isinstance(state, (AttentionState, KVCache)):
            raise ValueError(
                f"attention: expected an AttentionState, got {type(state).__name__}: another mixer's state"
            )
        held = isinstance(state, KVCache)
        C = state.k.shape[2 if held else 1] if state.k.dim() == 4 else 0
        letters, expected = "[N, C, H_kv, D]", (n, C, c.kv_heads, c.dim)
        if held:
            letters, expected = "[N, H_kv, C, D]", (n, c.kv_heads, C, c.dim)
        for name, field in (("k", state.k), ("v", state.v)):
            if tuple(field.shape) != expected:
                raise ValueError(
                    f"attention: state.{name} must be {letters} = {list(expected)}, got {list(field.shape)}"
                )
        if tuple(state.length.shape) != (n,):
            raise ValueError(f"attention: state.length must be [N] = [{n}], got {list(state.length.shape)}")
        if len(state.conv) != len(self._convs):
            raise ValueError(f"attention: state holds {len(state.conv)} convolution tails, needs {len(self._convs)}")
        if c.window is not None and c.window < C:
            raise ValueError(f"attention: state holds {C} slots, more than the window of {c.window}")
        if isinstance(state, KVCache) and state.window != c.window:
            raise ValueError(f"attention: the cache was made for a window of {state.window}, not {c.window}")

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
