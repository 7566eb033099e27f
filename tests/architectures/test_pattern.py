"""The layer-pattern language: what expands to what, and what an error shows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybridzoo.architectures.pattern import MAX_LAYERS, is_name, parse_pattern
from hybridzoo.mixers import SpecError

NAMES = ["a", "c", "kda", "carve-paper", "carve[erase=token,write=one]", "_x9"]

# An abstract pattern is ("layer", names, count) or ("group", items, count); count None is a missing repeat.
counts = st.none() | st.integers(1, 4)
layers = st.tuples(st.just("layer"), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), counts)
items = st.recursive(
    layers, lambda inner: st.tuples(st.just("group"), st.lists(inner, min_size=1, max_size=3), counts), max_leaves=8
)
patterns = st.lists(items, min_size=1, max_size=4)
spaces = st.sampled_from(["", " ", "\n  ", "\t"])


def printed(item: Any, space: str) -> str:
    kind, inside, count = item
    repeat = "" if count is None else f"{space}*{space}{count}"
    if kind == "group":
        return f"({space}{' '.join(printed(member, space) for member in inside)}{space}){repeat}"
    joined = f"{space}+{space}".join(inside)
    return f"({joined}){repeat}" if count is not None and len(inside) > 1 else f"{joined}{repeat}"


def expanded(item: Any) -> list[tuple[str, ...]]:
    kind, inside, count = item
    once = [tuple(inside)] if kind == "layer" else [layer for member in inside for layer in expanded(member)]
    return once * (1 if count is None else count)


@given(patterns, spaces)
def test_a_printed_pattern_parses_to_its_expansion(pattern: list[Any], space: str) -> None:
    text = " ".join(printed(item, space) for item in pattern)
    assert list(parse_pattern(text)) == [layer for item in pattern for layer in expanded(item)]


@given(st.text(alphabet="ac()*+[]= 0123:,.\n-é", max_size=30))
def test_any_text_gives_layers_or_a_spec_error_that_shows_the_place(text: str) -> None:
    try:
        layers = parse_pattern(text)
    except SpecError as error:
        head, line, carets = str(error).split("\n")
        column = int(head.split("column ")[1].split(":")[0])
        assert carets.index("^") == 4 + column - 1
        assert line == "    " + "".join(" " if char.isspace() else char for char in text)
    else:
        assert 1 <= len(layers) <= MAX_LAYERS
        assert all(layers)


def test_the_design_s_example_is_eight_layers() -> None:
    assert parse_pattern("(c*3 a)*2") == (("c",), ("c",), ("c",), ("a",)) * 2


def test_plus_runs_mixers_in_parallel_in_one_layer() -> None:
    assert parse_pattern("c+a (c + kda)*2") == (("c", "a"), ("c", "kda"), ("c", "kda"))


def test_flags_stay_with_their_name_and_lose_white_space() -> None:
    assert parse_pattern("carve[erase=token, write=one]*2") == (("carve[erase=token,write=one]",),) * 2


@given(st.text(alphabet="ac9.-_[]=, (*+", min_size=1, max_size=8) | st.sampled_from(NAMES))
@example("_[")
@example("a[")
def test_a_name_is_what_a_pattern_reads_as_one_layer_of_one_mixer(text: str) -> None:
    try:
        read = parse_pattern(text) == ((text,),)
    except SpecError:
        read = False
    assert is_name(text) or not read
    assert read or not is_name(text) or " " in text  # white space within flags is dropped


def test_exactly_the_limit_expands() -> None:
    assert len(parse_pattern("((a*16)*16)*16")) == MAX_LAYERS


@pytest.mark.parametrize(
    "text",
    [
        "a*4097",
        "a*4096 a",
        "((((((((a*9)*9)*9)*9)*9)*9)*9)*9)*9",
        "(a*64 c)*64",
        "a*" + "9" * 100_000,
        "(a*4096)*1000000000",
        "a " * 4097,
    ],
)
def test_an_explosion_is_refused_before_it_is_expanded(text: str) -> None:
    with pytest.raises(SpecError, match="expands past 4,096 layers"):
        parse_pattern(text)


def test_a_layer_of_too_many_mixers_is_refused() -> None:
    assert len(parse_pattern("+".join("a" * 64))[0]) == 64
    with pytest.raises(SpecError, match="more than 64 mixers in one layer"):
        parse_pattern("+".join("a" * 100_000))


def test_any_depth_of_parentheses_is_read() -> None:
    assert parse_pattern("(" * 50_000 + "a" + ")" * 50_000) == (("a",),)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "no layers: expected a mixer name or '('"),
        ("  ", 3, "no layers"),
        ("()", 2, "empty group"),
        ("(c*3 a", 1, "'(' is never closed"),
        ("c a)", 4, "')' closes nothing"),
        ("*3 c", 1, "expected a mixer name or '('"),
        ("3*c", 1, "a repeat follows what it repeats, as in 'c*3'"),
        ("3x c a", 1, "a repeat follows what it repeats, as in 'c*3'"),
        ("c 3", 3, "a repeat follows what it repeats, as in 'c*3'"),
        ("c*", 3, "expected a count after '*'"),
        ("c*a", 3, "expected a count after '*'"),
        ("c*0", 3, "at least 1"),
        ("c*000", 3, "at least 1"),
        ("c*-1", 3, "unexpected '-'"),
        ("c*2*3", 4, "multiply the counts"),
        ("c*2a", 4, "white space after a count"),
        ("+c", 1, "'+' joins the mixers of one layer"),
        ("c+", 3, "expected a mixer name"),
        ("c+(a)", 3, "expected a mixer name"),
        ("(a)+c", 4, "'+' joins the mixers of one layer"),
        ("c+a*3", 4, "write '(c+a)*n'"),
        ("3:1", 2, "a ratio of 3 to 1 is written '(c*3 a)'"),
        ("c, a", 2, "separated by white space"),
        ("carve[erase=token", 6, "'[' is never closed"),
        ("carve erase=token]", 12, "unexpected '='"),
        ("carve [erase=token]", 7, "flags follow a mixer's name directly"),
    ],
)
def test_an_error_names_the_column_and_what_was_expected(text: str, column: int, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pattern(text, where="x.yaml: layers")
    assert str(caught.value).startswith(f"x.yaml: layers: column {column}: ")
    assert says in str(caught.value)


def test_an_unknown_name_is_underlined_and_the_nearest_offered() -> None:
    with pytest.raises(SpecError) as caught:
        parse_pattern("(crave[erase=token]*3 a)*2", names=["a", "carve", "kda"])
    assert str(caught.value) == (
        "layers: column 2: unknown mixer 'crave' (did you mean 'carve'?); known: a, carve, kda; "
        "one of your own comes with the code that registers it: import that, on a command line by --import FILE.py\n"
        "    (crave[erase=token]*3 a)*2\n"
        "     ^^^^^"
    )


def test_a_long_pattern_is_shown_around_the_fault_only() -> None:
    with pytest.raises(SpecError) as caught:
        parse_pattern("c " * 200 + "? " + "a " * 200)
    _, line, carets = str(caught.value).split("\n")
    assert line[carets.index("^")] == "?"
    assert len(line) < 90
    assert line.strip().startswith("...")
    assert line.endswith("...")
