"""Every mixer's cache: written in place over any split, packing and order of rows, it is the functional state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_cases import build, default_cases
from torch import Tensor

from hybridzoo.mixers import TokenMixer
from hybridzoo.mixers.attention import Attention
from hybridzoo.mixers.caches import Copies, FixedCache, StateCache, copy_all, rows_of
from hybridzoo.mixers.kv_cache import PAGE, KVCache, attend_slots
from hybridzoo.mixers.softmax import SoftmaxRule

CASES = [*default_cases(), "attention[window=3]"]
every_mixer = pytest.mark.parametrize("text", CASES)


def make(text: str) -> TokenMixer:
    torch.manual_seed(0)
    words = {"window": 3} if "window" in text else {}
    mixer = build(text.partition("[")[0], **words).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "content_up" in name:
                parameter.normal_()
    return mixer


def tokens(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randn(B, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def call(mixer: TokenMixer, cache: StateCache, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    y, state = mixer(x, cache.state, cu_seqlens)
    cache.stage(state)
    copies: Copies = []
    cache.commit(copies)
    copy_all(copies)
    n = len(next(iter(cache.tensors().values())))
    cache.advance([x.shape[1]] * n if cu_seqlens is None else cu_seqlens.diff().tolist())
    return y


@every_mixer
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_calls_of_any_sizes_over_a_cache_equal_one_call(text: str, sizes: list[int]) -> None:
    mixer, x = make(text), tokens(2, sum(sizes))
    cache = mixer.init_cache(2)
    pieces = [call(mixer, cache, piece) for piece in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x)[0])


@every_mixer
@settings(max_examples=8)
@given(
    first=st.lists(st.integers(0, 9), min_size=3, max_size=3), then=st.lists(st.integers(0, 9), min_size=3, max_size=3)
)
def test_rows_of_any_lengths_packed_and_as_a_batch_equal_each_alone(
    text: str, first: list[int], then: list[int]
) -> None:
    mixer, cache = make(text), make(text).init_cache(3)
    outputs: list[list[Tensor]] = [[], [], []]
    inputs: list[list[Tensor]] = [[], [], []]
    for seed, lengths in enumerate((first, None, then, None)):
        if lengths is None:
            x = tokens(3, 1, seed)
            ys, xs = call(mixer, cache, x), x
        else:
            bounds = torch.tensor([0, *lengths]).cumsum(0)
            packed = tokens(1, sum(lengths), seed)
            y = call(mixer, cache, packed, bounds)
            ys, xs = y[0].split(lengths), packed[0].split(lengths)
        for n in range(3):
            outputs[n].append(ys[n])
            inputs[n].append(xs[n])
    for n in range(3):
        torch.testing.assert_close(torch.cat(outputs[n]), mixer(torch.cat(inputs[n])[None])[0][0])


@every_mixer
def test_rows_are_reordered_copied_replaced_and_freed(text: str) -> None:
    mixer, x = make(text), tokens(3, 9)
    cache = mixer.init_cache(3)
    call(mixer, cache, x[:, :5])
    index = torch.tensor([2, 0, 2])
    chosen = cache.map(lambda t: t.index_select(0, index), [5, 5, 5])
    torch.testing.assert_close(call(mixer, chosen, x[index, 5:]), mixer(x)[0][index, 5:])
    torch.testing.assert_close(call(mixer, cache, x[:, 5:7]), mixer(x)[0][:, 5:7])  # the copies share nothing
    fresh = mixer.init_cache(1)
    call(mixer, fresh, x[:1, :2])
    cache.put(rows_of([1], len(x), x.device), fresh)
    more = torch.cat([x[:1, 7:], x[:1, 2:4], x[2:, 7:]])
    y = call(mixer, cache, more)
    torch.testing.assert_close(y[[0, 2]], mixer(x)[0][[0, 2], 7:])
    torch.testing.assert_close(y[1], mixer(x[:1])[0][0, 2:4])
    cache.reset(rows_of([0], len(x), x.device))
    torch.testing.assert_close(call(mixer, cache, x)[0], mixer(x)[0][0])


@every_mixer
@torch.no_grad()
def test_a_call_that_is_given_up_changes_nothing(text: str) -> None:
    mixer, x = make(text), tokens(2, 12)
    cache = mixer.init_cache(2)
    call(mixer, cache, x[:, :7])
    before = {name: tensor.clone() for name, tensor in cache.contents().items()}
    for size in (1, 4):
        cache.stage(mixer(torch.full_like(x[:, :size], torch.nan), cache.state)[1])
        cache.discard()
        after = cache.contents()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(call(mixer, cache, x[:, 7:]), mixer(x)[0][:, 7:])


@every_mixer
@pytest.mark.parametrize("size", [1, 4])
def test_a_row_that_is_written_anew_keeps_nothing_that_is_not_finite(text: str, size: int) -> None:
    mixer, x = make(text), tokens(2, 9)
    cache, fresh = mixer.init_cache(2), mixer.init_cache(1)
    call(mixer, cache, x)
    call(mixer, fresh, x[1:, :2])
    for tensor in cache.tensors().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    cache.reset(rows_of([0], len(x), x.device))
    cache.put(rows_of([1], len(x), x.device), fresh)
    found = call(mixer, cache, torch.stack([x[0, :size], x[1, 2 : 2 + size]]))
    torch.testing.assert_close(found[0], mixer(x[:1])[0][0, :size])
    torch.testing.assert_close(found[1], mixer(x[1:])[0][0, 2 : 2 + size])


@pytest.mark.parametrize("window", [None, 5, PAGE + 3])
def test_room_for_keys_and_values_grows_by_pages_and_no_further_than_the_window(window: int | None) -> None:
    mixer = Attention(d_model=8, n_heads=1, window=window).double()
    cache, moves = mixer.init_cache(2), 0
    for size in (1, 1, 30, PAGE - 32, 1, 2 * PAGE):
        before = cache.k.data_ptr()
        call(mixer, cache, torch.randn(2, size, 8, dtype=torch.float64))
        moves += cache.k.data_ptr() != before
        paged = -(-cache.longest // PAGE) * PAGE
        assert cache.k.shape == (2, 1, paged if window is None else min(paged, window), 8)
        held = sum(tensor.nbytes for tensor in cache.tensors().values())
        assert held == 2 * mixer.state_bytes(paged, torch.float64)
        assert all(t.nbytes == t.untyped_storage().nbytes() for t in (cache.k, cache.v))
    assert moves == {None: 3, 5: 1, PAGE + 3: 2}[window]


def test_keys_and_values_grow_together_also_where_memory_ends_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = make("attention"), tokens(2, PAGE + 4)
    cache = mixer.init_cache(2)
    call(mixer, cache, x[:, :3])
    assert isinstance(cache, KVCache)
    allocate, made = Tensor.new_zeros, 0

    def scarce(self: Tensor, *size: int) -> Tensor:
        nonlocal made
        made += 1
        if made == 2:
            raise torch.OutOfMemoryError("no memory left")
        return allocate(self, *size)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(PAGE + 1)
    assert cache.k.shape[2] == cache.v.shape[2] == PAGE
    torch.testing.assert_close(call(mixer, cache, x[:, 3:]), mixer(x)[0][:, 3:])
    assert cache.k.shape[2] == cache.v.shape[2] == 2 * PAGE


@settings(max_examples=20)
@given(
    H_kv=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    C=st.sampled_from([1, 7, PAGE, 2 * PAGE]),
    seed=st.integers(0, 9),
)
def test_one_query_attends_to_the_slots_it_may_see(H_kv: int, groups: int, C: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(3, 1, H_kv * groups, 4, dtype=torch.float64)
    k, v = (torch.randn(3, H_kv, C, 4, dtype=torch.float64) for _ in "kv")
    visible = torch.rand(3, C) < 0.5
    visible[:, 0] = True
    found = attend_slots(q, k, v, ~visible, SoftmaxRule(0.7, softcap=2.0))
    for n in range(3):
        for h in range(H_kv * groups):
            keys, values = (x[n, h // groups, visible[n]] for x in (k, v))
            scores = 2 * torch.tanh(0.7 * keys @ q[n, 0, h] / 2)
            torch.testing.assert_close(found[n, 0, h], scores.softmax(0) @ values)
    sixteen = attend_slots(q.bfloat16(), k.bfloat16(), v.bfloat16(), ~visible, SoftmaxRule(0.7, softcap=2.0))
    torch.testing.assert_close(sixteen.double(), found, rtol=0, atol=0.05)


def test_a_query_meets_a_float32_cache_in_float32_also_under_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    hidden, rule = torch.zeros(2, 5, dtype=torch.bool), SoftmaxRule(0.3)
    expected = attend_slots(q, k, v, hidden, rule)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend_slots(q, k, v, hidden, rule), expected)


def test_a_state_that_grows_is_refused_inside_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FixedCache((torch.zeros(2, 3),))
    cache.stage((torch.ones(2, 4),))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"a state that grows .* graph=False"):
            cache.commit([])
    assert cache.state[0].shape == (2, 3)
    assert cache.commit([])
    assert cache.state[0].shape == (2, 4)


def test_what_cannot_be_cached_or_is_not_there_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.1 must be a tensor with a row a sequence, got list"):
        FixedCache((torch.zeros(2), [3]))
    mixer, other = Attention(d_model=8, n_heads=2), Attention(d_model=8, n_heads=2, window=4)
    with pytest.raises(ValueError, match="the cache was made for a window of 4, not None"):
        mixer(torch.zeros(1, 3, 8), other.init_cache(1))
    with pytest.raises(ValueError, match=r"state\.k must be \[N, H_kv, C, D\] = \[3, 2, 0, 4\], got \[1, 2, 0, 4\]"):
        mixer(torch.zeros(3, 3, 8), mixer.init_cache(1))
    cases: list[tuple[Any, type[Exception], str]] = [
        ([3], IndexError, r"row 3 is not one of the cache's 3 \(0 to 2\)"),
        ([-1], IndexError, "row -1"),
        ([True], TypeError, "whole numbers, got True"),
        ([0.5], TypeError, "whole numbers, got 0.5"),
    ]
    for rows, error, says in cases:
        with pytest.raises(error, match=says):
            rows_of(rows, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="takes what the call that it was given to has staged"):
        mixer.init_cache(1).stage(mixer.init_state(1))
    assert isinstance(mixer.init_cache(1), KVCache)
