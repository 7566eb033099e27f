"""Token mixers: the registry and what it registers. May import kernels; blocks come next."""

from hybridzoo.mixers.attention import Attention
from hybridzoo.mixers.base import MixerConfig, TokenMixer
from hybridzoo.mixers.mamba2 import Mamba2
from hybridzoo.mixers.presets import (
    Carve,
    CarvePaper,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedLinearAttention,
    KimiDeltaAttention,
    LinearAttention,
)
from hybridzoo.mixers.registry import (
    Entry,
    Word,
    build_mixer,
    get_entry,
    list_mixers,
    mixer_config,
    parse_mixer,
    register_mixer,
)
from hybridzoo.mixers.schema import SpecError
from hybridzoo.mixers.weights import import_weights

__all__ = [
    "Attention",
    "Carve",
    "CarvePaper",
    "DeltaNet",
    "Entry",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LinearAttention",
    "Mamba2",
    "MixerConfig",
    "SpecError",
    "TokenMixer",
    "Word",
    "build_mixer",
    "get_entry",
    "import_weights",
    "list_mixers",
    "mixer_config",
    "parse_mixer",
    "register_mixer",
]
