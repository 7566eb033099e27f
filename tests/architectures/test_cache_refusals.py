"""Files of a cache, and calls that are refused or break: each is told, and the cache is as it was."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import assert_unchanged, copies, exact_model, random_ids
from torch import Tensor

from hybridzoo.architectures import HybridCache, HybridLM
from hybridzoo.architectures.cache import weights_digest
from hybridzoo.architectures.decoding import Decoder
from hybridzoo.architectures.prompts import pack
from hybridzoo.mixers.base import HeldState
from hybridzoo.mixers.caches import FixedCache


@torch.no_grad()
def test_a_saved_cache_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, ids = exact_model(), random_ids(11, 2, 12)
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
    model = exact_model(layers="a")
    made = lambda n, *_: FixedCache(Pair(torch.arange(2.0 * n).view(n, 2), torch.ones(n)))  # noqa: E731
    monkeypatch.setattr(model.blocks[0].mixers[0], "init_cache", made)
    cache = model.init_cache(3)
    cache.tensors()["0.0.k"].mul_(3)
    cache.save(tmp_path / "own", model)
    back = HybridCache.load(tmp_path / "own", model)
    assert_unchanged(back, copies(cache), [0, 0, 0])


def test_a_file_of_another_model_version_dtype_or_kind_is_refused(tmp_path: Path) -> None:
    model, path = exact_model(), tmp_path / "c.safetensors"
    cache = model.init_cache(1)
    model(random_ids(11, 1, 4), state=cache)
    cache.save(path, model)
    cases: list[tuple[HybridLM, type[Exception], str]] = [
        (exact_model(layers="c a"), ValueError, "the cache of another model: of a stack"),
        (exact_model(seed=1), ValueError, "of the same stack with other weights"),
        (exact_model(torch.float32), TypeError, "a cache in float64, but the model is in float32"),
    ]
    for other, error, says in cases:
        with pytest.raises(error, match=f"c.safetensors: .*{says}"):
            HybridCache.load(path, other)
    with safe_open(str(path), "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    first = next(iter(tensors))
    for changed, held, says in (
        ({"version": "1"}, tensors, "a cache of version 1; this is version 2"),
        ({"format": "pt"}, tensors, "not a cache"),
        ({}, {name: x for name, x in tensors.items() if name != first}, f"as '{first}'"),
        ({}, tensors | {first: tensors[first][..., :1].contiguous()}, f"'{first}' must be float64"),
        ({"lengths": json.dumps([4, 4])}, tensors, "must be"),
        ({"lengths": json.dumps([-4])}, tensors, r"lengths must be a list of whole numbers, none below 0, is \[-4\]"),
        ({"lengths": "four"}, tensors, "lengths must be a list of whole numbers, none below 0, is four"),
        ({}, tensors | {"2.0.length": torch.tensor([3], dtype=torch.int32)}, r"lengths are \[4\], a layer's \[3\]"),
        ({}, tensors | {"0.0.length": tensors["0.0.length"] + 1}, r"lengths are \[4\], a layer's \[5\]"),
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
        cache.save(path, exact_model(layers="c a"))


def test_a_bad_call_is_refused_and_leaves_the_cache_as_it_was() -> None:
    model, ids = exact_model(max_context=8), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    model(ids, state=cache)
    before = copies(cache)
    other, many = exact_model(layers="c a").init_cache(2), model.init_cache(3)
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
    with pytest.raises(ValueError, match="rows of a cache must be a whole number, at least 1, got 0"):
        model.init_cache(0)
    for rows, source, error, says in (
        ([0, 0], model.init_cache(2), ValueError, "2 different ones"),
        ([0], model.init_cache(2), ValueError, "2 different ones"),
        ([0], exact_model(layers="c").init_cache(1), ValueError, "the other cache is of a stack"),
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
    model, other, ids = exact_model(), exact_model(seed=1), random_ids(11, 2, 12)
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
    torch.testing.assert_close(deepcopy(model)(ids[:, 6:], state=cache).logits, whole[:, 6:])
    gc.collect()  # of that copy: the model is still known
    for taken in (cache, deepcopy(cache)):
        with pytest.raises(ValueError, match="with other weights"):
            other(ids[:, :1], state=taken)
    del model
    gc.collect()
    assert not cache._owners
    assert pickle.loads(pickle.dumps(cache)).lengths == cache.lengths


def test_weights_are_others_wherever_they_differ() -> None:
    model = exact_model(torch.bfloat16)
    found = {weights_digest(model), weights_digest(deepcopy(model))}
    assert len(found) == 1
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1]
        kept = last.clone()
        last += 1
        found.add(weights_digest(model))
        last.copy_(kept)
    assert len(found) == 1 + len(list(model.parameters()))


def test_files_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model()
    cache = model.init_cache(2)
    with pytest.raises(IsADirectoryError, match="a folder, not a file"):
        cache.save(tmp_path, model)
    with pytest.raises(ValueError, match=r"none: a cache of no rows has nothing to save"):
        cache.select([]).save(tmp_path / "none", model)

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="the disk is full"):
        cache.save(tmp_path / "cache", model)
    assert not list(tmp_path.iterdir())


def test_rows_and_dtypes_of_any_library_are_taken_or_told() -> None:
    cache = exact_model().init_cache(numpy.int64(3))
    assert len(cache.select(numpy.array([2, 0]))) == len(cache.select([numpy.int64(2), 0])) == 2
    for rows, says in ((torch.tensor(1), r"\[1\] is one row"), ([1.0], "got 1.0"), ([True], "got True")):
        with pytest.raises(TypeError, match=says):
            cache.select(rows)
    for n in (2.5, True, "2"):
        with pytest.raises(TypeError, match="rows of a cache must be a whole number, at least 1"):
            exact_model().init_cache(n)
    with pytest.raises(TypeError, match=r"of floating point, got torch\.int64"):
        exact_model().init_cache(1, dtype=torch.int64)


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
    model, ids = exact_model(), random_ids(11, 2, 6)
    cache = model.init_cache(2)
    model(ids, state=cache)
    before = copies(cache)
    with pytest.raises(error, match=says):
        model(ids[:, :2], labels=labels, state=cache)
    assert_unchanged(cache, before, [6, 6])


def test_a_backend_that_is_asked_for_and_cannot_is_refused_for_one_token_too() -> None:
    model = exact_model(mixers={"a": {"type": "attention", "n_heads": 2, "backend": "xformers"}}, layers="a")
    cache = model.init_cache(2)
    before = copies(cache)
    for length in (1, 2):
        with pytest.raises(ValueError, match="backend='xformers' needs"):
            model(random_ids(11, 2, length), state=cache)
        assert_unchanged(cache, before, [0, 0])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["blocks.1.mixers.1.v_proj.weight", "head.weight", "blocks.2.ffn.up_proj.weight"])
def test_weights_that_are_not_finite_are_named_and_leave_the_cache_as_it_was(name: str, size: int) -> None:
    model, ids = exact_model(), random_ids(11, 2, 10)
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
    model, ids = exact_model(), random_ids(11, 2, 10)
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


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("part", range(4))
def test_a_call_that_breaks_while_it_is_written_leaves_rows_that_no_call_takes(
    part: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = exact_model(), random_ids(11, 2, 12)
    cache, spare = model.init_cache(2), model.init_cache(2)
    for each in (cache, spare):
        model(ids[:, :6], state=each)
    _, broken = list(cache._parts())[part]
    with monkeypatch.context() as patch:
        patch.setattr(broken, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 6 : 6 + size], state=cache)
    with pytest.raises(RuntimeError, match=r"rows \[0, 1\] of the cache are lost"):
        model(ids[:, 6:], state=cache)
    with monkeypatch.context() as patch:
        patch.setattr(broken, "put", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            cache.put([1, 0], spare)
    assert cache.lost == {0, 1}
    cache.put([0, 1], spare)
    torch.testing.assert_close(model(ids[:, 6:], state=cache).logits, model(ids).logits[:, 6:])


def test_a_step_in_place_that_breaks_leaves_rows_that_no_call_takes_before_they_are_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = exact_model(), random_ids(11, 2, 10)
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
    model, ids = exact_model(), random_ids(11, 3, 1)
    cache = model.init_cache(2)
    with pytest.raises(ValueError, match="the cache holds 2 rows"):
        model(ids, state=cache)
    assert not cache.lost
