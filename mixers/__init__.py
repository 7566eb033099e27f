"""Token mixers: the registry and what it registers. May import kernels; blocks come next."""

from hybridzoo.mixers.base import MixerConfig, TokenMixer
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

__all__ = [
    "Entry",
    "MixerConfig",
    "SpecError",
    "TokenMixer",
    "Word",
    "build_mixer",
    "get_entry",
    "list_mixers",
    "mixer_config",
    "parse_mixer",
    "register_mixer",
]
