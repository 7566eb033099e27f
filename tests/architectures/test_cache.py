"""The cache of a whole hybrid: one function with the plain pass, exact bytes, rows and room."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_models import exact_model, random_ids
from torch import Tensor

from hybridzoo.architectures import HybridLM, account
from hybridzoo.architectures.decoding import Decoder
from hybridzoo.architectures.prompts import as_prompts, pack
from hybridzoo.mixers import kv_cache, list_mixers
from hybridzoo.mixers.kv_cache import PAGE

Shallow = Callable[..., HybridLM]
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[60], [20, 1, 2, 30, 1, 1, 1, 1, 1, 1, 1], [1] * 20])
@torch.no_grad()
def test_prefill_in_chunks_and_decoding_give_the_logits_and_greedy_tokens_of_one_pass(
    tiny_spec: str, sizes: list[int], shallow: Shallow
) -> None:
    changes = ["mixers.a.window=16"] if "hybrid" in tiny_spec else []
    model = shallow(tiny_spec, changes, dtype=torch.float32)
    ids = random_ids(256, 2, sum(sizes))
    whole, cache = model(ids).logits, model.init_cache(2)
    found = torch.cat([model(piece, state=cache).logits for piece in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(-1), whole.argmax(-1))
    assert cache.lengths == [sum(sizes)] * 2


@pytest.mark.parametrize("name", [entry.name for entry in list_mixers() if entry.stable])
@torch.no_grad()
def test_every_registered_mixer_decodes_prompts_of_different_lengths_as_each_alone(name: str) -> None:
    entry = next(e for e in list_mixers() if e.name == name)
    words = {"n_heads": 2, "head_dim": 8, "state_dim": 8, "content_chunk": 16}
    mixer = {"type": name} | {word: value for word, value in words.items() if word in entry.words}
    model = exact_model(torch.float32, mixers={"m": mixer}, layers="m m")
    lengths = [3, 40, 1, 17]
    longest = max(lengths)
    prompts = [random_ids(11, n, seed=n) for n in lengths]
    right, left = (torch.zeros(4, longest, dtype=torch.int64) for _ in range(2))
    for n, prompt in enumerate(prompts):
        right[n, : len(prompt)] = left[n, longest - len(prompt) :] = prompt
    more = random_ids(11, 4, 5)
    alone = [model(torch.cat([prompt, more[n]])[None]).logits[0, -6:] for n, prompt in enumerate(prompts)]
    for given, words in (
        (prompts, {"lengths": None, "padding": "right"}),
        (right, {"lengths": lengths, "padding": "right"}),
        (left, {"lengths": lengths, "padding": "left"}),
    ):
        packed, bounds = pack(as_prompts(given, vocab_size=11, device=CPU, **words))
        cache = model.init_cache(4)
        steps = [model(packed, state=cache, cu_seqlens=bounds).logits[0, bounds[1:] - 1]]
        steps += [model(more[:, t : t + 1], state=cache).logits[:, 0] for t in range(5)]
        found = torch.stack(steps, 1)
        torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), torch.stack(alone).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_state_bytes_are_the_bytes_held_and_those_that_the_account_counts(
    tiny_spec: str, dtype: torch.dtype, shallow: Shallow
) -> None:
    model = shallow(tiny_spec, dtype=dtype)
    cache, context = model.init_cache(2), 0
    for new in (1, PAGE - 1, 1):
        context += new
        model(random_ids(256, 2, new), state=cache)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors().values()}
        assert cache.state_bytes == sum(storages.values())
        room = -(-context // PAGE) * PAGE
        assert cache.state_bytes == 2 * account(model.spec, room, dtype).state_bytes


def test_moves_are_counted_whenever_a_tensor_lies_elsewhere() -> None:
    model = exact_model()
    cache = model.init_cache(1)
    other = model.init_cache(1)
    model(random_ids(11, 1, 3 * PAGE), state=other)

    def places() -> dict[str, int]:
        return {name: x.data_ptr() for name, x in cache.tensors().items() if x.numel()}

    steps: list[Callable[[], Any]] = [partial(model, random_ids(11, 1, n), state=cache) for n in (1, PAGE - 1, 1, 2)]
    steps += [lambda: cache.put([0], other), lambda: cache.reset([0]), lambda: cache.reserve(4 * PAGE)]
    moved = []
    for step in steps:
        before, moves = places(), cache.moves
        step()
        moved.append(cache.moves > moves)
        assert moved[-1] == (places() != before)
    assert moved == [True, False, True, False, True, False, True]


def test_moves_are_counted_though_a_later_layer_finds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model(layers="a a")
    cache = model.init_cache(1)
    last = cache.layers[1][0]

    def scarce(longest: int, spare: int) -> bool:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(last, "reserve", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(3)
    assert cache.moves == 1
    cache.reserve(3)
    assert cache.moves == 2


def test_a_cache_holds_every_tensor_that_it_keeps_alive() -> None:
    model, cache = exact_model(), exact_model().init_cache(2)
    model(random_ids(11, 2, 9), state=cache)
    gc.collect()
    reachable = [x for part in gc.get_referents(cache) for x in _tensors_below(part)]
    assert {x.data_ptr() for x in reachable} == {x.data_ptr() for x in cache.tensors().values()}


def _tensors_below(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        return [x for part in thing.values() for x in _tensors_below(part)]
    if isinstance(thing, tuple | list):
        return [x for part in thing for x in _tensors_below(part)]
    return _tensors_below(vars(thing)) if hasattr(thing, "__dict__") and not isinstance(thing, type) else []


@torch.no_grad()
def test_rows_are_cloned_selected_put_and_reset() -> None:
    model, ids = exact_model(), random_ids(11, 3, 12)
    whole, cache = model(ids).logits, model.init_cache(3)
    model(ids[:, :6], state=cache)
    clone = cache.clone()
    swapped = cache.select([2, 0, 2])
    torch.testing.assert_close(model(ids[[2, 0, 2], 6:], state=swapped).logits, whole[[2, 0, 2], 6:])
    torch.testing.assert_close(model(ids[:, 6:], state=cache).logits, whole[:, 6:])
    other = model.init_cache(1)
    model(ids[2:, :3], state=other)
    clone.put([0], other)
    clone.reset(torch.tensor([1]))
    assert clone.lengths == [3, 0, 6]
    packed, bounds = pack([ids[2, 3:], ids[1], ids[2, 6:]])
    found = model(packed, state=clone, cu_seqlens=bounds).logits[0].split([9, 12, 6])
    for part, row, start in zip(found, (2, 1, 2), (3, 0, 6), strict=True):
        torch.testing.assert_close(part, whole[row, start:])


@torch.no_grad()
@pytest.mark.parametrize("layers", ["a", "c c+w a"])  # a cache whose first part is copied as it is written, and not
def test_a_cache_is_put_into_itself(layers: str) -> None:
    model, ids = exact_model(layers=layers), random_ids(11, 2, 12)
    cache = model.init_cache(2)
    model(ids[:, :6], state=cache)
    cache.put([1, 0], cache)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[[1, 0], 6:], state=cache).logits, whole[[1, 0], 6:])


@torch.no_grad()
def test_rows_that_are_not_live_keep_their_length_and_are_lost_until_written_anew() -> None:
    model, ids = exact_model(layers="c a"), random_ids(11, 2, 10)
    cache = model.init_cache(2)
    model(ids[:, :6], state=cache)
    decoder = Decoder(model, cache)
    for t in (6, 7):
        decoder(ids[:, t], [True, False])
    lengths = {name: x.tolist() for name, x in cache.tensors().items() if name.endswith(".length")}
    assert lengths == {"0.0.length": [8, 6], "1.0.length": [8, 6]}
    assert cache.lengths == [8, 6]
    with pytest.raises(RuntimeError, match=r"rows \[1\] of the cache are lost"):
        decoder(ids[:, 8])
    cache.put([1], cache.select([0]))
    whole = model(ids[:1, :9]).logits[:, -1]
    torch.testing.assert_close(decoder(ids[[0, 0], 8]), whole.expand(2, -1))


@torch.no_grad()
def test_under_a_graph_room_grows_a_logarithmic_number_of_times_and_every_byte_of_it_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = 4
    monkeypatch.setattr(kv_cache, "PAGE", page)
    model = exact_model(layers="a w", max_context=160)
    moves, steps = {}, 160
    for graphed in (False, True):
        cache = model.init_cache(2)
        decoder = Decoder(model, cache)
        decoder._graphed = graphed
        decoder._replayed = decoder._eager  # a graph needs a GPU
        for taken in range(1, steps + 1):
            decoder(torch.tensor([1, 2]))
            room = cache.layers[0][0].k.shape[2]
            assert taken <= room < taken * (1.25 if graphed else 1) + page
            assert cache.state_bytes == 2 * account(model.spec, room, torch.float64).state_bytes
            assert cache.state_bytes == sum(x.untyped_storage().nbytes() for x in cache.tensors().values())
        moves[graphed] = cache.moves
        assert room == steps
    ring = 2  # its five slots are two pages
    assert moves[False] == steps / page + ring
    assert moves[True] <= math.log(steps, 1.25) + ring


@torch.no_grad()
def test_autocast_goes_on_from_a_cache_in_the_weights_dtype() -> None:
    model, ids = exact_model(torch.float32), random_ids(11, 2, 12)
    exact, cache = model(ids).logits, model.init_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([model(piece, state=cache).logits for piece in ids.split([6, 1, 4, 1], 1)], 1)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    assert {x.dtype for x in cache.tensors().values()} == {torch.float32, torch.int32}


def test_no_gradient_is_taken_through_a_cache_and_functional_states_stay_apart() -> None:
    model, ids = exact_model(), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    out = model(ids, state=cache, labels=ids)
    assert out.state is cache
    assert not out.logits.requires_grad
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss.detach())
    assert "2 rows" in repr(cache)
    assert len(cache) == 2
    assert cache.to("cpu") is cache
