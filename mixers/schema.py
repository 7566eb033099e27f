"""Strict conversion of plain data (YAML mappings, registry strings, keywords) into frozen dataclasses.

Every word a user writes, wherever it stands, ends in `convert`: an unknown key, a wrong type or a value outside its
choices is a `SpecError` that names the place, what was given and the nearest valid choice. Imports nothing of
hybridzoo; the registry, the specs and the studies build on it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

# What to add where a mixer's name is unknown: it may be the user's, whose code nothing has imported.
OWN_MIXERS = "one of your own comes with the code that registers it: import that, on a command line by --import FILE.py"
# What other libraries call a word: by its letters the nearest would be another, or none.
OTHER_NAMES = {
    "hidden_size": "d_model",
    "expand_v": "head_v_dim",
    "use_short_conv": "conv_size",
    "conv_kernel": "conv_size",
    "use_gate": "output_gate",
    "use_output_gate": "output_gate",
    "output_gate_activation": "gate_activation",
    "gate_fn": "gate_activation",
    "gate_low_rank_dim": "decay_rank",
    "qk_activation": "feature_map",
    "rope_theta": "rope_base",
}


class SpecError(ValueError):
    """What a user declared cannot be built; the message says where, what was given and what would be right."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for what else is called so or the closest of `choices`, or nothing."""
    if word in OTHER_NAMES:
        return f" (did you mean '{OTHER_NAMES[word]}'?)" if OTHER_NAMES[word] in choices else ""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[found[0]]}'?)" if found else ""


def unknown(where: str, kind: str, given: str, choices: Iterable[str]) -> SpecError:
    """Build the error for a name that is not one of `choices`."""
    choices = list(choices)
    listed = ", ".join(choices) if choices else "nothing here"
    return SpecError(f"{where}: unknown {kind} '{given}'{nearest(given, choices)}; known: {listed}")


_INT = re.compile(r"[+-]?\d{1,1000}")  # Python refuses to read integers of more than 4,300 digits
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?|[+-]?inf")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None}


def parse_scalar(text: str) -> Any:
    """Read one scalar as YAML 1.2 does: bool, null, int, float, else the text. Never sexagesimal: `3:1` is text."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def convert(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from a mapping.

    Accepts int, float (from an int too), bool, str, None, `Literal`, unions, lists, tuples, string-keyed dicts, nested
    dataclasses and `Any`. Raises `SpecError` for an unknown or missing key, a wrong type, a value outside its choices,
    and for whatever the dataclass's own `__post_init__` refuses with a ValueError.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"{where}: expected a mapping of keys to values, got {_shown(data)}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in data:
        if key not in fields:
            raise unknown(where, "key", str(key), fields)
    hints = hints_of(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise SpecError(f"{where}: missing {' and '.join(repr(name) for name in missing)}")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(_at(where, str(error))) from None


def _at(where: str, message: str) -> str:
    # A dataclass's own check does not know where its mapping stood; it starts its message with ".key:" or plain text.
    return f"{where}{message}" if message.startswith(".") else f"{where}: {message}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def hints_of(cls: type) -> dict[str, Any]:
    """Return the type of every field of a dataclass, without what `Annotated` adds to it."""
    return _hints(cls, False)


@functools.cache
def _hints(cls: type, annotated: bool) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=annotated)


def meanings_of(cls: type) -> dict[str, str]:
    """Return what each field of a dataclass means: the text in `Annotated[type, "meaning"]`.

    A field that a subclass declares again, for another default, keeps the meaning it had unless it gets one of its own.
    """
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name, hint in _hints(base, True).items():
            text = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, str)), None)
            if text is not None:
                meanings[name] = text
    return meanings


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values a `Literal` (or an optional one) allows, or () where the type is open."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for arm in get_args(hint) for choice in choices_of(arm))
    return ()


def type_name(hint: Any) -> str:
    """Say a type as a user would: `integer`, `none or integer`, `one of none, token, content`."""
    if hint in _NAMES:
        return _NAMES[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(arg) for arg in args)}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args else "list"
    return "mapping" if origin is dict or dataclasses.is_dataclass(hint) else str(hint)


_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "anything",
}


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _choice(args, value, where)
    if origin in (Union, types.UnionType):
        return _union(hint, args, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else convert(typing.cast(type, hint), value, where)
    if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        return _sequence(hint, origin, args, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    plain = hint if isinstance(hint, type) else None
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain in (int, float, str, bool, type(None)) and type(value) is plain:
        return value
    raise SpecError(f"{where}: expected {type_name(hint)}, got {_shown(value)}")


def as_text(value: Any) -> str:
    """Return a value as it is written: YAML and registry strings cannot tell none from null, nor "1" from 1."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    text = as_text(value)
    for choice in choices:
        if (type(choice) is type(value) and choice == value) or str(choice) == text:
            return choice
    names = [str(choice) for choice in choices]
    raise SpecError(f"{where}: '{text}' is not one of {', '.join(names)}{nearest(text, names)}")


def _union(hint: Any, arms: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in arms and (value is None or value == "none") and str not in arms:
        return None
    errors = []
    for arm in arms:
        try:
            return _value(arm, value, where)
        except SpecError as error:
            errors.append(error)
    rest = [arm for arm in arms if arm is not type(None)]
    if len(rest) == 1:  # an optional: the error of its one real arm says most
        raise errors[arms.index(rest[0])]
    raise SpecError(f"{where}: expected {type_name(hint)}, got {_shown(value)}")


def _sequence(hint: Any, origin: Any, args: tuple[Any, ...], value: Sequence[Any], where: str) -> Any:
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise SpecError(f"{where}: expected {len(args)} values, got {_shown(value)}")
        return tuple(_value(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    return origin(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
