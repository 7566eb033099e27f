"""Plain data to frozen dataclasses: strict, and helpful when it refuses."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hybridzoo.mixers.schema import SpecError, convert, nearest, parse_scalar


@dataclass(frozen=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise SpecError(".size: must be at least 0")


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    on: bool = False
    kind: Literal["one", "none", "scalar"] = "one"
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    table: dict[str, Inner] = field(default_factory=dict)
    free: Any = None


def test_values_of_every_type_arrive_as_declared() -> None:
    data = {
        "name": "x",
        "rate": 2,
        "on": True,
        "kind": "scalar",
        "limit": 3,
        "inner": {"size": 4},
        "sizes": [1, 2],
        "pair": [1, "b"],
        "table": {"a": {"size": 5}},
        "free": {"any": "thing"},
    }
    made = convert(Outer, data, "file.yaml")
    assert made == Outer("x", 2.0, True, "scalar", 3, Inner(4), (1, 2), (1, "b"), {"a": Inner(5)}, {"any": "thing"})
    assert isinstance(made.rate, float)


def test_none_is_a_word_where_it_is_a_choice_and_null_where_it_is_optional() -> None:
    assert convert(Outer, {"name": "x", "kind": None}, "f").kind == "none"
    assert convert(Outer, {"name": "x", "limit": "none"}, "f").limit is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, r"^f: unknown key 'nmae' \(did you mean 'name'\?\); known: name, rate, .*, free$"),
        ({"name": 3}, r"^f\.name: expected text, got 3$"),
        ({"rate": "fast"}, r"^f\.rate: expected number, got 'fast'$"),
        ({"rate": True}, r"^f\.rate: expected number, got True$"),
        ({"on": 1}, r"^f\.on: expected true or false, got 1$"),
        ({"kind": "scaler"}, r"^f\.kind: 'scaler' is not one of one, none, scalar \(did you mean 'scalar'\?\)"),
        ({"limit": 1.5}, r"^f\.limit: expected integer, got 1\.5$"),
        ({"inner": {"size": "big"}}, r"^f\.inner\.size: expected integer, got 'big'$"),
        ({"inner": {"size": -1}}, r"^f\.inner\.size: must be at least 0$"),
        ({"inner": 3}, r"^f\.inner: expected a mapping of keys to values, got 3$"),
        ({"sizes": [1, "b"]}, r"^f\.sizes\[1\]: expected integer, got 'b'$"),
        ({"sizes": "12"}, r"^f\.sizes: expected list of integer, got '12'$"),
        ({"pair": [1]}, r"^f\.pair: expected 2 values, got \[1\]$"),
        ({"table": {"a": {"sise": 1}}}, r"^f\.table\.a: unknown key 'sise'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place_and_the_nearest_choice(change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        convert(Outer, {"name": "x", **change}, "f")


def test_only_what_is_near_is_offered() -> None:
    assert nearest("ease", ["erase", "rope_base"]) == " (did you mean 'erase'?)"
    assert nearest("erase", ["rope_base", "head_dim"]) == ""


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SpecError, match=r"^f: missing 'name'$"):
        convert(Outer, {}, "f")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-5", -5),
        ("1e-2", 0.01),
        ("2.5", 2.5),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("3:1", "3:1"),
        ("'64'", "64"),
        ("a b", "a b"),
    ],
)
def test_scalars_read_as_yaml_1_2_reads_them(text: str, value: Any) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)
