"""The cache of a whole hybrid: one function with the plain pass, exact bytes, rows, files, and clear refusals."""

from __future__ import annotations

import gc
import json
import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridzoo.architectures import HybridCache, HybridLM, Spec, account, build_model
from hybridzoo.architectures.decoding import Decoder
from hybridzoo.architectures.prompts import as_prompts, pack
from hybridzoo.mixers import kv_cache, list_mixers
from hybridzoo.mixers.base import HeldState
from hybridzoo.mixers.caches import FixedCache
from hybridzoo.mixers.kv_cache import PAGE

Shallow = Callable[..., HybridLM]
CPU = torch.device("cpu")


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> HybridLM:
    data = {
        "name": "small",
        "d_model": 16,
        "vocab_size": 11,
        "mixers": {
            "a": {"type": "attention", "n_heads": 2, "n_kv_heads": 1},
            "w": {"type": "attention", "n_heads": 2, "window": 5, "conv_size": 3},
            "c": {"type": "carve", "n_heads": 2, "head_dim": 4, "content_chunk": 4, "content_rank": 2},
        },
        "layers": "c c+w a",
        "init": {"std": 0.5},
        "tie_embeddings": False,
    }
    torch.manual_seed(seed)
    model = build_model(Spec.from_dict(data | changes), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "content_up" in name:
            torch.nn.init.normal_(parameter)
    return model


def random_ids(vocab_size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def copies(cache: HybridCache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.contents().items()}


def assert_unchanged(cache: HybridCache, before: dict[str, Tensor], lengths: list[int]) -> None:
    after = cache.contents()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert cache.lengths == lengths


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
    model = small_model(torch.float32, mixers={"m": mixer}, layers="m m")
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
    model = small_model()
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
    model = small_model(layers="a a")
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
    model, cache = small_model(), small_model().init_cache(2)
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
    model, ids = small_model(), random_ids(11, 3, 12)
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
    model, ids = small_model(layers=layers), random_ids(11, 2, 12)
    cache = model.init_cache(2)
    model(ids[:, :6], state=cache)
    cache.put([1, 0], cache)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[[1, 0], 6:], state=cache).logits, whole[[1, 0], 6:])


@torch.no_grad()
def test_a_saved_cache_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, ids = small_model(), random_ids(11, 2, 12)
    cache = model.init_cache(2)
    model(*pack([ids[0, :7], ids[1, :2]])[:1], state=cache, cu_seqlens=torch.tensor([0, 7, 9]))
    cache.save(tmp_path / "cache.safetensors", model)
    found = HybridCache.load(tmp_path / "cache.safetensors", model)
    assert_unchanged(found, copies(cache), [7, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    torch.testing.assert_close(model(ids, state=found).logits, model(ids, state=cache).logits, rtol=0, atol=0)


class Pair(NamedTuple):
    k: Tensor
    v: Tensor


def test_a_state_of_an_own_mixer_may_name_its_fields_as_attention_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(layers="a")
    made = lambda n, *_: FixedCache(Pair(torch.arange(2.0 * n).view(n, 2), torch.ones(n)))  # noqa: E731
    monkeypatch.setattr(model.blocks[0].mixers[0], "init_cache", made)
    cache = model.init_cache(3)
    cache.tensors()["0.0.k"].mul_(3)
    cache.save(tmp_path / "own", model)
    back = HybridCache.load(tmp_path / "own", model)
    assert_unchanged(back, copies(cache), [0, 0, 0])


def test_a_file_of_another_model_version_dtype_or_kind_is_refused(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "c.safetensors"
    cache = model.init_cache(1)
    model(random_ids(11, 1, 4), state=cache)
    cache.save(path, model)
    cases: list[tuple[HybridLM, type[Exception], str]] = [
        (small_model(layers="c a"), ValueError, "the cache of another model: of a stack"),
        (small_model(seed=1), ValueError, "of the same stack with other weights"),
        (small_model(torch.float32), TypeError, "a cache in float64, but the model is in float32"),
    ]
    for other, error, says in cases:
        with pytest.raises(error, match=f"c.safetensors: .*{says}"):
            HybridCache.load(path, other)
    with safe_open(str(path), "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    first = next(iter(tensors))
    for changed, held, says in (
        ({"version": "2"}, tensors, "a cache of version 2; this is version 1"),
        ({"format": "pt"}, tensors, "not a cache"),
        ({}, {name: x for name, x in tensors.items() if name != first}, f"as '{first}'"),
        ({}, tensors | {first: tensors[first][..., :1].contiguous()}, f"'{first}' must be float64"),
        ({"lengths": json.dumps([4, 4])}, tensors, "must be"),
        ({"lengths": json.dumps([-4])}, tensors, r"lengths must be a list of whole numbers, none below 0, is \[-4\]"),
        ({"lengths": "four"}, tensors, "lengths must be a list of whole numbers, none below 0, is four"),
        ({}, tensors | {"2.0.length": torch.tensor([3], dtype=torch.int32)}, r"lengths are \[4\], a layer's \[3\]"),
        ({}, tensors | {first: torch.full_like(tensors[first], float("nan"))}, f"'{first}' holds values that are no"),
    ):
        save_file(held, str(path), header | changed)
        with pytest.raises(ValueError, match=says):
            HybridCache.load(path, model)
    save_file(tensors, str(path), {name: text for name, text in header.items() if name != "version"})
    with pytest.raises(ValueError, match=r"c.safetensors: a cache whose header has no 'version'"):
        HybridCache.load(path, model)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short, or not safetensors"):
        HybridCache.load(path, model)
    with pytest.raises(FileNotFoundError, match="no such file"):
        HybridCache.load(tmp_path / "none", model)
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        HybridCache.load(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "none" / "c", model)
    with pytest.raises(ValueError, match="the cache is another model's"):
        cache.save(path, small_model(layers="c a"))


def test_a_bad_call_is_refused_and_leaves_the_cache_as_it_was() -> None:
    model, ids = small_model(max_context=8), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    model(ids, state=cache)
    before = copies(cache)
    other, many = small_model(layers="c a").init_cache(2), model.init_cache(3)
    cases: list[tuple[Tensor, Any, type[Exception], str]] = [
        (ids[:, :3], cache, ValueError, "a sequence of 9 tokens is longer than the spec's max_context 8"),
        (ids[:, :0], cache, ValueError, "at least one token"),
        (torch.tensor([[1], [11]]), cache, ValueError, "ids must lie in 0 to 10"),
        (ids[:, :1].double(), cache, TypeError, "ids must be int32 or int64"),
        (ids[:1, :1], cache, ValueError, "the cache holds 2 rows, and the call has 1 sequences"),
        (ids[:, :1], many, ValueError, "the cache holds 3 rows, and the call has 2"),
        (ids[:, :1], other, ValueError, r"the cache is another model's: it was made for a stack \w+, and this one"),
        (
            ids[:, :1],
            model.init_cache(2, dtype=torch.float32),
            TypeError,
            "the cache is in torch.float32, but the model",
        ),
        (ids[:, :1], model.init_cache(2, device="meta"), ValueError, "the cache is on meta, ids on cpu"),
    ]
    for call, state, error, says in cases:
        with pytest.raises(error, match=says):
            model(call, state=state)
        assert_unchanged(cache, before, [6, 6])
    assert many.lengths == [0, 0, 0]
    with pytest.raises(ValueError, match="a cache needs at least one row, got 0"):
        model.init_cache(0)
    for rows, source, error, says in (
        ([0, 0], model.init_cache(2), ValueError, "2 different ones"),
        ([0], model.init_cache(2), ValueError, "2 different ones"),
        ([0], small_model(layers="c").init_cache(1), ValueError, "the other cache is of a stack"),
        ([0], model.init_cache(1, dtype=torch.float32), TypeError, "the other cache is in torch.float32"),
        ([2], model.init_cache(1), IndexError, "row 2 is not one of the cache's 2"),
    ):
        with pytest.raises(error, match=says):
            cache.put(rows, source)
    with pytest.raises(IndexError, match="row 5"):
        cache.select([5])
    with pytest.raises(TypeError, match=r"got 1: \[1\] is one row"):
        cache.select(1)  # type: ignore[arg-type]
    assert_unchanged(cache, before, [6, 6])


@torch.no_grad()
def test_other_weights_of_the_same_stack_are_refused_and_a_copy_s_are_not() -> None:
    model, other, ids = small_model(), small_model(seed=1), random_ids(11, 2, 12)
    cache = model.init_cache(2)
    model(ids[:, :6], state=cache)
    before = copies(cache)
    for taken in (cache, cache.select([0, 1]), cache.clone()):
        with pytest.raises(ValueError, match="of the same stack as small with other weights"):
            other(ids[:, 6:], state=taken)
        with pytest.raises(ValueError, match="the other cache is of the same stack with other weights"):
            taken.put([0, 1], other.init_cache(2))
    assert_unchanged(cache, before, [6, 6])
    whole, twin = model(ids).logits, deepcopy(model)
    torch.testing.assert_close(twin(ids[:, 6:], state=deepcopy(cache)).logits, whole[:, 6:])
    torch.testing.assert_close(twin(ids[:, 6:], state=cache.clone()).logits, whole[:, 6:])
    del model
    gc.collect()
    assert cache.maker is None
    torch.testing.assert_close(twin(ids[:, 6:], state=cache).logits, whole[:, 6:])
    assert pickle.loads(pickle.dumps(cache)).lengths == cache.lengths


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.tensor([[1, 2], [3, 11]]), ValueError, "labels must lie in 0 to 10"),
        (torch.tensor([[1], [2]]), ValueError, r"labels must have the shape of ids \[2, 2\], got \[2, 1\]"),
        (torch.ones(2, 2), TypeError, "labels must be int32 or int64"),
        ([[1, 2], [3, 4]], TypeError, "labels must be a tensor"),
        (torch.ones(2, 2, dtype=torch.int64, device="meta"), ValueError, "labels are on meta, ids on cpu"),
    ],
)
def test_bad_labels_are_refused_before_a_cache_is_written(labels: Any, error: type[Exception], says: str) -> None:
    model, ids = small_model(), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    model(ids, state=cache)
    before = copies(cache)
    with pytest.raises(error, match=says):
        model(ids[:, :2], labels=labels, state=cache)
    assert_unchanged(cache, before, [6, 6])


def test_a_backend_that_is_asked_for_and_cannot_is_refused_for_one_token_too() -> None:
    model = small_model(mixers={"a": {"type": "attention", "n_heads": 2, "backend": "xformers"}}, layers="a")
    cache = model.init_cache(2)
    before = copies(cache)
    for length in (1, 2):
        with pytest.raises(ValueError, match="backend='xformers' needs"):
            model(random_ids(11, 2, length), state=cache)
        assert_unchanged(cache, before, [0, 0])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["blocks.1.mixers.1.v_proj.weight", "head.weight", "blocks.2.ffn.up_proj.weight"])
def test_weights_that_are_not_finite_are_named_and_leave_the_cache_as_it_was(name: str, size: int) -> None:
    model, ids = small_model(), random_ids(11, 2, 10)
    cache = model.init_cache(2)
    model(ids[:, :7], state=cache)
    before, kept = copies(cache), model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"logits are not finite: {name} holds .* the cache is as it was"):
        model(ids[:, 7 : 7 + size], state=cache)
    assert_unchanged(cache, before, [7, 7])
    model.get_parameter(name).data.copy_(kept)
    found = model(ids[:, 7:], state=cache).logits
    torch.testing.assert_close(found, model(ids).logits[:, 7:].detach())


def test_a_call_that_breaks_in_the_middle_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(), random_ids(11, 2, 10)
    cache = model.init_cache(2)
    model(ids[:, :7], state=cache)
    before = copies(cache)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[2].mixers[0], "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 7:8], state=cache)
    assert_unchanged(cache, before, [7, 7])


def test_a_step_in_place_that_breaks_leaves_rows_that_no_call_takes_before_they_are_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = small_model(), random_ids(11, 2, 10)
    cache, fresh = model.init_cache(2), model.init_cache(1)
    model(ids[:, :7], state=cache)
    model(ids[:1, :7], state=fresh)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # As on a GPU, where the first layers have written when the last one fails.
        patch.setattr(HeldState, "written_in_place", lambda self, x, cu_seqlens: x.shape[1] == 1)
        for ids_after in (ids[:, 7:9], ids[:, 7:8]):
            patch.setattr(model.blocks[2].mixers[0], "forward", stop)
            assert not cache.lost
            with pytest.raises(KeyboardInterrupt):
                model(ids_after, state=cache)
    calls: list[Callable[[], object]] = [
        lambda: model(ids[:, 7:], state=cache),
        lambda: Decoder(model, cache)(ids[:, 7]),
        cache.clone,
        lambda: cache.select([1]),
        lambda: cache.save("never written", model),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"rows \[.*1\] of the cache are lost"):
            call()
    cache.put([0], fresh)
    cache.reset([1])
    found = model(ids[:, 7:], state=cache).logits
    torch.testing.assert_close(found[0], model(ids).logits[0, 7:].detach())
    torch.testing.assert_close(found[1], model(ids[:, 7:]).logits[1].detach())


def test_a_refused_call_of_one_token_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldState, "written_in_place", lambda self, x, cu_seqlens: x.shape[1] == 1)
    model, ids = small_model(), random_ids(11, 3, 1)
    cache = model.init_cache(2)
    with pytest.raises(ValueError, match="the cache holds 2 rows"):
        model(ids, state=cache)
    assert not cache.lost


@torch.no_grad()
def test_rows_that_are_not_live_keep_their_length_and_are_lost_until_written_anew() -> None:
    model, ids = small_model(layers="c a"), random_ids(11, 2, 10)
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
    model = small_model(layers="a w", max_context=160)
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
    model, ids = small_model(torch.float32), random_ids(11, 2, 12)
    exact, cache = model(ids).logits, model.init_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([model(piece, state=cache).logits for piece in ids.split([6, 1, 4, 1], 1)], 1)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    assert {x.dtype for x in cache.tensors().values()} == {torch.float32, torch.int32}


def test_no_gradient_is_taken_through_a_cache_and_functional_states_stay_apart() -> None:
    model, ids = small_model(), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    out = model(ids, state=cache, labels=ids)
    assert out.state is cache
    assert not out.logits.requires_grad
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss.detach())
    assert "2 rows" in repr(cache)
    assert len(cache) == 2
    assert cache.to("cpu") is cache
