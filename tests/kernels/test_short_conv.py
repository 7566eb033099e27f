"""The short convolution: cut anywhere, pack anything, same outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridzoo.kernels.short_conv import short_conv

C = 5


def make(B: int, T: int, W: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((B, T, C), (C, W), (C,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 2, 7])
def test_it_is_the_left_padded_depthwise_convolution(T: int, W: int) -> None:
    x, weight, bias = make(2, T, W)
    y, tail = short_conv(x, weight, bias, activation=None)
    padded = F.pad(x.transpose(1, 2), (W - 1, 0))
    expected = F.conv1d(padded, weight[:, None], bias, groups=C).transpose(1, 2) if T else x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(tail, padded[..., T:])
    torch.testing.assert_close(short_conv(x, weight, bias).y, F.silu(expected))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), W=st.integers(1, 5), seed=st.integers(0, 99))
def test_calls_that_carry_the_tail_equal_one_call(lengths: list[int], W: int, seed: int) -> None:
    x, weight, bias = make(2, sum(lengths), W, seed=seed)
    whole, last = short_conv(x, weight, bias)
    tail, pieces = None, []
    for piece in x.split(lengths, dim=1):
        y, tail = short_conv(piece, weight, bias, tail)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(tail, last, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    W=st.integers(1, 5),
    seed=st.integers(0, 99),
    fresh=st.booleans(),
)
def test_packed_sequences_equal_the_sequences_one_by_one(lengths: list[int], W: int, seed: int, fresh: bool) -> None:
    x, weight, bias = make(1, sum(lengths), W, seed=seed)
    tails = None if fresh else torch.randn(len(lengths), C, W - 1, dtype=x.dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    y, tail = short_conv(x, weight, bias, tails, cu_seqlens)
    for n, piece in enumerate(x.split(lengths, dim=1)):
        alone = short_conv(piece, weight, bias, None if tails is None else tails[n : n + 1])
        torch.testing.assert_close(y[:, cu_seqlens[n] : cu_seqlens[n + 1]], alone.y, rtol=0, atol=1e-14)
        torch.testing.assert_close(tail[n : n + 1], alone.tail, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [None, [1, 0, 4, 2]])
def test_gradients_are_exact_through_tails_in_and_out(lengths: list[int] | None) -> None:
    x, weight, bias = make(1 if lengths else 2, 7, 4)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]) if lengths else None
    tail = torch.randn(len(lengths) if lengths else 2, C, 3, dtype=x.dtype)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, tail))
    function = lambda x, w, b, t: tuple(short_conv(x, w, b, t, cu_seqlens))  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_sequence_never_reads_its_neighbour_even_when_that_is_not_finite() -> None:
    x, weight, _ = make(1, 6, 4)
    x[:, :3] = torch.nan
    y, tail = short_conv(x, weight, cu_seqlens=torch.tensor([0, 3, 6]))
    torch.testing.assert_close(y[:, 3:], short_conv(x[:, 3:], weight).y)
    assert tail[1].isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bit_inputs_are_summed_in_float32(packed: bool) -> None:
    x, weight, bias = make(1, 64, 4, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 30, 64]) if packed else None
    y, tail = short_conv(x, weight, bias, cu_seqlens=cu_seqlens, activation=None)
    exact = short_conv(x.double(), weight.double(), cu_seqlens=cu_seqlens, activation=None).y
    assert y.dtype == tail.dtype == torch.bfloat16
    bound = exact.abs() * 2**-8 + (exact + bias.double()).abs() * 2**-8 + 1e-6  # two roundings: the sum, and the bias
    assert ((y.double() - exact - bias.double()).abs() <= bound).all()
    assert short_conv(x, weight.float(), cu_seqlens=cu_seqlens).y.dtype == torch.bfloat16


def test_it_compiles_whole_with_tails_and_packing() -> None:
    def loss(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        y, last = short_conv(x, weight, None, tail, cu_seqlens)
        total = y.square().sum() + last.sum()
        return (y, *torch.autograd.grad(total, (x, weight, tail)))

    x, weight, _ = make(1, 9, 4)
    tail = torch.randn(2, C, 3, dtype=x.dtype)
    inputs = [t.requires_grad_() for t in (x, weight, tail)]
    cu_seqlens = torch.tensor([0, 2, 9])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor) -> Tensor:
        y, last = short_conv(x, weight, None, tail, cu_seqlens)
        return y.square().sum() + last.sum()

    compiled = torch.autograd.grad(forward(*inputs, cu_seqlens), inputs)
    for got, expected in zip(compiled, loss(*inputs, cu_seqlens)[1:], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[B, T, C\]"),
        ({"x": torch.zeros(2, 3, C, dtype=torch.long)}, TypeError, "x must be floating point"),
        ({"weight": torch.zeros(C + 1, 4)}, ValueError, r"weight must be \[C, W\]"),
        ({"weight": torch.zeros(C, 4, dtype=torch.bfloat16)}, TypeError, "cast one"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \[C\]"),
        ({"tail": torch.zeros(2, C, 4)}, ValueError, r"tail must be \[N, C, W-1\] = \[2, 5, 3\]"),
        ({"activation": "gelu"}, ValueError, "'silu' or None, got 'gelu'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "B must be 1"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(2, 3, C), "weight": torch.zeros(C, 4), **change}
    with pytest.raises(error, match=message):
        short_conv(**given)
