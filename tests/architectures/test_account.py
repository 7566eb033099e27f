"""What a spec is said to cost: against counts by hand, torch's own counter, and the tensors of built models.

Shapes in the counts by hand: d model width, H key heads, HV value heads, K key dim, V value dim, W taps, C tokens of a
tile, r content rank, L content chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from registry_cases import default_cases, words_for
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.architectures import HybridLM, Spec, account, build_model, load_spec
from hybridzoo.mixers import SpecError, build_mixer

Shallow = Callable[..., HybridLM]
BYTES = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}

# --- Counts by hand: every size differs from every other, so that none can stand in for another. ---
d, H, HV, K, V, W, C = 120, 3, 6, 20, 28, 4, 64
CONTEXT = 1000
SIZES = {"d_model": d, "n_heads": H, "n_v_heads": HV, "head_dim": K, "head_v_dim": V}

Q_K_V_O = [(d, H * K), (d, H * K), (d, HV * V), (HV * V, d)]
LOW_RANK_GATE = [(d, V), (V, HV * V)]
VALUE_HEAD_DECAY = [(d, V), (V, HV * K)]
CONVOLUTIONS = 2 * W * (H * K + H * K + HV * V)
# Token by token: what a key held is read (where it is corrected), the new pair is added, the query reads.
DECODED, DECODED_CORRECTED = 2 * (2 * K * V), 3 * (2 * K * V)
# In tiles: pairs of queries and keys, what they read of the tile, what is read of the state, and the state's update.
TILED = 2 * C * K + 2 * C * V + 2 * K * V + 2 * K * V
# A correction adds: pairs of keys, the triangular inverse (C^3/3 multiply-adds a tile), the inverse times the tile's
# keys and values, and the state read by its keys.
TILED_CORRECTED = TILED + 2 * C * K + 2 * C * C / 3 + 2 * C * K + 2 * C * V + 2 * K * V


class ByHand(NamedTuple):
    """The words of a mixer, its matrices, and what it does to a token besides, in training and in decoding."""

    words: dict[str, Any]
    matrices: list[tuple[int, int]]
    training: float
    decoding: float


def recurrent(extra: list[tuple[int, int]], corrected: bool, besides: float = 0.0) -> ByHand:
    training, decoding = (TILED_CORRECTED, DECODED_CORRECTED) if corrected else (TILED, DECODED)
    return ByHand(SIZES, Q_K_V_O + extra, HV * training + besides, HV * decoding + besides)


# Once a chunk of L tokens, for every head, the content gate maps V to r and r to K.
READOUT = HV * (2 * 16 * V + 2 * K * 16) / 64
BY_HAND = {
    "linear_attention": recurrent([], corrected=False),
    "gla": recurrent([(d, 16), (16, H * K), (d, HV * V)], corrected=False),
    "delta_net": recurrent([(d, HV)], corrected=True, besides=CONVOLUTIONS),
    "gated_delta_net": recurrent([(d, HV), (d, HV), (d, HV * V)], corrected=True, besides=CONVOLUTIONS),
    "kda": recurrent([*VALUE_HEAD_DECAY, (d, HV), *LOW_RANK_GATE], corrected=True, besides=CONVOLUTIONS),
    "gdn2": recurrent(
        [(d, V), (V, H * K), (d, H * K), (d, HV * V), *LOW_RANK_GATE], corrected=True, besides=CONVOLUTIONS
    ),
    "carve": recurrent(
        [*VALUE_HEAD_DECAY, (d, HV), (d, HV * K), *LOW_RANK_GATE], corrected=True, besides=CONVOLUTIONS + READOUT
    ),
    "carve-paper": recurrent([*VALUE_HEAD_DECAY, (d, HV), (d, HV * K)], corrected=True, besides=READOUT),
    # Width 240 in 6 heads of 40, state 24, two groups of B and C; the convolution runs over x, B and C; D x at the end.
    "mamba2": ByHand(
        {"d_model": d, "expand": 2, "n_heads": 6, "state_dim": 24, "n_groups": 2},
        [(d, 240 + 240 + 2 * 48 + 6), (240, d)],
        6 * (2 * 64 * 24 + 2 * 64 * 40 + 4 * 24 * 40) + 2 * 4 * (240 + 2 * 48) + 2 * 240,
        6 * (4 * 24 * 40) + 2 * 4 * (240 + 2 * 48) + 2 * 240,
    ),
    # Token t of 1,000 sees itself and all before it: 500.5 keys on average; the one after them sees 1,001.
    "attention": ByHand(
        {"d_model": d, "n_heads": 6, "n_kv_heads": 3, "head_dim": 22},
        [(d, 132), (d, 66), (d, 66), (132, d)],
        6 * (2 * 22 + 2 * 22) * 500.5,
        6 * (2 * 22 + 2 * 22) * 1001,
    ),
    # The first 100 tokens see 50.5 keys on average, the other 900 see 100.
    "attention[window=100,conv_size=4,output_gate=true]": ByHand(
        {"d_model": d, "n_heads": 6, "n_kv_heads": 3, "head_dim": 22},
        [(d, 132), (d, 66), (d, 66), (132, d), (d, 132)],
        6 * (2 * 22 + 2 * 22) * (0.1 * 50.5 + 0.9 * 100) + 2 * 4 * (132 + 66 + 66),
        6 * (2 * 22 + 2 * 22) * 100 + 2 * 4 * (132 + 66 + 66),
    ),
}


@pytest.mark.parametrize("text", BY_HAND)
def test_a_mixer_s_flops_are_those_counted_by_hand(text: str) -> None:
    words, matrices, training, decoding = BY_HAND[text]
    mixer = build_mixer(text, **words)
    projections = sum(2 * rows * columns for rows, columns in matrices)
    assert mixer.flops_per_token(CONTEXT) == pytest.approx(projections + training, rel=1e-4)
    assert mixer.flops_per_token(CONTEXT, decode=True) == pytest.approx(projections + decoding, rel=1e-4)


@pytest.mark.parametrize(("max_context", "context"), [(None, 4096), (100, 100), (4096, 4096), (9999, 4096)])
def test_an_account_is_at_4096_tokens_unless_the_spec_takes_fewer(max_context: int | None, context: int) -> None:
    spec = load_spec("carve-hybrid-tiny", [f"max_context={'null' if max_context is None else max_context}"])
    assert account(spec) == account(spec, context)
    assert account(spec).context == context


def test_a_spec_s_flops_are_those_of_its_mixers_its_ffns_and_its_head() -> None:
    mixers = {"k": {"type": "kda", **SIZES}, "g": {"type": "gdn2", **SIZES}}
    for words in mixers.values():
        del words["d_model"]
    data = {"name": "s", "d_model": d, "vocab_size": 77, "mixers": mixers, "layers": "(k g+k)*2"}
    cost = account(Spec.from_dict({**data, "ffn": {"type": "swiglu", "width": 50}}), CONTEXT)
    layers = 0.0
    for name, times in {"kda": 4, "gdn2": 2}.items():
        by_hand = BY_HAND[name]
        layers += times * (sum(2 * rows * columns for rows, columns in by_hand.matrices) + by_hand.training)
    forward = layers + 4 * 3 * 2 * d * 50 + 2 * d * 77  # four FFNs of three matrices; the head
    assert cost.train_flops_per_token == pytest.approx(3 * forward, rel=1e-4)  # backward is twice forward


# --- Torch's counter: matrices, the recurrence and the attention's products; it is blind to element-wise work. ---


def counted(model: HybridLM, T: int) -> tuple[Counter[str], Counter[str], Any]:
    """FLOPs by operation of a forward pass, of forward and backward, and the state; on the meta device, at once."""
    ids = torch.zeros(1, T, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = model(ids, labels=ids)
        forward = named(counter)
        out.loss.backward()
    return forward, named(counter), out.state


def named(counter: FlopCounterMode) -> Counter[str]:
    return Counter({str(operation): n for operation, n in counter.get_flop_counts().get("Global", {}).items()})


def unseen(config: Any) -> float:
    """What a mixer does to a token that torch does not count: the convolution's taps, D x, and CARVE's readout."""
    if hasattr(config, "state_dim"):
        return 2 * config.conv_size * (config.inner + 2 * config.n_groups * config.state_dim) + 2 * config.inner
    if hasattr(config, "window"):
        return 2 * config.conv_size * config.dim * (config.n_heads + 2 * config.kv_heads)
    taps = 2 * config.conv_size * (2 * config.n_heads * config.K + config.HV * config.V)
    readout = 2 * config.HV * config.content_rank * (config.K + config.V) / config.content_chunk
    return taps + (readout if config.erase == "content" else 0)


def shallow_on_meta(name: str) -> HybridLM:
    spec = load_spec(name)
    return build_model(dataclasses.replace(spec, layers=spec.layers[-2:]), device="meta")


@functools.cache
def counted_over(name: str, T: int) -> tuple[HybridLM, Counter[str], Counter[str]]:
    model = shallow_on_meta(name)
    forward, both, _ = counted(model, T)
    return model, forward, both


def configs_of(model: HybridLM) -> list[Any]:
    return [config for layer in model.spec.layers for _, config in layer.mixers]


def test_training_flops_are_what_torch_counts_and_what_it_does_not_see(any_spec: str) -> None:
    T = 640
    model, forward, _ = counted_over(any_spec, T)
    square = visible = 0
    for config in configs_of(model):
        if hasattr(config, "window"):
            square += 4 * config.n_heads * config.dim * T * T
            visible += 4 * config.n_heads * config.dim * sum(min(t, config.window or T) for t in range(1, T + 1))
    # Torch counts the whole square of queries and keys, a mask or not; the account counts the keys that are seen.
    assert forward["aten.bmm"] == square
    expected = forward.total() - square + visible + T * sum(map(unseen, configs_of(model)))
    assert T * account(model.spec, T).train_flops_per_token == pytest.approx(3 * expected, rel=1e-4)


def test_training_is_three_times_forward_for_all_that_torch_counts(any_spec: str) -> None:
    _, forward, both = counted_over(any_spec, 640)
    assert forward.total() > 0
    assert both.total() == 3 * forward.total()


def test_decoding_flops_are_what_torch_counts_and_what_it_does_not_see(any_spec: str) -> None:
    model, T = shallow_on_meta(any_spec), 200
    cost = account(model.spec, T)
    _, _, state = counted(model, T)
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(ids, state=state)
    step = named(counter)
    step.pop("hybridzoo.chunkwise_delta_rule", None)  # a tile for one token: decoding itself needs no pairs
    recurrence = 0
    for config in configs_of(model):
        if hasattr(config, "state_dim"):
            recurrence += 4 * config.state_dim * config.inner
        elif not hasattr(config, "window"):
            recurrence += (4 if config.correct == "none" else 6) * config.HV * config.K * config.V
    seen = step.total() + recurrence + sum(map(unseen, configs_of(model)))
    assert cost.decode_flops_per_token == pytest.approx(seen, rel=1e-4)


@pytest.mark.parametrize("name", default_cases())
def test_every_registered_mixer_has_its_parameters_counted_and_at_least_the_flops_torch_sees(name: str) -> None:
    words = words_for(name)
    data = {"name": "s", "d_model": words.pop("d_model"), "vocab_size": 5, "mixers": {"m": {"type": name, **words}}}
    model = build_model(Spec.from_dict({**data, "layers": "m*2"}), device="meta")
    seen, _, _ = counted(model, 64)
    cost = account(model.spec, 64)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    said = 64 * cost.train_flops_per_token / 3
    assert seen.total() - seen["aten.bmm"] <= said < 2 * seen.total()


# --- Built models: parameters and the bytes of states. ---


def test_parameters_are_those_of_the_built_model(any_spec: str) -> None:
    spec = load_spec(any_spec)
    model = build_model(spec, device="meta")
    cost = account(spec)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    for row, block in zip(cost.layers, model.blocks, strict=True):
        assert row.parameters == sum(parameter.numel() for parameter in block.parameters())


@pytest.mark.parametrize("changes", [["tie_embeddings=false"], ["ffn=none"], ["layers=(c a+c)*2"], ["ffn.type=gelu"]])
def test_parameters_follow_a_change_of_the_spec(changes: list[str]) -> None:
    spec = load_spec("carve-hybrid-tiny", changes)
    assert account(spec).parameters == sum(p.numel() for p in build_model(spec, device="meta").parameters())


def held(state: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in pytree.tree_leaves(state))


@pytest.mark.parametrize("dtype", BYTES)
@torch.no_grad()
def test_state_bytes_are_those_of_the_tensors_after_that_many_tokens(
    tiny_spec: str, dtype: torch.dtype, shallow: Shallow
) -> None:
    model = shallow(tiny_spec, dtype=dtype)
    state = None
    for context, new in ((1, 1), (2, 1), (70, 68), (300, 230), (301, 1)):  # the hybrids' windows hold 256
        state = model(torch.zeros(1, new, dtype=torch.int64), state=state).state
        cost = account(model.spec, context, dtype)
        assert held(state) == cost.state_bytes
        caches = [mixer for block in state for mixer in block if hasattr(mixer, "k")]
        assert sum(held((cache.k, cache.v)) for cache in caches) == cost.kv_bytes


def test_keys_and_values_grow_with_the_context_up_to_the_window_and_recurrent_states_do_not() -> None:
    sizes = [account(load_spec("carve-hybrid-tiny"), context) for context in (64, 128, 256, 10**6)]
    # Two attention layers keep a key and a value of four heads of 64 in two bytes each.
    assert [size.kv_bytes for size in sizes] == [2 * 2 * 4 * 64 * 2 * kept for kept in (64, 128, 256, 256)]
    assert len({size.state_bytes - size.kv_bytes for size in sizes}) == 1


def test_rows_and_ends_sum_to_the_whole_and_rows_say_what_they_are() -> None:
    cost = account(load_spec("carve-hybrid-tiny", ["layers=c c[erase=token] a+c a"]))
    for name in ("parameters", "train_flops_per_token", "decode_flops_per_token", "state_bytes", "kv_bytes"):
        parts = (*cost.layers, cost.ends)
        assert getattr(cost, name) == sum(getattr(part, name) for part in parts), name
    assert [(row.index, row.label, row.mixers) for row in cost.layers] == [
        (0, "c", ("carve",)),
        (1, "c[erase=token]", ("carve",)),
        (2, "a+c", ("attention", "carve")),
        (3, "a", ("attention",)),
    ]
    assert cost.layers[1].flags["c[erase=token]"] == {
        "decay": "channel",
        "erase": "token",
        "correct": "tied",
        "write": "scalar",
        "predict": "stored",
    }
    assert cost.layers[3].flags == {"a": {}}
    assert (cost.context, cost.ends.parameters) == (4096, 256 * 256 + 256)


def test_a_context_of_nothing_or_over_the_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="context must be at least 1, got 0"):
        account(load_spec("carve-tiny"), 0)
    with pytest.raises(SpecError, match="context 65 is over the spec's max_context 64"):
        account(load_spec("carve-tiny", ["max_context=64"]), 65)
