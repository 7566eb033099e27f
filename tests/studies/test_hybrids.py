"""A hybrid of a study is its two mixers, a ratio, a placement and a mix; equal stacks are listed once."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.architectures.pattern import parse_pattern
from hybridzoo.mixers import SpecError
from hybridzoo.studies import load_study, make_plan, study_from
from hybridzoo.studies.hybrids import Hybrid, written

PLACEMENTS = ["even", "first", "last", "middle", "sandwiched", "clustered"]
HYBRID = {"recurrent": "c", "attention": "a", "layers": 4}


def study(**keys):
    data = {
        "name": "small",
        "spec": {
            "d_model": 16,
            "mixers": {
                "a": {"type": "attention", "n_heads": 2},
                "c": {"type": "carve", "n_heads": 2, "head_dim": 8},
                "g": {"type": "gdn2", "n_heads": 2, "head_dim": 8},
            },
            "ffn": {"type": "swiglu", "width": 16},
        },
        "stacks": {"carve": {"hybrid": HYBRID}},
        "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 8, "values": 8, "train": {"steps": 2}}},
    }
    return study_from({**data, **keys}, "mine.yaml")


def patterns(**keys):
    return {stack.label: stack.pattern for stack in make_plan(study(**keys)).stacks}


hybrids = st.integers(1, 24).flatmap(
    lambda layers: st.builds(
        Hybrid,
        recurrent=st.just("c"),
        attention=st.just("a"),
        layers=st.just(layers),
        ratio=st.integers(0, layers).map(lambda k: str(Fraction(k, layers))),
        placement=st.sampled_from(PLACEMENTS),
        mix=st.sampled_from(["inter", "intra"]),
    )
)


@given(hybrids)
def test_a_hybrid_has_its_layers_and_its_ratio_of_attention(hybrid):
    layers = parse_pattern(hybrid.pattern)
    assert len(layers) == hybrid.layers
    assert sum("a" in layer for layer in layers) == Fraction(str(hybrid.ratio)) * hybrid.layers
    having = ("a",) if hybrid.mix == "inter" else ("c", "a")
    assert set(layers) <= {having, ("c",)}


@given(hybrids)
def test_attention_stands_where_the_placement_says(hybrid):
    places = [place for place, has in enumerate(hybrid.places) if has]
    n, k = hybrid.layers, len(places)
    gaps = [b - a for a, b in zip([-1, *places], places, strict=False)]  # layers from one attention to the next
    if hybrid.placement == "first":
        assert places == list(range(k))
    elif hybrid.placement == "last":
        assert places == list(range(n - k, n))
    elif hybrid.placement == "middle" and k:
        assert places == list(range(places[0], places[0] + k))
        assert abs(places[0] - (n - 1 - places[-1])) <= 1
    elif hybrid.placement == "sandwiched":
        before = sum(has for has in hybrid.places[: -(-k // 2)])
        assert before == -(-k // 2)
        assert hybrid.places[n - k // 2 :] == [True] * (k // 2)
    elif hybrid.placement == "even" and k:
        assert max(gaps) - min(gaps) <= 1
        assert places[-1] == n - 1
    elif hybrid.placement == "clustered" and k:
        assert places[-1] == n - 1
        between = [gap - 1 for gap in gaps[::2]]  # recurrent layers before each pair
        assert max(between) - min(between) <= 1
        assert all(gap == 1 for gap in gaps[1::2])


@given(st.lists(st.sampled_from(["c", "a", "c+a"]), min_size=1, max_size=16))
def test_a_pattern_is_written_as_the_layers_it_expands_to(layers):
    assert ["+".join(layer) for layer in parse_pattern(written(layers))] == layers


def test_patterns_are_written_as_people_write_them():
    def of(**words):
        return Hybrid(**{"recurrent": "c", "attention": "a", "layers": 8, **words}).pattern

    assert of(ratio="1/4") == of(ratio=0.25) == "(c*3 a)*2"
    assert of(ratio=0) == "c*8"
    assert of(ratio=1) == "a*8"
    assert of(ratio="1/4", placement="first") == "a*2 c*6"
    assert of(ratio="1/4", mix="intra") == "(c*3 c+a)*2"
    assert of(ratio=1, mix="intra") == "(c+a)*8"
    assert of(ratio="1/2", placement="clustered") == "(c*2 a*2)*2"
    assert of(ratio="1/2", placement="sandwiched") == "a*2 c*4 a*2"


def test_axes_of_a_hybrid_give_its_patterns_and_readable_labels():
    axes = {"ratio": [0, "1/4", "1/2", 1], "placement": ["even", "first"]}
    assert patterns(axes=axes) == {
        "carve, ratio=0": "c*4",
        "carve, ratio=1/4, placement=even": "c*3 a",
        "carve, ratio=1/4, placement=first": "a c*3",
        "carve, ratio=1/2, placement=even": "(c a)*2",
        "carve, ratio=1/2, placement=first": "a*2 c*2",
        "carve, ratio=1": "a*4",
    }


def test_a_stack_says_its_placement_where_it_has_one():
    plan = make_plan(study(axes={"ratio": [0, "1/2", 1], "placement": ["last"]}))
    assert [(stack.attention, stack.placement) for stack in plan.stacks] == [(0, ""), (0.5, "last"), (1, "")]
    plain = make_plan(study(stacks={"plain": {"layers": "c a"}}))
    assert [stack.placement for stack in plain.stacks] == [""]


def test_side_by_side_is_an_axis_too():
    assert patterns(axes={"ratio": [0, "1/2"], "mix": ["inter", "intra"]}) == {
        "carve, ratio=0": "c*4",
        "carve, ratio=1/2, mix=inter": "(c a)*2",
        "carve, ratio=1/2, mix=intra": "(c c+a)*2",
    }


def test_equal_stacks_of_one_hybrid_are_listed_once_and_said():
    plan = make_plan(study(axes={"ratio": ["1/4"], "placement": ["even", "last", "first", "sandwiched"]}))
    assert [stack.label for stack in plan.stacks] == [
        f"carve, ratio=1/4, placement={name}" for name in ("even", "first")
    ]
    assert plan.repeats == (
        "carve, ratio=1/4, placement=last: is carve, ratio=1/4, placement=even again, and listed once",
        "carve, ratio=1/4, placement=sandwiched: is carve, ratio=1/4, placement=first again, and listed once",
    )


def test_hybrids_meet_at_attention_alone_once():
    two = {"carve": {"hybrid": HYBRID}, "gdn2": {"hybrid": {**HYBRID, "recurrent": "g"}}}
    axes = {"ratio": [0, 1], "mixers.a.window": [4, 8]}
    assert patterns(stacks=two, axes=axes) == {
        "carve, ratio=0": "c*4",
        "all attention, window=4": "a*4",
        "all attention, window=8": "a*4",
        "gdn2, ratio=0": "g*4",
    }
    declared = {**two, "attention": {"layers": "a*4"}}
    found = patterns(stacks=declared, axes={"ratio": [0, 1]})
    assert found == {"carve, ratio=0": "c*4", "gdn2, ratio=0": "g*4", "attention": "a*4"}


def test_stacks_that_are_no_hybrid_have_no_ratio():
    stacks = {"plain": {"layers": "c a"}, "carve": {"hybrid": {**HYBRID, "placement": "first"}}}
    assert patterns(stacks=stacks, axes={"ratio": ["1/2"], "mixers.a.window": [4]}) == {
        "plain, window=4": "c a",
        "carve, ratio=1/2, window=4": "a*2 c*2",
    }


def test_an_axis_that_changes_only_some_stacks_stays_with_these():
    plan = make_plan(study(axes={"ratio": [0, "1/2"], "mixers.a.window": [4, 8]}))
    assert [stack.label for stack in plan.stacks] == [
        *("carve, ratio=0", "carve, ratio=1/2, window=4", "carve, ratio=1/2, window=8")
    ]
    assert plan.repeats == ("carve, ratio=0: listed once along window, which changes nothing of it",)


@pytest.mark.parametrize(
    ("path", "values", "word"),
    [
        ("mixers.a.window", [4, 8], "window"),
        ("mixers.c.content_chunk", [16, 32], "content_chunk"),
        ("mixers.c.content_rank", [4, 8], "content_rank"),
        ("mixers.c.decay", ["scalar", "channel"], "decay"),
        ("mixers.c.erase", ["none", "token", "content"], "erase"),
        ("mixers.c.correct", ["none", "tied", "scalar", "channel"], "correct"),
        ("mixers.c.write", ["one", "scalar"], "write"),
        ("mixers.c.predict", ["decayed", "stored"], "predict"),
    ],
)
def test_every_word_of_a_mixer_is_an_axis(path, values, word):
    plan = make_plan(study(axes={"ratio": ["1/2"], path: values}))
    assert [stack.label for stack in plan.stacks] == [f"carve, ratio=1/2, {word}={value}" for value in values]
    _, mixer, _ = path.split(".")
    assert [stack.specs["recall"]["mixers"][mixer][word] for stack in plan.stacks] == values


EVERY = {"ratio": [0, "1/2"]}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"axes": {"ratio": ["1/3"]}},
            r"axes\.ratio: 1/3 of 4 layers is no whole number; the nearest are 1/4 and 1/2; there are: 0, 1/4, 1/2, "
            r"3/4, 1 \(of stacks\.carve\)",
        ),
        ({"axes": {"ratio": ["3:1"]}}, r"axes\.ratio: expected a share such as 1/4 or 0\.25, got '3:1'"),
        ({"axes": {"ratio": ["1/0"]}}, r"axes\.ratio: expected a share"),
        ({"axes": {"ratio": [2]}}, r"axes\.ratio: must be a share from 0 to 1, got 2"),
        ({"axes": {**EVERY, "placement": ["frist"]}}, r"axes\.placement: 'frist' is not one of .*did you mean 'first'"),
        ({"axes": {**EVERY, "mix": ["both"]}}, r"axes\.mix: 'both' is not one of inter, intra"),
        ({"axes": {"placement": ["even"]}}, r"stacks\.carve\.hybrid: missing 'ratio': give it here, or as an axis"),
        ({"axes": EVERY, "stacks": {"s": {"layers": "a"}}}, r"axes\.ratio: is an axis of hybrids, and no stack is one"),
        ({"stacks": {"s": {"hybrid": 3}}}, r"stacks\.s\.hybrid: expected its words, as in stacks: .*recurrent: c"),
        ({"stacks": {"s": {"hybrid": {**HYBRID, "ratoi": 1}}}}, r"stacks\.s\.hybrid: .*'ratio'"),
        (
            {"stacks": {"s": {"hybrid": {**HYBRID, "ratio": 1, "layer": 8}}}},
            r"stacks\.s\.hybrid: unknown key 'layer' \(did you mean 'layers'",
        ),
        (
            {"stacks": {"s": {"hybrid": {**HYBRID, "ratio": 1, "layers": 0}}}},
            r"stacks\.s\.hybrid\.layers: must be from 1 to 4,096, got 0",
        ),
        (
            {"stacks": {"s": {"hybrid": {**HYBRID, "ratio": "1/3"}}}},
            r"stacks\.s\.hybrid\.ratio: 1/3 of 4 layers is no whole number",
        ),
        (
            {"stacks": {"s": {"hybrid": {**HYBRID, "attention": "c", "ratio": 1}}}},
            r"stacks\.s\.hybrid\.attention: a hybrid is of two mixers, and recurrent is 'c' too",
        ),
        (
            {"stacks": {"s": {"hybrid": {**HYBRID, "recurrent": "c*2", "ratio": 1}}}},
            r"stacks\.s\.hybrid\.recurrent: expected the name of one mixer, such as c, got 'c\*2'",
        ),
        (
            {"axes": EVERY, "stacks": {"s": {"hybrid": {**HYBRID, "ratio": 1}}}},
            r"stacks\.s\.hybrid\.ratio: is also an axis; one of the two must go",
        ),
        (
            {"axes": EVERY, "stacks": {"s": {"hybrid": HYBRID, "layers": "a"}}},
            r"stacks\.s\.hybrid: gives the layers, and so do 'layers'; one of the two must go",
        ),
    ],
)
def test_a_mistake_in_a_hybrid_is_placed_and_answered(keys, said):
    with pytest.raises(SpecError, match=rf"^mine\.yaml: {said}"):
        study(**keys)


@pytest.mark.parametrize("word", ["recurrent", "attention"])
@pytest.mark.parametrize("ratio", [0, "1/2", 1])
def test_a_mixer_that_a_hybrid_does_not_find_is_put_on_its_word(word, ratio):
    wrong = study(stacks={"s": {"hybrid": {**HYBRID, word: "q", "ratio": ratio}}})
    with pytest.raises(
        SpecError, match=rf"^mine\.yaml: stacks\.s\.hybrid\.{word}: unknown mixer 'q'.*known: a, c, g"
    ) as e:
        make_plan(wrong)
    assert "column" not in str(e.value)


def test_words_that_a_mixer_of_a_hybrid_lacks_are_put_on_its_word():
    wrong = study(stacks={"s": {"hybrid": {**HYBRID, "recurrent": "kda", "ratio": "1/2"}}})
    with pytest.raises(SpecError, match=r"^mine\.yaml: stacks\.s\.hybrid\.recurrent: kda: missing n_heads"):
        make_plan(wrong)


@pytest.mark.parametrize("ratio", [0, "1/4", 1])
def test_a_hybrid_whose_mixers_are_swapped_is_refused(ratio):
    swapped = study(stacks={"s": {"hybrid": {"recurrent": "a", "attention": "c", "layers": 4, "ratio": ratio}}})
    said = r"^mine\.yaml: stacks\.s\.hybrid: recurrent is 'a', which is softmax attention, .*: are the two swapped\?"
    with pytest.raises(SpecError, match=said):
        make_plan(swapped)


def test_a_hybrid_may_be_of_two_mixers_of_one_kind():
    assert patterns(stacks={"s": {"hybrid": {**HYBRID, "attention": "g", "ratio": "1/4"}}}) == {"s": "c*3 g"}
    window = {"recurrent": "a[window=4]", "attention": "a", "layers": 4, "ratio": "1/4"}
    assert patterns(stacks={"s": {"hybrid": window}}) == {"s": "a[window=4]*3 a"}


def test_hybrids_and_their_axes_may_come_from_overrides():
    words = [
        "stacks={mine: {hybrid: {recurrent: c, attention: a, layers: 4}}}",
        *("axes.ratio=[0, 1/4]", "stacks.mine.hybrid.placement=last"),
    ]
    plan = make_plan(load_study("quickstart", words))
    assert [(stack.label, stack.pattern) for stack in plan.stacks] == [
        *(("mine, ratio=0", "c*4"), ("mine, ratio=1/4", "c*3 a"))
    ]
    with pytest.raises(SpecError, match=r"^override 'axes.ratio=\[1/3\]': axes.ratio: 1/3 of 4 layers"):
        load_study("quickstart", [words[0], "axes.ratio=[1/3]"])
