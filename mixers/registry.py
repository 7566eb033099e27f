"""The registry: names of token mixers, the words each takes, and the one parser for all ways of giving them.

`build_mixer("carve[erase=token]", d_model=256)`, a YAML entry `{type: carve, erase: token}` and a command-line override
`mixers.c.erase=token` all come through `mixer_config`. May import kernels; presets.py holds the recurrent rows.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hybridzoo.mixers.base import MixerConfig, TokenMixer
from hybridzoo.mixers.schema import (
    OWN_MIXERS,
    SpecError,
    as_text,
    choices_of,
    convert,
    hints_of,
    meanings_of,
    parse_scalar,
    type_name,
    unknown,
)

GATE_FLAGS = ("decay", "erase", "correct", "write", "predict")

Mixer = TypeVar("Mixer", bound=type[TokenMixer])


@dataclass(frozen=True)
class Word:
    """One constructor word: its default (`None` in `required` words), the values it may take, and what it means."""

    default: Any
    type: str
    choices: tuple[Any, ...]
    required: bool
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A registered mixer. `stable=False` keeps it out of sweeps over the registry."""

    name: str
    cls: type[TokenMixer]
    source: str
    summary: str
    stable: bool

    @property
    def Config(self) -> type[MixerConfig]:  # the class, hence its name
        return self.cls.Config

    @property
    def words(self) -> dict[str, Word]:
        """Every constructor word with its default, choices and meaning."""
        hints, meanings = hints_of(self.Config), meanings_of(self.Config)
        return {
            field.name: Word(
                default=None if field.default is dataclasses.MISSING else field.default,
                type=type_name(hints[field.name]),
                choices=choices_of(hints[field.name]),
                required=field.default is dataclasses.MISSING,
                meaning=meanings.get(field.name, ""),
            )
            for field in dataclasses.fields(self.Config)
        }

    @property
    def flags(self) -> dict[str, Word]:
        """The gate flags of the recurrence; empty for attention."""
        return {name: word for name, word in self.words.items() if name in GATE_FLAGS}

    @property
    def differs(self) -> tuple[str, dict[str, Any]] | None:
        """The mixer whose config this one's extends, if any, and the defaults that are others or new here."""
        by_config = {entry.Config: entry for entry in _REGISTRY.values()}
        parent = next((by_config[base] for base in self.Config.__mro__[1:] if base in by_config), None)
        if parent is None:
            return None
        theirs = {name: word.default for name, word in parent.words.items()}
        mine = {name: word.default for name, word in self.words.items()}
        return parent.name, {name: mine[name] for name in mine if name not in theirs or mine[name] != theirs[name]}


_REGISTRY: dict[str, Entry] = {}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def said(value: object) -> str:
    """Write the value of a word as a registry string or a spec has it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def register_mixer(name: str, *, source: str, summary: str, stable: bool = True) -> Callable[[Mixer], Mixer]:
    """Decorate a `TokenMixer` subclass so that strings, specs, tests and reports know it as `name`.

    Raises `ValueError` at import time for a name that is taken or not a name, and `TypeError` for a class that is not a
    mixer, has no frozen `Config`, or whose `forward` is not `forward(x, state=None, cu_seqlens=None)`.
    """

    def register(cls: Mixer) -> Mixer:
        if not _NAME.fullmatch(name):
            raise ValueError(f"mixer name {name!r}: letters, digits, '_', '-' and '.', starting with a letter")
        if name in _REGISTRY:
            raise ValueError(f"mixer name {name!r} is taken by {_REGISTRY[name].cls.__qualname__}")
        _check_class(name, cls)
        cls.registry_name = name
        _REGISTRY[name] = Entry(name, cls, source, summary, stable)
        return cls

    return register


def _check_class(name: str, cls: type) -> None:
    if not (isinstance(cls, type) and issubclass(cls, TokenMixer)):
        raise TypeError(f"mixer {name!r}: {cls!r} is not a subclass of TokenMixer")
    config = cls.Config
    # Of the class itself: a subclass without the decorator inherits its parent's fields and drops its own.
    parameters = vars(config).get("__dataclass_params__")
    if config is MixerConfig or parameters is None or not parameters.frozen or not issubclass(config, MixerConfig):
        raise TypeError(
            f"mixer {name!r}: {cls.__qualname__}.Config must be a frozen dataclass extending MixerConfig: "
            "decorate it with @dataclass(frozen=True, kw_only=True)"
        )
    for entry in _REGISTRY.values():
        if entry.cls is cls:
            raise ValueError(f"mixer {name!r}: {cls.__qualname__} is registered already, as {entry.name!r}")
        if entry.Config is config:  # a spec holds configs, and each must lead back to one mixer
            raise TypeError(
                f"mixer {name!r}: {cls.__qualname__}.Config is that of {entry.name!r}; declare one of its own, such as "
                f"`class Config({entry.cls.__name__}.Config)`, also where it adds no word"
            )
    signature = inspect.signature(cls.forward)
    try:
        signature.bind(None, "x")
        signature.bind(None, "x", None, None)
        named = list(signature.parameters)[1:4] == ["x", "state", "cu_seqlens"]
    except TypeError:
        named = False
    if not named:
        shown = ", ".join(str(parameter) for parameter in list(signature.parameters.values())[1:])
        raise TypeError(f"mixer {name!r}: forward must take (x, state=None, cu_seqlens=None), not ({shown})")


def list_mixers() -> list[Entry]:
    """Return every registered mixer, in the order of registration."""
    return list(_REGISTRY.values())


def get_entry(name: str, where: str = "mixer") -> Entry:
    """Return the entry of a registry name; `SpecError` with the nearest name where there is none."""
    if name not in _REGISTRY:
        raise SpecError(f"{unknown(where, 'mixer', name, _REGISTRY)}; {OWN_MIXERS}")
    return _REGISTRY[name]


def parse_mixer(text: str, where: str = "mixer") -> tuple[str, dict[str, Any]]:
    """Split `name[word=value,...]` into the name and its words; values are read as YAML scalars."""
    name, bracket, inside = text.strip().partition("[")
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise SpecError(f"{where}: '{text}' is not a mixer: expected name or name[word=value,...]")
    if not bracket:
        return name, {}
    if not inside.endswith("]") or "[" in inside or "]" in inside[:-1]:
        raise SpecError(f"{where}: '{text}': expected one closing ']' at the end, as in {name}[word=value,...]")
    words: dict[str, Any] = {}
    for part in inside[:-1].split(",") if inside[:-1].strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise SpecError(f"{where}: '{text}': '{part.strip()}' is not word=value")
        if key in words:
            raise SpecError(f"{where}: '{text}': '{key}' is given twice")
        words[key] = parse_scalar(value)
    return name, words


def mixer_config(mixer: str, words: Mapping[str, Any] | None = None, where: str = "") -> MixerConfig:
    """Resolve a registry string and further words (which win over those in the string) into a frozen config."""
    name, flags = parse_mixer(mixer, where or "mixer")
    entry = get_entry(name, where or "mixer")
    place = where or name
    given = {**flags, **(words or {})}
    known = entry.words
    for key, value in given.items():
        if key not in GATE_FLAGS:
            continue
        choices = known[key].choices if key in known else ()
        if key in known and (len(choices) != 1 or as_text(value) == str(choices[0])):
            continue
        having = ", ".join(e.name for e in list_mixers() if key in e.flags and len(e.flags[key].choices) > 1)
        if key in known:
            raise SpecError(f"{place}.{key}: '{name}' has {key}={choices[0]} alone; these have a choice: {having}")
        raise SpecError(f"{place}.{key}: '{name}' has no gate '{key}'; these have: {having}")
    return convert(entry.Config, given, place)


def build_mixer(mixer: str | MixerConfig, **words: Any) -> TokenMixer:
    """Build a mixer from a registry string and words, or from a resolved config.

    Raises `SpecError` for an unknown mixer, word or value, naming the nearest valid one.
    """
    if isinstance(mixer, str):
        name, _ = parse_mixer(mixer)
        return get_entry(name).cls(mixer_config(mixer, words))
    if words:
        raise SpecError(f"give a config or a name with words, not both (got {', '.join(words)} besides the config)")
    return entry_of(mixer).cls(mixer)


def entry_of(config: MixerConfig) -> Entry:
    """Return the entry that a resolved config belongs to."""
    for entry in _REGISTRY.values():
        if type(config) is entry.Config:
            return entry
    raise SpecError(f"{type(config).__qualname__} belongs to no registered mixer")
