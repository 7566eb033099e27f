"""Softmax attention: what it computes, what its cache keeps, what it costs and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridzoo.kernels.rotary import rotary
from hybridzoo.mixers import SpecError
from hybridzoo.mixers.attention import Attention, AttentionState
from hybridzoo.mixers.softmax import SoftmaxRule, append_packed, attend, attend_packed

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no positions": {"rope": False},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "grouped": {"n_kv_heads": 2},
    "one key head, windowed": {"n_kv_heads": 1, "window": 4},
    "all words": {
        "n_kv_heads": 2,
        "window": 5,
        "qk_norm": "rmsnorm",
        "output_gate": True,
        "softcap": 2.0,
        "conv_size": 3,
        "qkv_bias": True,
    },
    "l2": {"qk_norm": "l2", "conv_size": 2},
}


def make(seed: int = 0, **words: Any) -> Attention:
    torch.manual_seed(seed)
    return Attention(d_model=16, **{"n_heads": 4, **words}).double()


def inputs(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randn(B, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def by_definition(m: Attention, x: Tensor) -> Tensor:
    """One query at a time over the keys it may see: the definition, with nothing shared with the fast paths."""
    c = m.config
    q, k, v = (p(x).unflatten(-1, (-1, c.dim)) for p in (m.q_proj, m.k_proj, m.v_proj))
    if c.rope:
        q, k = rotary(q, k, torch.arange(x.shape[1])[None], c.rope_base)
    k, v = (p.repeat_interleave(c.n_heads // c.kv_heads, 2) for p in (k, v))
    rows = []
    for t in range(x.shape[1]):
        seen = slice(0 if c.window is None else max(0, t + 1 - c.window), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / c.dim**0.5
        if c.softcap is not None:
            scores = c.softcap * torch.tanh(scores / c.softcap)
        rows.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]).flatten(1))
    return m.o_proj(torch.stack(rows, 1))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("variant", ["plain", "no positions", "window", "window of one", "one key head, windowed"])
@pytest.mark.parametrize("T", [1, 7, 13])
def test_each_token_attends_to_the_keys_it_may_see(variant: str, backend: str, T: int) -> None:
    m = make(**VARIANTS[variant], backend=backend)
    x = inputs(2, T)
    torch.testing.assert_close(m(x)[0], by_definition(m, x))


def test_softcap_bounds_the_scores() -> None:
    m = make(softcap=0.5, window=4)
    with torch.no_grad():
        m.q_proj.weight.mul_(30)
    x = inputs(2, 9)
    torch.testing.assert_close(m(x)[0], by_definition(m, x))


@settings(max_examples=25, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_calls_that_pass_the_state_equal_one_call(variant: str, lengths: list[int], seed: int) -> None:
    m = make(seed, **VARIANTS[variant])
    x = inputs(2, sum(lengths), seed)
    whole, last = m(x)
    state, pieces = m.init_state(2, dtype=torch.float64), []
    for piece in x.split(lengths, dim=1):
        y, state = m(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


@settings(max_examples=25, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    more=st.lists(st.integers(0, 5), min_size=5, max_size=5),
)
def test_a_packed_prefill_goes_on_as_a_batch_or_packed_again(variant: str, lengths: list[int], more: list[int]) -> None:
    m, N = make(**VARIANTS[variant]), len(lengths)
    x, following, then = inputs(1, sum(lengths)), inputs(N, 1, 2), inputs(1, sum(more[:N]), 3)
    y, state = m(x, cu_seqlens=boundaries(lengths))
    step, state = m(following, state)
    again, state = m(then, state, boundaries(more[:N]))
    for n, piece in enumerate(x.split(lengths, 1)):
        start = sum(more[:n])
        alone = torch.cat([piece, following[n : n + 1], then[:, start : start + more[n]]], 1)
        expected = m(alone)[0]
        got = torch.cat([y.split(lengths, 1)[n], step[n : n + 1], again.split(more[:N], 1)[n]], 1)
        torch.testing.assert_close(got, expected)
        assert state.length[n] == alone.shape[1]


def test_the_cache_is_right_aligned_and_keeps_the_window() -> None:
    m = make(window=4, rope=False)
    x = inputs(1, 8)
    _, state = m(x, cu_seqlens=boundaries([1, 0, 7]))
    assert state.length.tolist() == [1, 0, 7]
    assert state.k.shape == (3, 4, 4, 4)
    keys = m.k_proj(x).view(8, 4, 4)
    torch.testing.assert_close(state.k[0, 3], keys[0])
    torch.testing.assert_close(state.k[2], keys[4:])
    assert (state.k[0, :3] == 0).all()
    assert (state.k[1] == 0).all()


def test_a_packed_sequence_is_not_touched_by_a_neighbour_that_is_not_finite() -> None:
    m, x = make(), inputs(1, 12)
    expected = m(x[:, 6:])[0]
    x[:, :6] = torch.nan
    torch.testing.assert_close(m(x, cu_seqlens=boundaries([6, 6]))[0][:, 6:], expected)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_are_exact_through_the_cache_and_packing(window: int | None) -> None:
    q = torch.randn(7, 4, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in "kv")
    old_k, old_v = (torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in "kv")
    rule, length, cu_seqlens = SoftmaxRule(0.5, window), torch.tensor([2, 1, 0]), boundaries([1, 4, 2])

    def packed(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor]:
        y = attend_packed(q, k, v, rule, cu_seqlens, (old_k, old_v), length)
        return y, append_packed(old_k, k, cu_seqlens, window)

    def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q[None], k[None], v[None], rule)

    assert torch.autograd.gradcheck(packed, (q, k, v, old_k, old_v))
    assert torch.autograd.gradcheck(banded, (q, k, v))


def test_a_window_that_covers_everything_is_full_attention() -> None:
    full, windowed, x = make(), make(window=9), inputs(2, 9)
    torch.testing.assert_close(windowed(x)[0], full(x)[0], rtol=0, atol=0)


def test_l2_scores_are_those_of_an_rms_norm_without_weights() -> None:
    l2, rms, x = make(qk_norm="l2"), make(qk_norm="rmsnorm", norm_eps=1e-12), inputs(2, 9)
    rms.load_state_dict(l2.state_dict(), strict=False)
    torch.testing.assert_close(l2(x)[0], rms(x)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("conv_size", [0, 4])
def test_queries_and_keys_may_start_equal(conv_size: int) -> None:
    m = make(n_kv_heads=2, conv_size=conv_size, conv_init="mean", qk_init="equal")
    torch.testing.assert_close(m.k_proj.weight.view(2, 4, 16), m.q_proj.weight.view(2, 2, 4, 16)[:, 0])
    if m.q_conv1d is not None and m.k_conv1d is not None:
        torch.testing.assert_close(m.k_conv1d.weight.view(2, 4, 4), m.q_conv1d.weight.view(2, 2, 4, 4)[:, 0])
        assert abs(m.v_conv1d.weight.mean() - 0.25) < 0.02
    assert not torch.equal(make(conv_size=conv_size).k_proj.weight, make(conv_size=conv_size).q_proj.weight)


@pytest.mark.parametrize("variant", ["plain", "all words"])
def test_training_compiles_whole(variant: str) -> None:
    m = make(**VARIANTS[variant])
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for cu_seqlens in (None, boundaries([3, 0, 17])):
        x = inputs(1, 20).requires_grad_()
        gradients = []
        for run in (m, compiled):
            y, _ = run(x, cu_seqlens=cu_seqlens)
            gradients.append(torch.autograd.grad(y.square().sum(), [x, *m.parameters()]))
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("context", [1, 3, 10])
def test_costs_count_the_pairs_that_are_seen(window: int | None, context: int) -> None:
    m = make(n_kv_heads=2, window=window, output_gate=True, conv_size=4)
    pairs = sum(min(t, window or t) for t in range(1, context + 1))
    projections = 2 * (16 * 16 * 3 + 2 * 16 * 8)  # q, gate, o; k, v
    fixed = projections + 2 * 4 * (16 + 8 + 8)
    assert m.flops_per_token(context) == round(fixed + 2 * 2 * 16 * pairs / context)
    assert m.flops_per_token(context, decode=True) == fixed + 2 * 2 * 16 * min(context + 1, window or context + 1)
    state = m(inputs(1, context))[1]
    assert m.kv_bytes(context, torch.float64) == state.k.nbytes + state.v.nbytes
    leaves = torch.utils._pytree.tree_leaves(state)
    assert m.state_bytes(context, torch.float64) == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"n_heads": 3}, r"n_heads: 3 does not divide d_model 16"),
        ({"n_kv_heads": 3}, r"n_kv_heads: 3 does not divide n_heads 4"),
        ({"head_dim": 3}, r"head_dim: rope .* got 3"),
        ({"window": 0}, r"window: must be at least 1, got 0"),
        ({"softcap": 0.0}, r"softcap: must be a finite number above 0"),
        ({"softcap": 1e300}, r"softcap: must be at most 1e\+30, got 1e\+300"),
        ({"rope_scaling": "ntk", "rope_factor": 1e300}, r"rope_factor: must be a number from 1 to 1e\+09"),
        (
            {"softcap": 3.0, "backend": "sdpa"},
            r"backend: 'sdpa' has no soft-cap \(softcap is 3.0\); with one: flash, flex",
        ),
        ({"window": 10**30}, r"window: must be at most 2,147,483,647, got 1,000,000,000"),
        ({"conv_size": -1}, r"conv_size: must be 0"),
        ({"backend": "flsh"}, r"backend: 'flsh' is not one of auto, .* \(did you mean 'flash'\?\)"),
        ({"qk_norm": "rms"}, r"qk_norm: 'rms' is not one of .*did you mean 'rmsnorm'"),
        ({"windw": 4}, r"did you mean 'window'"),
    ],
)
def test_words_that_cannot_be_built_are_named(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(**words)


def test_states_and_inputs_that_do_not_fit_are_named() -> None:
    m, x = make(), inputs(2, 3)
    state = m(x)[1]
    with pytest.raises(ValueError, match=r"state.k must be \[N, C, H_kv, D\] = \[3, 3, 4, 4\], got \[2, 3, 4, 4\]"):
        m(inputs(3, 1), state)
    with pytest.raises(ValueError, match="expected an AttentionState, got tuple"):
        m(x, tuple(state))
    with pytest.raises(ValueError, match="0 convolution tails, needs 3"):
        make(conv_size=2)(x, state)
    with pytest.raises(ValueError, match="3 slots, more than the window of 2"):
        make(window=2)(x, state)
    with pytest.raises(ValueError, match=r"state.length must be \[N\] = \[2\]"):
        m(x, AttentionState((), state.k, state.v, state.length[:1]))
    with pytest.raises(ValueError, match=r"x must be \[B, T, d_model\] = \[B, T, 16\], got \[2, 3, 8\]"):
        m(x[..., :8])
    with pytest.raises(TypeError, match="floating point, got torch"):
        m(x.long())
    with pytest.raises(ValueError, match="end at T = 6"):
        m(inputs(1, 6), cu_seqlens=torch.tensor([0, 5]))
