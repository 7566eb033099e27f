"""A stack meets a budget by the sizes that may move and by nothing else, within the tolerance, or it is left out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridzoo.architectures import account, build_model
from hybridzoo.architectures.loader import spec_from
from hybridzoo.mixers.attention import AttentionConfig
from hybridzoo.mixers.delta import DeltaConfig
from hybridzoo.mixers.mamba2 import Mamba2Config
from hybridzoo.studies import memory as memory_module
from hybridzoo.studies.equalise import parameters, within
from hybridzoo.studies.memory import memory, value_size, with_mixers
from hybridzoo.studies.solve import Budget, budget_of, changes, met_on, solve

CONTEXT = 64
LAYERS = ["a", "a c", "w c", "a w c*2", "c*3", "m*2", "m a", "(a+c)*2", "c g w"]


@pytest.fixture(scope="module", autouse=True)
def small_heads():
    """Half a second for every stack that is left out goes into sizes that no test here needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "MAX_VALUE_SIZE", 40)
        yield


def spec(layers="a c", width=64, **ffn):
    return spec_from(
        {
            "name": "small",
            "d_model": 16,
            "vocab_size": 32,
            "mixers": {
                "a": {"type": "attention", "n_heads": 4},
                "w": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "window": 24},
                "c": {"type": "carve", "n_heads": 2, "head_dim": 8},
                "g": {"type": "gdn2", "n_heads": 2, "head_dim": 8, "head_v_dim": 16},
                "m": {"type": "mamba2", "head_dim": 8, "state_dim": 8},
            },
            "layers": layers,
            "ffn": {"type": "swiglu", "width": width, "multiple_of": 1, **ffn},
        }
    )


def budget(name="inference_bytes", length=24):
    return budget_of(name, {"task": 32}, {"task": length}, CONTEXT)


def configs(one):
    return [config for layer in one.layers for _, config in layer.mixers]


def sizes(config):
    """What may move in a mixer: all of it in one direction."""
    if isinstance(config, AttentionConfig):
        return min(CONTEXT, config.window or CONTEXT), config.kv_heads
    return (value_size(config),)


def same_but_sizes(old, new):
    if isinstance(old, AttentionConfig):
        return replace(new, window=old.window, n_kv_heads=old.n_kv_heads) == old
    if isinstance(old, DeltaConfig):
        return replace(new, head_v_dim=old.head_v_dim) == old
    assert isinstance(old, Mamba2Config)
    return new.heads == old.heads and replace(new, n_heads=old.n_heads, head_dim=old.head_dim, expand=old.expand) == old


@given(layers=st.sampled_from(LAYERS), context=st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_memory_is_what_the_account_counts(layers, context):
    assert memory(spec(layers), context) == account(spec(layers), context=context).state_bytes


@given(
    layers=st.sampled_from(LAYERS),
    name=st.sampled_from(["params", "train_flops", "inference_bytes"]),
    share=st.floats(0.3, 3),
    tolerance=st.sampled_from([0.002, 0.01, 0.05]),
)
@settings(max_examples=25, deadline=None)
def test_a_stack_is_within_the_tolerance_or_left_out_with_its_distance(layers, name, share, tolerance):
    declared, held = spec(layers), budget(name)
    target = round(share * held.count(declared))
    solved = solve(declared, held, target, tolerance)
    reached = within(held.count(solved.spec), target, tolerance)
    if name == "inference_bytes":
        reached = reached and within(parameters(solved.spec), parameters(declared), tolerance)
    assert reached == (not solved.why)
    if solved.why:
        assert "%" in solved.why
        assert f"{held.count(solved.spec):,}" in solved.why or "parameters" in solved.why
    else:
        assert f"{held.count(solved.spec):,}" in solved.said
        assert f"{target:,}" in solved.said
        assert account(solved.spec, context=CONTEXT).parameters > 0  # it can be built


@given(layers=st.sampled_from(["a", "a c", "w c*2", "c*3", "m a", "(a+c)*2"]), share=st.floats(0.3, 3))
@settings(max_examples=12, deadline=None)
def test_nothing_moves_but_what_is_said_to(layers, share):
    declared = spec(layers)
    for name in ("params", "train_flops"):
        held = budget(name)
        solved = solve(declared, held, round(share * held.count(declared)), 0.01).spec
        assert configs(solved) == configs(declared)
        width = replace(solved.ffn, width=declared.ffn.width)
        assert replace(solved, ffn=width, layers=declared.layers) == declared
    solved = solve(declared, budget(), round(share * memory(declared, CONTEXT)), 0.01)
    assert with_labels(solved.spec) == with_labels(declared)
    for old, new in zip(configs(declared), configs(solved.spec), strict=True):
        assert same_but_sizes(old, new)
        if isinstance(new, AttentionConfig):
            assert new.n_heads % new.kv_heads == 0


def with_labels(one):
    plain = replace(one, mixers={}, layers=(), ffn=replace(one.ffn, width=None))
    return plain, [[label for label, _ in layer.mixers] for layer in one.layers]


@given(layers=st.sampled_from(LAYERS), share=st.floats(0.2, 4), params=st.sampled_from([None, 20_000]))
@settings(max_examples=12, deadline=None)
def test_solving_again_changes_nothing(layers, share, params):
    declared = spec(layers)
    target = round(share * memory(declared, CONTEXT))
    once = solve(declared, budget(), target, 0.01, params)
    assume(not once.why)
    again = solve(once.spec, budget(), target, 0.01, params)
    assert again.spec == once.spec
    assert again.said.startswith("as declared: ")


@given(layers=st.sampled_from(LAYERS), shares=st.tuples(st.floats(0.1, 4), st.floats(0.1, 4)))
@settings(max_examples=12, deadline=None)
def test_a_larger_budget_never_takes_a_smaller_size_of_it(layers, shares):
    declared = spec(layers)
    for share in shares:
        target = round(share * memory(declared, CONTEXT))
        for old, new in zip(configs(declared), configs(solve(declared, budget(), target, 0.01).spec), strict=True):
            for before, after in zip(sizes(old), sizes(new), strict=True):
                assert after <= before if target <= memory(declared, CONTEXT) else after >= before


@given(targets=st.lists(st.integers(40, 4200), min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_windows_grow_with_the_budget(targets):
    found = [
        solve(spec("a w"), budget(), target, 0.05) for target in sorted(targets) if target < memory(spec("a w"), 64)
    ]
    windows = [[config.window or CONTEXT for config in configs(one.spec)] for one in found if changed_windows_only(one)]
    for smaller, larger in itertools.pairwise(windows):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def changed_windows_only(one):
    return not one.why and [config.kv_heads for config in configs(one.spec)] == [4, 2]


@given(layers=st.sampled_from(["a c", "w c", "a w c*2"]), target=st.integers(600, 20_000))
@settings(max_examples=20, deadline=None)
def test_where_a_window_is_enough_nothing_else_moves(layers, target):
    declared = spec(layers)
    lower = target < memory(declared, CONTEXT)

    def capped(window):
        def change(config):
            if not isinstance(config, AttentionConfig):
                return config
            now = config.window or CONTEXT
            return replace(config, window=min(now, window) if lower else max(now, window))

        return with_mixers(declared, change)

    enough = [w for w in range(2, CONTEXT + 1) if within(memory(capped(w), CONTEXT), target, 0.01)]
    solved = solve(declared, budget(), target, 0.01)
    if enough:
        assert memory(solved.spec, CONTEXT) in {memory(capped(w), CONTEXT) for w in enough}
        assert [sizes(one)[-1] for one in configs(solved.spec)] == [sizes(one)[-1] for one in configs(declared)]
    elif not solved.why:
        assert [sizes(one)[-1] for one in configs(solved.spec)] != [sizes(one)[-1] for one in configs(declared)]


def test_windows_come_first_then_kv_heads_then_value_heads():
    declared = spec("a c")  # full attention: 4 KV heads of 4; a state of 2 heads, 8 by 8
    bare = memory(spec("c"), CONTEXT)

    def moved(target, tolerance=0.01):
        solved = solve(declared, budget(), target, tolerance)
        assert not solved.why
        return [change for change in changes(declared, solved.spec) if not change.startswith("FFN")]

    assert moved(bare + 4 + 2 * 20 * 16 * 2) == ["window full -> 20"]
    # Half a token of four KV heads is a whole one of two.
    assert moved(bare + 4 + 2 * 21 * 8 * 2, 0.004) == ["window full -> 21", "KV heads 4 -> 2"]
    low = moved(memory(spec("c"), CONTEXT) - 80)
    assert [change.split()[0] for change in low] == ["window", "KV", "value"]


def test_a_round_value_size_is_kept_where_one_will_do():
    declared = spec_from({**spec("c").to_dict(), "mixers": {"c": {"type": "gla", "n_heads": 1, "head_dim": 32}}})
    (before,) = configs(declared)
    assert before.V == 32
    half = solve(declared, budget(), round(memory(declared, 64) / 2), 0.05)
    assert [value_size(config) for config in configs(half.spec)] == [16]
    odd = solve(declared, budget(), round(memory(declared, 64) * 27 / 32), 0.01)
    assert [value_size(config) for config in configs(odd.spec)] == [27]


def test_parameters_are_brought_back_to_what_they_were_or_to_what_is_asked():
    declared = spec("c*2")
    target = memory(with_mixers(declared, lambda config: replace(config, head_v_dim=12)), CONTEXT)
    for params in (None, 30_000):
        solved = solve(declared, budget(), target, 0.01, params)
        assert not solved.why
        assert within(parameters(solved.spec), params or parameters(declared), 0.01)
        assert "value head size 8 -> 12" in solved.said
        assert "FFN 64 -> " in solved.said
        assert sum(one.numel() for one in build_model(solved.spec).parameters()) == parameters(solved.spec)


def test_what_cannot_be_reached_is_said_with_how_close_it_came():
    far = solve(spec("c*2"), budget(), 10**7, 0.01)
    assert "the closest, by value head size 8 -> 40" in far.why
    bare = spec("c*2", type="none")
    assert "no FFN" in solve(bare, budget(), round(1.5 * memory(bare, CONTEXT)), 0.01).why
    narrow = solve(spec("c*2", width=2), budget(), round(2 * memory(spec("c*2"), CONTEXT)), 0.01)
    assert narrow.why.startswith("the memory fits by value head size 8 -> ")
    assert "at an FFN width of 1" in narrow.why
    kept = solve(bare, budget(), memory(bare, CONTEXT), 0.01)  # nothing to do, so nothing to miss
    assert not kept.why
    assert kept.spec == bare


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 2), min_size=1), st.randoms())
def test_the_task_that_a_budget_is_met_on_depends_on_no_order(sizes, draw):
    moved = list(sizes.items())
    draw.shuffle(moved)
    for name in ("params", "train_flops", "inference_bytes"):
        assert met_on(name, sizes, sizes) == met_on(name, dict(moved), dict(moved))


def test_training_flops_are_met_where_sequences_are_longest_and_parameters_where_words_are_fewest():
    vocabularies, lengths = {"short": 100, "long": 300}, {"short": 10, "long": 200}
    one = spec("a c")
    flops = budget_of("train_flops", vocabularies, lengths, CONTEXT)
    assert flops.count(one) == account(replace(one, vocab_size=300), context=200).train_flops_per_token
    assert budget_of("params", vocabularies, lengths, CONTEXT).count(one) == parameters(replace(one, vocab_size=100))


@pytest.mark.parametrize("name", ["params", "train_flops", "inference_bytes"])
def test_a_stack_at_the_budget_is_left_as_it_is(name):
    held: Budget = budget(name)
    solved = solve(spec(), held, held.count(spec()), 0.01)
    assert solved.spec == spec()
    assert solved.said.startswith("as declared: ")
    assert "(+0.0 %)" in solved.said
