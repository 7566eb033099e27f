"""Interpolation within a file: what it gives, and what it refuses before it could cost or run anything."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from hybridzoo.architectures.interpolation import interpolate
from hybridzoo.mixers import SpecError


def test_values_keep_their_type_and_text_is_spliced() -> None:
    data = {
        "n": 4,
        "on": True,
        "a": {"n": "${n}", "all": "${ a2 }"},
        "a2": {"x": "${n}", "y": ["${on}"]},
        "t": "c*${n}",
    }
    assert interpolate(data) == {
        "n": 4,
        "on": True,
        "a": {"n": 4, "all": {"x": 4, "y": [True]}},
        "a2": {"x": 4, "y": [True]},
        "t": "c*4",
    }


def test_chains_and_list_items_are_followed() -> None:
    assert interpolate({"a": "${b}", "b": "${c.1}", "c": [1, "${d}"], "d": 7})["a"] == 7


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"a": "${oc.env:HOME}"}, "a: '${oc.env:HOME}': resolvers never run"),
        ({"a": {"b": "x${oc.create:[1]}"}}, "a.b: '${oc.create:[1]}': resolvers never run"),
        ({"a": "${oc.env:${b}}", "b": "HOME"}, "a: '${oc.env:${b}}': an interpolation is '${path.to.key}', closed and"),
        ({"a": "${${b}}", "b": "a"}, "closed and not nested"),
        ({"a": "${b", "b": 1}, "closed and not nested"),
        ({"a": "${}"}, "a: '${}': expected the full path of a key"),
        ({"a": {"b": "${.c}", "c": 1}}, "expected the full path of a key"),
        ({"a": "${b[0]}", "b": [1]}, "expected the full path of a key"),
        ({"a": "${d_modl}", "d_model": 8}, "a: '${d_modl}' leads nowhere: no key 'd_modl' (did you mean 'd_model'?)"),
        ({"a": "${b.1}", "b": [1]}, "leads nowhere: no key '1'"),
        ({"a": "${a}"}, "a: interpolation goes in a circle: a -> a"),
        ({"a": "${b}", "b": {"c": "${a}"}}, "interpolation goes in a circle: a -> b.c -> a"),
        ({"a": {"b": "${a}"}}, "interpolation goes in a circle: a.b -> a"),
        ({f"a{i}": f"${{a{i + 1}}}" for i in range(5000)} | {"a5000": 1}, "more than 16 interpolations in a chain"),
        ({"a0": 1} | {f"a{i}": f"${{a{i - 1}}}" for i in range(1, 5000)}, "more than 16 interpolations in a chain"),
    ],
)
def test_anything_but_a_plain_path_that_ends_is_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        interpolate(data)
    assert says in str(caught.value)
    assert os.environ["HOME"] not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "mapping"])
def test_interpolations_that_blow_up_are_refused_at_once(kind: str) -> None:
    data: dict[str, Any] = {"a0": "lol"}
    for i in range(1, 15):
        uses = [f"${{a{i - 1}}}"] * 9
        data[f"a{i}"] = "".join(uses) if kind == "text" else {f"x{j}": use for j, use in enumerate(uses)}
    start = time.perf_counter()
    with pytest.raises(SpecError, match="expand to more than 100,000 values"):
        interpolate(data)
    assert time.perf_counter() - start < 2
