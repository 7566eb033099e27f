"""Plain YAML: what is read, and what is refused before it costs anything."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.architectures.plain_yaml import read_file, read_yaml
from hybridzoo.mixers import SpecError

words = st.text(alphabet="abcxyz_", min_size=1, max_size=6)
scalars = (
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | words
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=20
)


@given(trees)
def test_dumped_data_reads_back_as_it_was(data: object) -> None:
    assert read_yaml(yaml.safe_dump(data), "x.yaml") == data


@given(st.text(max_size=60))
def test_any_text_is_data_or_a_spec_error(text: str) -> None:
    error = ""
    try:
        read_yaml(text, "x.yaml")
    except SpecError as refused:
        error = str(refused)
    assert error == "" or error.startswith("x.yaml: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3:1", "3:1"),
        ("1:30:00", "1:30:00"),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("017", 17),
        ("1e-3", 1e-3),
        ("none", "none"),
        ("null", None),
        ("'64'", "64"),
        ("(c*3 a)*2", "(c*3 a)*2"),
        ("carve[erase=token,write=one] a", "carve[erase=token,write=one] a"),
    ],
)
def test_scalars_are_read_without_yaml_s_surprises(text: str, value: object) -> None:
    assert read_yaml(f"x: {text}", "x.yaml") == {"x": value}


def test_aliases_and_merge_keys_share_values_within_a_file() -> None:
    text = "a: &a {n: 1, m: 2}\nb: {<<: *a, m: 3}\nc: {<<: [{m: 9}, *a]}\nd: *a"
    assert read_yaml(text, "x.yaml") == {
        "a": {"n": 1, "m": 2},
        "b": {"n": 1, "m": 3},
        "c": {"n": 1, "m": 9},
        "d": {"n": 1, "m": 2},
    }


def billion_laughs(merge: bool) -> str:
    lines = ["a0: &a0 {x: lol}" if merge else "a0: &a0 [lol]"]
    for i in range(1, 40):
        uses = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{uses}]}}" if merge else f"a{i}: &a{i} [{uses}]")
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_blow_up_are_refused_at_once(merge: bool) -> None:
    start = time.perf_counter()
    with pytest.raises(SpecError, match="more than 10,000 values once its aliases are expanded"):
        read_yaml(billion_laughs(merge), "x.yaml")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml: line 3, column 1: the key 'a' is already given on line 1"),
        ("a: {b: 1, b: 1}", "x.yaml: line 1, column 11: the key 'b' is already given"),
        ("a: [1, 2", "x.yaml: line 1, column 9: expected ',' or ']'"),
        ("c: {type: carve[erase=token], n_heads: 4}", "needs quotes"),
        ("a: &x [*x]", "an alias stands inside the value it names"),
        ("a: &x {b: {c: *x}}", "an alias stands inside the value it names"),
        ("a: *nowhere", "found undefined alias 'nowhere'; a value that starts with '*' needs quotes"),
        (
            "a: 1\n\tb: 2",
            "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("a: 1\nb: 'open\nc: 3\n", "unexpected end of stream, while scanning a quoted scalar from line 2 on"),
        ("? [a, b]\n: 1", "a key must be text"),
        ("a: {<<: 3}", "'<<' merges a mapping"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("[" * 33 + "]" * 33, "at most 32 levels"),
        ("[" * 100_000, "at most 32 levels"),
        ("a: \x00", "x.yaml: not YAML"),
    ],
)
def test_bad_yaml_is_an_error_with_its_place(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_yaml(text, "x.yaml")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {path}']",
        "!!python/object/apply:builtins.open ['{path}', 'w']",
        "!!python/name:os.system",
        "!custom 3",
        "!!binary aGk=",
    ],
)
def test_reading_never_runs_code(value: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    with pytest.raises(SpecError, match="is not allowed: a file is plain data"):
        read_yaml(f"a: {value.format(path=touched)}", "x.yaml")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected a mapping of keys to values, got nothing"),
        (b"- 1", "expected a mapping of keys to values, got a list"),
        (b"text", "expected a mapping of keys to values, got 'text'"),
        (b"a: \xff\xfe", "not UTF-8 text"),
        (b"#" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=f"^x.yaml: {says}"):
        read_file(path, "x.yaml")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="x: is a directory"):
        read_file(tmp_path, "x")
