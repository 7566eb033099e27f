"""A spec: a language model as frozen data, every word resolved and checked, nothing built yet.

loader.py turns files and overrides into one mapping; here that mapping becomes a `Spec`, with a frozen config for
every mixer of every layer, so that whatever cannot be built is refused before anything is. model.py builds it,
account.py counts its cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from hybridzoo.architectures.interpolation import interpolate
from hybridzoo.architectures.pattern import is_name, parse_pattern
from hybridzoo.blocks.ffn import FfnConfig
from hybridzoo.mixers.base import MixerConfig
from hybridzoo.mixers.registry import GATE_FLAGS, Entry, entry_of, get_entry, list_mixers, mixer_config, parse_mixer
from hybridzoo.mixers.schema import SpecError, convert, nearest, unknown


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How a model starts: `std` of the embeddings and the head, and GPT-2's smaller residual projections.

    A head that is not tied may start at a `head_std` of its own: embeddings of unit size make what a token is stand
    out in the residual stream, while a head of that size would start far from even odds. Mixers and FFNs draw
    themselves; see `HybridLM.reset_parameters`.
    """

    std: float = 0.02
    residual_scale: bool = True
    head_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("std", "head_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SpecError(f".{name}: must be above 0, got {value}")


@dataclass(frozen=True)
class Layer:
    """One block: the mixers that run in parallel in it, each with the name it has in the spec, then the FFN."""

    mixers: tuple[tuple[str, MixerConfig], ...]
    ffn: FfnConfig | None

    @property
    def label(self) -> str:
        """The layer as the pattern writes it: `c`, or `c+a`."""
        return "+".join(label for label, _ in self.mixers)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The keys of a spec file."""

    name: str
    d_model: int
    vocab_size: int
    layers: str
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixer_defaults: dict[str, Any] = field(default_factory=dict)
    ffn: FfnConfig = field(default_factory=FfnConfig)
    norm: Literal["rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init: InitConfig = field(default_factory=InitConfig)
    max_context: int | None = None

    def __post_init__(self) -> None:
        for name, most in {"d_model": 1 << 20, "vocab_size": 1 << 28, "max_context": None}.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f".{name}: must be at least 1, got {value}")
            if value is not None and most is not None and value > most:
                raise SpecError(f".{name}: must be at most {most:,}, got {value}")
        if not 0 < self.norm_eps < float("inf"):
            raise SpecError(f".norm_eps: must be above 0, got {self.norm_eps}")
        if self.tie_embeddings and self.init.head_std is not None:
            raise SpecError(".init.head_std: the head is the embedding; a head of its own needs tie_embeddings: false")


_ENTRY = "{type: carve, n_heads: 4}"
_PATTERN = '"(c*3 a)*2"'
SPEC_KEYS = tuple(key.name for key in dataclasses.fields(_Written))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A resolved language model.

    layers: the blocks, first to last. pattern: what they were expanded from. mixers: the config of every mixer that is
    declared or stands in the pattern. max_context: the longest sequence the model takes; None is any.
    """

    name: str
    d_model: int
    vocab_size: int
    pattern: str
    layers: tuple[Layer, ...]
    mixers: dict[str, MixerConfig]
    ffn: FfnConfig
    norm: Literal["rmsnorm"]
    norm_eps: float
    tie_embeddings: bool
    init: InitConfig
    max_context: int | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "spec") -> Spec:
        """Resolve a mapping with the keys of a spec file (without `base`); `where` names it in errors.

        Raises `SpecError` that names the key, what was given and the nearest valid choice.
        """
        try:
            return resolve(interpolate(dict(data)))
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes an equal spec: every mixer with all its words."""
        return {
            "name": self.name,
            "d_model": self.d_model,
            "vocab_size": self.vocab_size,
            "mixers": {label: _entry_dict(config) for label, config in self.mixers.items()},
            "layers": self.pattern,
            "ffn": dataclasses.asdict(self.ffn),
            "norm": self.norm,
            "norm_eps": self.norm_eps,
            "tie_embeddings": self.tie_embeddings,
            "init": dataclasses.asdict(self.init),
            "max_context": self.max_context,
        }

    def to_yaml(self) -> str:
        """Return `to_dict` as the text of a spec file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def require_spec(spec: object) -> None:
    """Raise `TypeError` for what is no `Spec`, such as the name of one."""
    if not isinstance(spec, Spec):
        hint = f"; load_spec({spec!r}) gives one" if isinstance(spec, str) else ""
        raise TypeError(f"expected a Spec, got {type(spec).__name__}{hint}")


def idle_content_gates(spec: Spec, length: int) -> dict[str, int]:
    """Return the content chunks, by label, of mixers whose content gate never acts in sequences of `length` tokens.

    The gate reads the chunk before, and in the first `content_chunk` tokens there is none: it is a token gate there.
    """
    used = dict(pair for layer in spec.layers for pair in layer.mixers)
    return {
        label: chunk for label, config in used.items() if (chunk := idle_content(dataclasses.asdict(config), length))
    }


def idle_content(words: Mapping[str, Any], length: int) -> int:
    """Return the content chunk of a mixer of these words if `idle_content_gates` would name it, else 0."""
    # By word, not by class: a user's own mixer may have the gate too.
    chunk = int(words.get("content_chunk", 0)) if words.get("erase") == "content" else 0
    return chunk if chunk >= length else 0


def resolve(data: Mapping[str, Any]) -> Spec:
    """Build the spec of merged, interpolated data.

    Raises `SpecError` whose message starts with the key at fault (`mixers.c.erase: ...`), for the caller to put the
    file before it.
    """
    try:
        _check_shape(data)
        written = convert(_Written, long_forms(data), "")
    except SpecError as error:
        raise SpecError(str(error).removeprefix(".").removeprefix(": ")) from None
    mixers = _Mixers(written)
    declared = {label: mixers.declared(label) for label in written.mixers}
    layers = parse_pattern(written.layers, mixers.names(), "layers")
    used = {label: mixers.in_pattern(label) for label in dict.fromkeys(label for layer in layers for label in layer)}
    ffn = None if written.ffn.type == "none" else written.ffn
    return Spec(
        name=written.name,
        d_model=written.d_model,
        vocab_size=written.vocab_size,
        pattern=written.layers,
        layers=tuple(Layer(tuple((label, used[label]) for label in layer), ffn) for layer in layers),
        mixers={**declared, **used},
        ffn=written.ffn,
        norm=written.norm,
        norm_eps=written.norm_eps,
        tie_embeddings=written.tie_embeddings,
        init=written.init,
        max_context=written.max_context,
    )


def _check_shape(data: Mapping[str, Any]) -> None:
    """Refuse what a general "expected text" would leave a reader of the error to look up."""
    for key in data:
        if key not in SPEC_KEYS:
            raise unknown("", "key", key, SPEC_KEYS)
    pattern = data.get("layers")
    if pattern is None:
        raise SpecError(f"layers: missing; a spec says its stack, as in layers: {_PATTERN}")
    if not isinstance(pattern, str):
        raise SpecError(f"layers: expected a pattern, as in {_PATTERN}, got {pattern!r}")
    mixers = data.get("mixers", {})
    if not isinstance(mixers, Mapping):
        raise SpecError(f"mixers: expected names with their mixers, as in {{c: {_ENTRY}}}, got {mixers or 'nothing'}")
    for label, item in mixers.items():
        if not is_name(str(label)):
            raise SpecError(f"mixers: '{label}' cannot stand in a pattern: a name is letters, digits, '_', '-' or '.'")
        if not isinstance(item, Mapping | str):
            found = "nothing" if item is None else item
            raise SpecError(f"mixers.{label}: expected a mixer, as in {_ENTRY}, got {found}")


def long_forms(data: Mapping[str, Any]) -> dict[str, Any]:
    """Write `ffn: gelu` and a mixer `c: kda` out as mappings with a `type`, so that words can be laid over them."""
    result = dict(data)
    if isinstance(result.get("ffn"), str):
        result["ffn"] = {"type": result["ffn"]}
    if isinstance(mixers := result.get("mixers"), Mapping):
        result["mixers"] = {name: {"type": item} if isinstance(item, str) else item for name, item in mixers.items()}
    return result


def _entry_dict(config: MixerConfig) -> dict[str, Any]:
    words = dataclasses.asdict(config)
    del words["d_model"]  # the spec's
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in words.items()}
    return {"type": entry_of(config).name, **plain}


class _Mixers:
    """Resolves the names of one spec into configs: entry words over flags over `mixer_defaults` over defaults."""

    def __init__(self, written: _Written) -> None:
        self.written = written
        known = {word: None for entry in list_mixers() for word in entry.words if word != "d_model"}
        for word in written.mixer_defaults:
            if word not in known:
                raise unknown("mixer_defaults", "word", word, known)

    def names(self) -> list[str]:
        """What a pattern may hold: the declared entries, then the registry."""
        return list(dict.fromkeys([*self.written.mixers, *(entry.name for entry in list_mixers())]))

    def declared(self, label: str) -> MixerConfig:
        words = dict(self.written.mixers[label])
        where = f"mixers.{label}"
        if "type" not in words:
            others = [name for name in self.written.mixers if name != label]
            hint = nearest(label, others) or f"; declared: {', '.join(others)}" if others else ""
            if label in {entry.name for entry in list_mixers()}:
                hint = f"; for the mixer of that name, {{type: {label}, ...}}"
            raise SpecError(f"{where}: no type, such as {_ENTRY}{hint}")
        kind = words.pop("type")
        if not isinstance(kind, str):
            raise SpecError(f"{where}.type: expected the name of a mixer, got {kind!r}")
        return self._config(kind, words, f"{where}.type", where, label)

    def in_pattern(self, label: str) -> MixerConfig:
        if label in self.written.mixers:
            return self.declared(label)
        where = f"layers: {label}"
        name, flags = parse_mixer(label, where)
        if "type" in flags:
            raise SpecError(f"{where}: flags change words of a mixer, not which it is; name '{flags['type']}' itself")
        if name in self.written.mixers:
            entry = {**self.written.mixers[name], **flags}
            return self._config(str(entry.pop("type")), entry, where, where, label)
        mixer = get_entry(name)
        _check_words(mixer, flags, where)  # or a misspelt word would be called missing
        needed = [word for word, about in mixer.words.items() if about.required and word != "d_model"]
        missing = [word for word in needed if word not in flags and word not in self.written.mixer_defaults]
        if missing:
            here = f"here, as in {name}[{missing[0]}=...]"
            raise SpecError(
                f"{where}: missing {', '.join(missing)}; give it {here}, under mixer_defaults, or under mixers"
            )
        return self._config(name, flags, where, where, label)

    def _config(self, kind: str, words: dict[str, Any], kind_where: str, where: str, label: str) -> MixerConfig:
        name, flags = parse_mixer(kind, kind_where)
        entry = get_entry(name, kind_where)
        own = {**flags, **words}
        _check_words(entry, own, where)
        defaults = {k: v for k, v in self.written.mixer_defaults.items() if k in entry.words and k not in own}
        try:
            return mixer_config(name, {"d_model": self.written.d_model, **defaults, **own}, where)
        except SpecError as error:
            for word in defaults:
                if str(error).startswith(f"{where}.{word}: "):
                    fault = str(error).removeprefix(f"{where}.{word}: ")
                    raise SpecError(f"mixer_defaults.{word}: {fault} (for mixer '{label}')") from None
            raise


def _check_words(entry: Entry, given: Mapping[str, Any], where: str) -> None:
    """Refuse a word that the mixer does not have; a gate that it lacks has an error of its own."""
    if "d_model" in given:
        raise SpecError(f"{where}.d_model: every mixer has the spec's own d_model; leave it out")
    for word in given:
        if word not in entry.words and word not in GATE_FLAGS:
            raise unknown(where, "key", word, [known for known in entry.words if known != "d_model"])
