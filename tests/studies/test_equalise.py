"""Stacks are made equal by the width of their FFN, as close as a width allows, and those that cannot be are named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.architectures import account, build_model
from hybridzoo.architectures.loader import spec_from
from hybridzoo.studies.equalise import equalise, parameters, with_width


def spec(layers="a c", ffn="swiglu", width=32, multiple_of=16):
    return spec_from(
        {
            "name": "small",
            "d_model": 16,
            "vocab_size": 32,
            "mixers": {"a": {"type": "attention", "n_heads": 2}, "c": {"type": "carve", "n_heads": 2, "head_dim": 8}},
            "layers": layers,
            "ffn": {"type": ffn, "width": width, "multiple_of": multiple_of} if ffn != "none" else {"type": "none"},
        }
    )


@given(
    layers=st.sampled_from(["a", "a c", "c*3", "(a+c)*2"]),
    ffn=st.sampled_from(["swiglu", "gelu", "relu2"]),
    start=st.integers(1, 300),
    target=st.integers(20_000, 400_000),
    multiple_of=st.sampled_from([1, 16, 64]),
)
@settings(max_examples=40)
def test_no_other_width_comes_closer_than_a_tenth_of_the_tolerance(layers, ffn, start, target, multiple_of):
    tolerance = 0.02
    result = equalise(spec(layers, ffn, start, multiple_of), target, tolerance)
    assert result.value == parameters(result.spec)
    width = result.spec.ffn.hidden(16)
    neighbours = [parameters(with_width(result.spec, w)) for w in (width - 1, width + 1) if w > 0]
    closest = min(abs(n - target) for n in [*neighbours, result.value])
    assert abs(result.value - target) <= max(closest, 0.1 * tolerance * target)
    assert result.reached == (abs(result.value / target - 1) <= tolerance)


def test_the_count_is_that_of_the_built_model():
    result = equalise(spec(), 30_000, 0.02)
    assert result.reached
    assert sum(p.numel() for p in build_model(result.spec).parameters()) == result.value


def test_a_round_width_is_kept_where_it_is_as_good():
    assert equalise(spec(), parameters(with_width(spec(), 64)), 0.02).spec.ffn.hidden(16) == 64
    assert equalise(spec(), parameters(with_width(spec(), 64)) + 40, 0.02).spec.ffn.hidden(16) == 64
    assert equalise(spec(), parameters(with_width(spec(), 61)), 0.001).spec.ffn.hidden(16) == 61


def test_a_stack_too_large_or_without_ffn_is_reported_with_its_distance_and_not_bent():
    small = equalise(spec("c*4"), 100, 0.02)
    assert not small.reached
    assert small.spec.ffn.hidden(16) == 1
    assert "against 100" in small.why
    assert "at an FFN width of 1" in small.why
    bare = spec("c*2", ffn="none")
    none = equalise(bare, 50_000, 0.02)
    assert not none.reached
    assert none.spec == bare
    assert "no FFN" in none.why
    exact = equalise(bare, parameters(bare), 0.02)
    assert exact.reached


def test_a_budget_past_any_width_ends_and_says_so():
    result = equalise(spec(), 10**15, 0.02)
    assert not result.reached
    assert "best FFN width" in result.why


@pytest.mark.parametrize("share", [0.7, 1.0, 1.6])
def test_other_counts_that_grow_with_the_width_are_met_too(share):
    def flops(one):
        return account(one, context=64).train_flops_per_token

    target = share * flops(with_width(spec(), 200))
    result = equalise(spec(), target, 0.01, flops)
    assert result.reached
    assert flops(result.spec) == pytest.approx(target, rel=0.01)
