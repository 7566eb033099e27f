"""The words of generation: which are taken, which tokens they draw, what ends a continuation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridzoo.architectures import Ending, Sampling
from hybridzoo.architectures.sampling import Picker

CPU = torch.device("cpu")


def drawn(logits: Tensor, rows: int = 2000, **words: Any) -> set[int]:
    """The tokens that many draws from logits `[V]` give."""
    return set(Picker(Sampling(seed=0, **words), CPU, rows)(logits.expand(rows, -1)).tolist())


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ({"temperature": None}, TypeError, "temperature must be a number, 0 (the likeliest token) or above, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, 0 (the likeliest token) or above, got '1'"),
        ({"temperature": True}, TypeError, "temperature must be a number, 0 (the likeliest token) or above, got True"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0 (the likeliest token) or above, got inf"),
        ({"temperature": 10**400}, ValueError, "temperature must be 0 (the likeliest token) or above, got inf"),
        ({"temperature": 1.0, "top_k": "3"}, TypeError, "top_k must be a whole number, at least 1, got '3'"),
        ({"temperature": 1.0, "top_k": 2.5}, TypeError, "top_k must be a whole number, at least 1, got 2.5"),
        ({"temperature": 1.0, "top_k": True}, TypeError, "top_k must be a whole number, at least 1, got True"),
        ({"temperature": 1.0, "top_k": np.True_}, TypeError, "top_k must be a whole number, at least 1, got np.True_"),
        ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be a whole number, at least 1, got 0"),
        ({"temperature": 1.0, "top_p": "a"}, TypeError, "top_p must be a number, above 0 and at most 1, got 'a'"),
        ({"temperature": 1.0, "min_p": float("nan")}, ValueError, "min_p must be above 0 and at most 1, got nan"),
        (
            {"temperature": 1.0, "seed": "a"},
            TypeError,
            f"seed must be a whole number, {-(2**63)} to {2**64 - 1}, got 'a'",
        ),
        ({"seed": 2**64}, ValueError, f"seed must be a whole number, {-(2**63)} to {2**64 - 1}, got {2**64}"),
        ({"seed": 1.0}, TypeError, f"seed must be a whole number, {-(2**63)} to {2**64 - 1}, got 1.0"),
    ],
)
def test_words_of_another_kind_or_out_of_range_are_refused(
    words: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as refusal:
        Sampling(**words)
    assert str(refusal.value) == says


def test_numbers_of_numpy_are_numbers() -> None:
    given = Sampling(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.25), min_p=np.float16(0.5), seed=np.uint8(7)
    )
    assert given == Sampling(temperature=0.5, top_k=3, top_p=0.25, min_p=0.5, seed=7)
    assert type(given.top_k) is type(given.seed) is int
    assert type(given.temperature) is float
    assert type(Ending(eos=np.int32(4)).eos) is int
    for seed in (-(2**63), 2**64 - 1):
        Picker(Sampling(temperature=1.0, seed=seed), CPU, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-39, 1e-45, 5e-324, 1e-30])
def test_a_tiny_temperature_takes_the_likeliest_and_equals_share(dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([-3.0, 4.0, 0.0, 4.0, 3.9], dtype=dtype)
    assert drawn(logits, temperature=temperature) == {1, 3}
    assert drawn(logits * 7e37, temperature=temperature) == {1, 3}
    assert drawn(logits, temperature=temperature, top_k=1) == {1}


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e300])
def test_a_huge_temperature_draws_of_all(temperature: float) -> None:
    assert drawn(torch.tensor([0.0, 50.0, -50.0]), temperature=temperature) == {0, 1, 2}


def test_any_share_however_small_leaves_the_likeliest() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    for words in ({"top_p": 1e-300}, {"min_p": 1.0}, {"top_p": 5e-324, "min_p": 5e-324}):
        assert drawn(logits, temperature=1.0, **words) == {1}
    assert drawn(logits, temperature=1.0, top_p=1.0, min_p=5e-324) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_draws_from_exactly_k_and_equals_go_to_the_lower_id(dtype: torch.dtype) -> None:
    assert drawn(torch.zeros(50, dtype=dtype), temperature=1.0, top_k=5) == set(range(5))
    some = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 2.0], dtype=dtype)
    for k, ids in (
        (1, {2}),
        (2, {2, 6}),
        (3, {0, 2, 6}),
        (4, {0, 2, 3, 6}),
        (6, {0, 1, 2, 3, 4, 6}),
        (7, set(range(7))),
    ):
        assert drawn(some, temperature=1.0, top_k=k) == ids
    # Near enough to be one number in bfloat16, and each row by itself.
    rows = torch.stack([8 + torch.arange(20) / 1000, torch.arange(20.0), torch.zeros(20)]).to(dtype)
    picker = Picker(Sampling(temperature=1.0, top_k=1, seed=0), CPU, 3)
    assert picker(rows).tolist() == [int(row.argmax()) for row in rows]


@given(values=st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=2, max_size=12), k=st.integers(1, 12))
def test_top_k_is_a_stable_ranking(values: list[float], k: int) -> None:
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert drawn(torch.tensor(values), 500, temperature=20.0, top_k=k) == set(ranked)


def test_top_p_gives_equals_to_the_lower_id() -> None:
    assert drawn(torch.zeros(40), temperature=1.0, top_p=0.099) == set(range(4))


def test_a_row_draws_by_its_own_generator_and_the_first_by_the_seed_itself() -> None:
    logits, sampling = torch.randn(4, 30), Sampling(temperature=2.0, seed=11)
    together, fewer = Picker(sampling, CPU, 4), Picker(sampling, CPU, 2)
    steps = [together(logits) for _ in range(20)]
    assert all(torch.equal(fewer(logits[:2]), step[:2]) for step in steps)
    single = torch.Generator().manual_seed(11)
    for step in steps:  # as torch draws one row from one generator
        assert step[0] == torch.multinomial((logits[:1] / 2).softmax(-1), 1, generator=single)[0, 0]
    same = Picker(sampling, CPU, 4)
    columns = torch.stack([same(logits[:1].expand(4, -1)) for _ in range(20)], 1).tolist()
    assert len({tuple(column) for column in columns}) == 4


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (
            {"stop": 5, "decode": str},
            TypeError,
            "stop must be a string or several, each of at least one character, got 5",
        ),
        (
            {"stop": [5], "decode": str},
            TypeError,
            "stop must be a string or several, each of at least one character, got [5]",
        ),
        (
            {"stop": "", "decode": str},
            ValueError,
            "stop must be a string or several, each of at least one character, got ''",
        ),
        ({"eos": "a"}, TypeError, "eos must be a whole number, at least 0, got 'a'"),
        ({"eos": True}, TypeError, "eos must be a whole number, at least 0, got True"),
        ({"eos": -1}, ValueError, "eos must be a whole number, at least 0, got -1"),
        ({"stop": "a"}, ValueError, "stop strings need decode, a function from a list of tokens to their text"),
        (
            {"stop": "a", "decode": "utf-8"},
            TypeError,
            "decode must be a function from a list of tokens to their text, got 'utf-8'",
        ),
    ],
)
def test_endings_of_another_kind_are_refused(words: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as refusal:
        Ending(**words)
    assert str(refusal.value) == says


def test_a_single_stop_string_stands_by_itself() -> None:
    def text(tokens: list[int]) -> str:
        return bytes(tokens).decode()

    assert Ending(stop="ab", decode=text) == Ending(stop=("ab",), decode=text) == Ending(stop=["ab"], decode=text)
    ending = Ending(stop="ab", decode=text)
    assert not ending.ends(list(b"xa"))
    assert ending.ends(list(b"xab"))
    assert Ending(stop=None).stop == ()


def test_decode_must_give_text() -> None:
    with pytest.raises(TypeError, match=r"^decode must return the text of its tokens, a str, got None$"):
        Ending(stop="a", decode=lambda tokens: None).ends([1])


def utf8(tokens: list[int]) -> str:
    """Bytes, and 256, which has no text, as special tokens have none."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_a_stop_string_is_found_over_tokens_without_text() -> None:
    ending = Ending(stop="ab", decode=utf8)
    for empty in (1, 20, 500):
        tokens = [*b"xxxxa", *[256] * empty, *b"b"]
        assert ending.ends(tokens)
        assert not any(ending.ends(tokens[:n]) for n in range(1, len(tokens)))


def test_a_stop_string_of_characters_of_several_tokens_is_found() -> None:
    for stop in ("é", "\N{GRINNING FACE}", "\N{GRINNING FACE}é\N{GRINNING FACE}"):
        tokens = [*b"some text before it ", *stop.encode()]
        ending = Ending(stop=stop, decode=utf8)
        assert ending.ends(tokens)
        assert not any(ending.ends(tokens[:n]) for n in range(1, len(tokens)))


LETTERS = st.sampled_from(["a", "b", "é", "€", "\N{GRINNING FACE}"])


@given(text=st.lists(LETTERS | st.just(""), min_size=1, max_size=40), stop=st.lists(LETTERS, min_size=1, max_size=4))
def test_a_stop_string_ends_where_the_whole_text_first_holds_it(text: list[str], stop: list[str]) -> None:
    tokens = [token for letter in text for token in (letter.encode() if letter else [256] * 9)]
    ending = Ending(stop="".join(stop), decode=utf8)
    for n in range(1, len(tokens) + 1):
        found = "".join(stop) in utf8(tokens[:n])
        assert ending.ends(tokens[:n]) == found
        if found:
            break


def test_a_token_of_much_text_may_hold_a_stop_string() -> None:
    words = ["ab", "c" * 50, "x" + "ab" + "y" * 30, ""]
    ending = Ending(stop=("bc", "xab"), decode=lambda tokens: "".join(words[i] for i in tokens))
    assert ending.ends([1, 1, 0, 3, 3, 3, 3, 3, 3, 3, 3, 1])
    assert ending.ends([1, 1, 1, 2])
    assert not ending.ends([1, 1, 1, 1])
