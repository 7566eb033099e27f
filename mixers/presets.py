"""The recurrent mixers of the literature: rows of flags over `DeltaMixer`, and no code of their own.

To add one, write one more row; the tests, the tables and the command line take it from the registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridzoo.mixers.delta import Correct, Decay, DeltaConfig, DeltaMixer, Erase, Predict, Write
from hybridzoo.mixers.registry import register_mixer


@register_mixer("linear_attention", source="Katharopoulos 2020, arXiv 2006.16236", summary="sums of keys and values")
class LinearAttention(DeltaMixer):
    """Linear attention with feature map elu + 1 and no denominator; the heads' norm takes its place."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        feature_map: Literal["silu", "identity", "elu1"] = "elu1"
        conv_size: int = 0
        qk_norm: Literal["none", "l2"] = "none"
        output_gate: Literal["none", "low_rank", "full"] = "none"


@register_mixer("gla", source="arXiv 2312.06635", summary="linear attention with a decay a key channel")
class GatedLinearAttention(DeltaMixer):
    """Gated linear attention: `g = logsigmoid(f) / 16` through a rank of 16; no convolution, no norm of q and k."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        decay: Decay = "channel"
        decay_form: Literal["softplus", "logsigmoid"] = "logsigmoid"
        decay_rank: int | None = 16
        gate_heads: Literal["key", "value"] = "key"
        feature_map: Literal["silu", "identity", "elu1"] = "identity"
        conv_size: int = 0
        qk_norm: Literal["none", "l2"] = "none"
        output_gate: Literal["none", "low_rank", "full"] = "full"
        gate_activation: Literal["sigmoid", "silu"] = "silu"


@register_mixer("delta_net", source="arXiv 2406.06484", summary="the delta rule: overwrite what a key held")
class DeltaNet(DeltaMixer):
    """DeltaNet: correction and write are one scalar a head; no decay, no output gate."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        correct: Correct = "tied"
        write: Write = "scalar"
        output_gate: Literal["none", "low_rank", "full"] = "none"


@register_mixer("gated_delta_net", source="arXiv 2412.06464", summary="the delta rule with a decay a head")
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet: DeltaNet with Mamba-2's scalar decay and a full output gate."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        decay: Decay = "scalar"
        correct: Correct = "tied"
        write: Write = "scalar"
        output_gate: Literal["none", "low_rank", "full"] = "full"
        gate_activation: Literal["sigmoid", "silu"] = "silu"


@register_mixer("kda", source="Kimi Delta Attention, arXiv 2510.26692", summary="the delta rule with a decay a channel")
class KimiDeltaAttention(DeltaMixer):
    """Kimi Delta Attention: Gated DeltaNet with one decay a key channel."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        decay: Decay = "channel"
        correct: Correct = "tied"
        write: Write = "scalar"


@register_mixer("gdn2", source="Gated DeltaNet-2, arXiv 2605.22791", summary="KDA with channel-wise gates on k and v")
class GatedDeltaNet2(DeltaMixer):
    """Gated DeltaNet-2: the correction gate is a vector over key channels, the write gate one over value channels."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        decay: Decay = "channel"
        correct: Correct = "channel"
        write: Write = "channel"
        gate_heads: Literal["key", "value"] = "key"


@register_mixer("carve", source="arXiv 2606.27229v2", summary="a key-axis erase mask that reads the memory")
class Carve(DeltaMixer):
    """CARVE: `log D = g - softplus(z + u_c)`, with `u_c` read from the last content chunk's mean output (eqs. 5-10)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DeltaConfig):
        decay: Decay = "channel"
        decay_rate: Literal["head", "channel"] = "channel"
        erase: Erase = "content"
        correct: Correct = "tied"
        write: Write = "scalar"
        predict: Predict = "stored"


@register_mixer("carve-paper", source="arXiv 2606.27229v2", summary="CARVE as printed, plus L2 keys")
class CarvePaper(DeltaMixer):
    """CARVE without convolution and output gate, as the paper prints it.

    Its keys are normalised, which the paper does not print: unnormalised ones diverge (`carve-paper[qk_norm=none]`).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Carve.Config):
        conv_size: int = 0
        output_gate: Literal["none", "low_rank", "full"] = "none"
