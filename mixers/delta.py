"""The recurrent mixer: projections, short convolutions and gates around `gated_delta_rule`.

One class for linear attention, GLA, DeltaNet, Gated DeltaNet, KDA, Gated DeltaNet-2 and CARVE, which are rows of flags
in presets.py. Parameter names follow flash-linear-attention's layers. May import kernels.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import DeltaState, gated_delta_rule, gated_delta_rule_flops
from hybridzoo.mixers.base import (
    ConvInit,
    HeldState,
    MixerConfig,
    QkInit,
    RecurrentState,
    RuleBackend,
    TokenMixer,
    check_recurrent_state,
    require_above_zero,
    require_positive,
)
from hybridzoo.mixers.gates import Gates
from hybridzoo.mixers.parts import GatedRMSNorm, LowRank, RMSNorm, ShortConvolution, count_sequences, length_after
from hybridzoo.mixers.schema import SpecError

Decay: TypeAlias = Annotated[
    Literal["none", "scalar", "channel"], "gate: how fast the memory fades, one rate a head or one a key channel"
]
Erase: TypeAlias = Annotated[
    Literal["none", "token", "content"],
    "gate: a mask that clears key channels, from the token, or also from what the memory has lately returned",
]
Correct: TypeAlias = Annotated[
    Literal["none", "tied", "scalar", "channel"],
    "gate: how much of a key's old value is taken back; tied: as much as is written of the new one",
]
Write: TypeAlias = Annotated[
    Literal["one", "scalar", "channel"],
    "gate: how strongly a value is written: always fully, by one number a head, or by one a value channel",
]
Predict: TypeAlias = Annotated[
    Literal["decayed", "stored"],
    "whether the correction reads the memory after this token's decay, or before it; without a correction it changes "
    "nothing",
]


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """Words of every recurrent mixer but Mamba-2; a preset row is a subclass with other defaults."""

    n_heads: Annotated[int, "heads of q and k"]
    n_v_heads: Annotated[int | None, "heads of v, a multiple of n_heads; n_heads unless given"] = None
    head_dim: Annotated[int | None, "K, channels of a head of q and k; d_model / n_heads unless given"] = None
    head_v_dim: Annotated[int | None, "V, channels of a head of v; head_dim unless given"] = None
    decay: Decay = "none"
    erase: Erase = "none"
    correct: Correct = "none"
    write: Write = "one"
    predict: Predict = "decayed"
    allow_neg_eigval: Annotated[bool, "double the correction and the write tied to it: both then reach 2"] = False
    decay_form: Annotated[
        Literal["softplus", "logsigmoid"],
        "the log-decay: -exp(A) softplus(f + tau), or GLA's logsigmoid(f) / 16, of the projection f",
    ] = "softplus"
    decay_rate: Annotated[
        Literal["head", "channel"], "whether a channel decay has one rate A a head, or one a key channel"
    ] = "head"
    decay_rank: Annotated[int | None, "rank of a channel decay's projection; head_v_dim unless given"] = None
    gate_heads: Annotated[
        Literal["key", "value"],
        "with more value heads than key heads: channel decay and correction are projected once a key head and "
        "repeated (GDN-2), or once a value head (KDA)",
    ] = "value"
    erase_bias_init: Annotated[float, "where the erase gate's bias starts; at -5 it is all but shut"] = -5.0
    content_chunk: Annotated[
        int, "L, tokens whose mean output the content gate reads in the next L; sequences of no more never use it"
    ] = 64
    content_rank: Annotated[int, "r, rank of the content gate's two projections"] = 16
    content_per_head: Annotated[bool, "a pair of content projections for each head, instead of one a layer"] = False
    feature_map: Annotated[
        Literal["silu", "identity", "elu1"],
        "without a convolution: SiLU on q, k and v, or nothing (a convolution ends in SiLU always); elu1: elu + 1 on q "
        "and k",
    ] = "silu"
    conv_size: Annotated[int, "taps of the short causal convolution on each of q, k and v; 0 is none"] = 4
    conv_init: ConvInit = "default"
    qk_init: QkInit = "independent"
    qk_norm: Annotated[Literal["none", "l2"], "l2: q and k of each head are scaled to length 1"] = "l2"
    output_gate: Annotated[
        Literal["none", "low_rank", "full"],
        "gate on the heads' normed outputs: none, or by a projection of rank head_v_dim, or by a full one",
    ] = "low_rank"
    gate_activation: Annotated[Literal["sigmoid", "silu"], "of the output gate"] = "sigmoid"
    norm_eps: Annotated[float, "epsilon of the RMS norm of the heads' outputs"] = 1e-5
    backend: RuleBackend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_heads", "n_v_heads", "head_dim", "head_v_dim", "content_chunk", "content_rank")
        require_positive(self, "decay_rank")
        require_above_zero(self, "norm_eps")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise SpecError(f".n_heads: {self.n_heads} does not divide d_model {self.d_model}, and head_dim is not set")
        if self.HV % self.n_heads:
            raise SpecError(f".n_v_heads: {self.HV} is not a multiple of n_heads {self.n_heads}")
        if self.conv_size < 0:
            raise SpecError(f".conv_size: must be 0 (none) or more, got {self.conv_size}")
        if self.correct == "tied" and self.write == "channel":
            raise SpecError(
                ".correct: 'tied' with write=channel would need a triangular solve for each value channel; "
                "use correct=scalar"
            )
        if self.allow_neg_eigval and self.correct == "none":
            raise SpecError(".allow_neg_eigval: doubles the correction, and correct is none")
        if self.allow_neg_eigval and self.predict == "stored":
            raise SpecError(".allow_neg_eigval: needs predict=decayed; with stored the recurrence diverges")

    @property
    def K(self) -> int:
        """Key head size."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def V(self) -> int:
        """Value head size."""
        return self.head_v_dim or self.K

    @property
    def HV(self) -> int:
        """Value heads."""
        return self.n_v_heads or self.n_heads

    @property
    def resolved(self) -> dict[str, Any]:
        sizes = {"n_v_heads": self.HV, "head_dim": self.K, "head_v_dim": self.V}
        return {**sizes, "decay_rank": self.decay_rank or self.V} if self.decay == "channel" else sizes

    @property
    def caveat(self) -> str | None:
        if self.correct != "none" and self.qk_norm == "none":
            return "unstable: a correction with unnormalised keys can grow the state without bound"
        return None

    @property
    def writes_scalar(self) -> bool:
        """Whether one projection, `b_proj`, gives both the correction and the write."""
        return self.correct == "tied" and self.write == "scalar"


class DeltaMixer(TokenMixer):
    """A recurrent token mixer: `o_proj(norm(rule(q, k, v, gates)) * gate)`. Words: `DeltaConfig`."""

    Config: ClassVar[type[MixerConfig]] = DeltaConfig
    config: DeltaConfig

    def _build(self) -> None:
        c = self.config
        keys, values = c.n_heads * c.K, c.HV * c.V
        self.q_proj, self.k_proj = _linear(c.d_model, keys), _linear(c.d_model, keys)
        self.v_proj = _linear(c.d_model, values)
        self.q_conv1d = ShortConvolution(keys, c.conv_size) if c.conv_size else None
        self.k_conv1d = ShortConvolution(keys, c.conv_size) if c.conv_size else None
        self.v_conv1d = ShortConvolution(values, c.conv_size) if c.conv_size else None
        gate_heads = c.n_heads if c.gate_heads == "key" else c.HV
        logsigmoid = c.decay_form == "logsigmoid"
        self.a_proj = nn.Linear(c.d_model, c.HV, bias=logsigmoid) if c.decay == "scalar" else None
        self.f_proj = None
        if c.decay == "channel":
            self.f_proj = LowRank(c.d_model, c.decay_rank or c.V, gate_heads * c.K, bias=logsigmoid)
        corrections = {"none": 0, "tied": c.HV if c.writes_scalar else 0, "scalar": c.HV, "channel": gate_heads * c.K}
        writes = {"one": 0, "scalar": 0 if c.writes_scalar else c.HV, "channel": values}
        self.b_proj = _linear(c.d_model, corrections[c.correct]) if corrections[c.correct] else None
        self.w_proj = _linear(c.d_model, writes[c.write]) if writes[c.write] else None
        self.z_proj = nn.Linear(c.d_model, c.HV * c.K) if c.erase != "none" else None
        self.gates = self._build_gates(gate_heads)
        self.g_proj: nn.Module | None = None
        if c.output_gate == "low_rank":
            self.g_proj = LowRank(c.d_model, c.V, values, bias=True)
        elif c.output_gate == "full":
            self.g_proj = _linear(c.d_model, values)
        self.o_norm: nn.Module = RMSNorm(c.V, c.norm_eps)
        if c.output_gate != "none":
            self.o_norm = GatedRMSNorm(c.V, c.norm_eps, c.gate_activation)
        self.o_proj = _linear(values, c.d_model)

    def _build_gates(self, gate_heads: int) -> Gates:
        c = self.config
        rate: tuple[int, ...] | None = None
        dt = 0
        if c.decay != "none" and c.decay_form == "softplus":
            heads = c.HV if c.decay == "scalar" else gate_heads
            rate = (heads, c.K) if c.decay == "channel" and c.decay_rate == "channel" else (heads,)
            dt = heads * (c.K if c.decay == "channel" else 1)
        content = None
        if c.erase == "content":
            content = (c.HV if c.content_per_head else 1, c.content_rank, c.V, c.K)
        return Gates(rate, dt, content)

    @property
    def _convs(self) -> tuple[ShortConvolution, ...]:
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return tuple(conv for conv in convs if conv is not None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as `nn.Linear` does, gates as `Gates` says, convolutions by `conv_init`; `qk_init` last.

        Scalar decays draw rates from 1e-4 up, as Gated DeltaNet and Mamba-2 do from 0; channel decays from 1, as KDA.
        """
        for module in self.children():
            if isinstance(module, ShortConvolution):
                module.reset_parameters(self.config.conv_init)
            elif isinstance(module, Gates):
                module.reset_parameters(1e-4 if self.config.decay == "scalar" else 1.0)
            elif isinstance(module, (nn.Linear, LowRank, RMSNorm, GatedRMSNorm)):
                module.reset_parameters()
        if self.z_proj is not None:
            self.z_proj.bias.fill_(self.config.erase_bias_init)
        if self.config.qk_init == "equal":
            self.k_proj.weight.copy_(self.q_proj.weight)
            if self.q_conv1d is not None and self.k_conv1d is not None:
                self.k_conv1d.weight.copy_(self.q_conv1d.weight)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Mix; see `TokenMixer.forward`. Raises for a state of another mixer, batch, dtype or device."""
        c = self.config
        n = count_sequences(x, self.q_proj.weight, cu_seqlens)
        if state is not None:
            check_recurrent_state(state, n, len(self._convs))
        tails = state.conv if state is not None else (None,) * len(self._convs)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        new_tails = []
        for i, (conv, tail) in enumerate(zip(self._convs, tails, strict=True)):
            projected[i], new_tail = conv(projected[i], tail, cu_seqlens)
            new_tails.append(new_tail)
        q, k, v = self._features(*projected)
        correct, write = self._correct_and_write(x)
        log_decay, content = self.gates(self._decay(x), c.HV, c.content_chunk)
        o, delta = gated_delta_rule(
            *(q, k, v),
            log_decay=None if log_decay is None else self._to_value_heads(log_decay),
            erase_logits=None if self.z_proj is None else self.z_proj(x).unflatten(-1, (c.HV, c.K)),
            content=content,
            correct=correct,
            write=write,
            predict=c.predict,
            qk_l2norm=c.qk_norm == "l2",
            state=None if state is None else state.delta,
            cu_seqlens=cu_seqlens,
            inplace_state=isinstance(state, HeldState) and state.written_in_place(x, cu_seqlens),
            backend=c.backend,
        )
        assert delta is not None
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (c.HV, c.V)))
        length = length_after(x, None if state is None else state.length, cu_seqlens)
        return self.o_proj(o.flatten(-2)), RecurrentState(tuple(new_tails), delta, length)

    def _features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        if c.feature_map == "silu" and not c.conv_size:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        elif c.feature_map == "elu1":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        q, k = (p.unflatten(-1, (c.n_heads, c.K)) for p in (q, k))
        return q, k, v.unflatten(-1, (c.HV, c.V))

    def _decay(self, x: Tensor) -> Tensor | None:
        """What the log-decay is made of: `[B, T, HV]`, `[B, T, heads, K]`, or None."""
        if self.a_proj is not None:
            f: Tensor = self.a_proj(x)
            return f
        return None if self.f_proj is None else self.f_proj(x).unflatten(-1, (-1, self.config.K))

    def _to_value_heads(self, gate: Tensor) -> Tensor:
        repeats = self.config.HV // gate.shape[2]
        return gate if repeats == 1 else gate.repeat_interleave(repeats, dim=2)

    def _correct_and_write(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        c = self.config
        correct = write = None
        if self.b_proj is not None:
            correct = torch.sigmoid(self.b_proj(x))
            if c.correct == "channel":
                correct = self._to_value_heads(correct.unflatten(-1, (-1, c.K)))
        elif c.correct == "tied":  # to a write of ones
            correct = torch.ones(*x.shape[:2], c.HV, dtype=x.dtype, device=x.device)
        if correct is not None and c.allow_neg_eigval:
            correct = 2 * correct
        if c.writes_scalar:
            write = correct
        elif self.w_proj is not None:
            write = torch.sigmoid(self.w_proj(x))
            write = write.unflatten(-1, (c.HV, c.V)) if c.write == "channel" else write
        elif c.correct == "tied" and c.allow_neg_eigval:
            write = correct
        return correct, write

    def init_state(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """Return the state of `n` sequences before their first token; `dtype` is that of the convolutions' tails."""
        c, weight = self.config, self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return RecurrentState(
            conv=tuple(conv.init_tail(n, device, dtype) for conv in self._convs),
            delta=DeltaState.zeros(n, c.HV, c.K, c.V, c.erase == "content", device, exact),
            length=torch.zeros(n, dtype=torch.int32, device=device),
        )

    def state_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """The float32 state, CARVE's two means, two counters, and the convolutions' tails: whatever the context."""
        c = self.config
        tails = sum(conv.channels * (conv.size - 1) for conv in self._convs) * dtype.itemsize
        exact = 8 if dtype == torch.float64 else 4
        means = 2 * c.HV * c.V if c.erase == "content" else 0
        return tails + (c.HV * c.K * c.V + means) * exact + 2 * 4  # count and length, int32

    def flops_per_token(self, context: int, decode: bool = False) -> int:
        """Projections, convolutions, the recurrence, and the content readout once a chunk."""
        c = self.config
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        convolutions = sum(conv.channels * conv.size for conv in self._convs)
        flops = 2 * (linears + convolutions)
        flops += gated_delta_rule_flops(1, c.HV, c.K, c.V, corrected=c.correct != "none", decode=decode)
        if c.erase == "content":
            flops += 2 * c.HV * c.content_rank * (c.K + c.V) // c.content_chunk
        return flops


def _linear(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=False)
