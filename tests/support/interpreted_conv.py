"""The short convolution's Triton kernels on the CPU; interpreted.py runs this file in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_problems import ConvProblem, make_conv
from delta_problems import assert_close, relative_error
from interpreted import report

from hybridzoo.kernels.fused import conv_op
from hybridzoo.kernels.short_conv import short_conv

# Of 8 tokens, for the interpreter's sake: lengths end within, at and past them, and sequences everywhere.
BLOCK = 8
LENGTHS: dict[str, Callable[[int], dict[str, Any]]] = {
    "no token": lambda W: {"T": 0},
    "one token": lambda W: {"T": 1},
    "fewer tokens than taps": lambda W: {"T": max(W - 2, 0)},
    "two blocks": lambda W: {"T": 11},
    "whole blocks": lambda W: {"T": 8, "B": 1},
    "packed": lambda W: {"lengths": [0, 3, 0, 0, 10, 1, 2, 0]},
    "packed, one sequence": lambda W: {"lengths": [19]},
    "packed, no token": lambda W: {"lengths": [0, 0]},
}
FLAGS = list(itertools.product((True, False), repeat=3))


def flags(which: tuple[bool, ...]) -> dict[str, bool]:
    """Three flags by name."""
    return dict(zip(("bias", "silu", "tail"), which, strict=True))


# Every number of taps with every length, the flags in turn; every flag at four taps; and what neither shows.
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{W} taps, {name}": {"W": W, "seed": i, **words(W), **flags(FLAGS[(W + i) % 8])}
        for W in range(1, 6)
        for i, (name, words) in enumerate(LENGTHS.items())
    },
    **{
        f"{name}, {flags(which)}": {**LENGTHS[name](4), **flags(which)}
        for name in ("two blocks", "packed")
        for which in FLAGS
    },
    "8 taps": {"W": 8, "lengths": [5, 11, 7]},
    "channels of two programs": {"C": 300, "T": 5},
    "one channel": {"C": 1, "T": 5},
    "a loss that reads y alone": {"ends": ("y",), "lengths": [9, 2, 4]},
    "a loss that reads the tail alone": {"ends": ("tail",), "lengths": [9, 2, 4]},
    "many sequences": {"lengths": [n % 3 for n in range(17)]},
}
CHECKS: dict[str, Callable[[], None]] = {}


def problem(**words: Any) -> ConvProblem:
    """A problem of float32."""
    return make_conv(**words).to(torch.float32)


def errors(case: ConvProblem) -> dict[str, float]:
    """Relative errors by name against the float64 PyTorch path."""
    found, truth = case.results("triton"), case.to(torch.float64).results("torch")
    assert found.keys() == truth.keys()
    return {name: relative_error(found[name], x) for name, x in truth.items()}


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Add a function that raises when a property does not hold."""
    CHECKS[run.__name__] = run
    return run


def with_blocks(forward: int, backward: int, case: ConvProblem) -> dict[str, torch.Tensor]:
    """The results with blocks of so many tokens."""
    before = conv_op.BLOCK, conv_op.BLOCK_BACKWARD
    conv_op.BLOCK, conv_op.BLOCK_BACKWARD = forward, backward
    try:
        return case.results("triton")
    finally:
        conv_op.BLOCK, conv_op.BLOCK_BACKWARD = before


PACKED = {"lengths": [3, 0, 10, 1, 2]}


@check
def any_split_into_calls_is_one_call_bit_for_bit() -> None:
    case = problem(T=20)
    y, end = case.call("triton")
    tail, outputs = case.tensors["tail"], []
    for piece in case.tensors["x"].split([1, 0, 2, 13, 4], 1):
        out, tail = case.call("triton", {**case.tensors, "x": piece, "tail": tail})
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(tail, end)


@check
def packed_sequences_are_the_sequences_one_by_one_bit_for_bit() -> None:
    case = problem(**PACKED)
    y, tail = case.call("triton")
    starts = case.cu_seqlens.tolist()
    case.cu_seqlens = None
    for n, (start, end) in enumerate(itertools.pairwise(starts)):
        alone = {**case.tensors, "x": case.tensors["x"][:, start:end], "tail": case.tensors["tail"][n : n + 1]}
        y_alone, tail_alone = case.call("triton", alone)
        assert torch.equal(y[:, start:end], y_alone)
        assert torch.equal(tail[n : n + 1], tail_alone)


@check
def the_shipped_blocks_give_the_same() -> None:
    case = problem(lengths=[1, 131, 2])
    found, truth = with_blocks(64, 128, case), case.to(torch.float64).results("torch")
    assert_close(found, truth, 1e-6)
    assert torch.equal(found["y"], with_blocks(BLOCK, BLOCK, case)["y"])


@check
def two_runs_give_the_same_bits() -> None:
    case = problem(**PACKED)
    assert all(torch.equal(x, y) for x, y in zip(*(case.results("triton").values() for _ in "12"), strict=True))


@check
def a_sequence_never_reads_its_neighbour_even_when_that_is_not_finite() -> None:
    case = problem(lengths=[10, 9], tail=False, bias=False)
    expected = case.results("triton")
    case.tensors["x"][:, :10] = torch.nan
    found = case.results("triton")
    assert torch.equal(found["y"][:, 10:], expected["y"][:, 10:])
    assert torch.equal(found["tail"][1], expected["tail"][1])
    assert torch.equal(found["d_x"][:, 10:], expected["d_x"][:, 10:])


@check
def inputs_of_any_layout_are_taken() -> None:
    case = problem(T=6)
    expected = case.results("triton")
    x = case.tensors["x"]
    layouts = {
        "a slice of the channels of something wider": torch.cat([x, x, x], 2)[..., 20:40],
        "channels before time": x.mT.contiguous().mT,
        "every second token of something longer": x.repeat_interleave(2, 1)[:, ::2],
        "one tensor for all rows": x[:1].expand(2, -1, -1),
    }
    for name, view in layouts.items():
        truth = case.call("triton", {**case.tensors, "x": view.contiguous()})[0]
        assert torch.equal(case.call("triton", {**case.tensors, "x": view})[0], truth), name
    case.tensors["weight"] = case.tensors["weight"].mT.contiguous().mT
    case.tensors["tail"] = case.tensors["tail"].mT.contiguous().mT
    assert all(torch.equal(y, expected[n]) for n, y in case.results("triton").items())


@check
def float16_loses_only_its_own_rounding() -> None:
    case = make_conv(T=20).to(torch.float16)
    found, truth = case.results("triton"), case.to(torch.float64).results("torch")
    assert {x.dtype for x in found.values()} == {torch.float16}
    assert_close(found, truth, 5e-4)  # half of what is between two numbers of float16


@check
def float32_parameters_and_tails_go_with_float16_tokens() -> None:
    case = make_conv(**PACKED).to(torch.float16)
    wide = {n: x if n == "x" else x.float() for n, x in case.tensors.items()}
    mixed = ConvProblem(wide, case.cu_seqlens, True, case.ends)
    found, truth = mixed.results("triton"), case.to(torch.float64).results("torch")
    half = {n for n, x in found.items() if x.dtype == torch.float16}
    assert half == {"y", "tail", "d_x"}
    assert_close(found, truth, 5e-4)


@check
def autocast_changes_nothing() -> None:
    case = problem(T=6)
    expected = case.results("triton")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, expected[n]) for n, x in case.results("triton").items())


@check
def what_needs_no_gradient_costs_the_others_nothing() -> None:
    case = problem(**PACKED)
    expected = case.results("triton")
    for name in case.tensors:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in case.tensors.items()}
        y, tail = case.call("triton", leaves)
        seed = torch.Generator().manual_seed(1)
        weights = [torch.randint(-4, 5, end.shape, generator=seed).to(end) for end in (y, tail)]
        ends = [(end, w) for end, w in zip((y, tail), weights, strict=True) if end.requires_grad]
        torch.autograd.backward([end for end, _ in ends], [w for _, w in ends])
        assert torch.equal(leaves[name].grad, expected[f"d_{name}"]), name


@check
def what_is_not_a_packing_is_refused() -> None:
    case = problem(lengths=[40])
    case.cu_seqlens = torch.tensor([0, 3, 2, 40])
    case.tensors["tail"] = torch.zeros(3, 20, 3)
    with pytest.raises(ValueError, match="must not decrease"):
        case.call("triton")


@check
def a_second_derivative_and_forward_mode_are_refused() -> None:
    case = problem(T=5)
    x = case.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(case.call("triton")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="short_conv has no second derivative"):
        torch.autograd.grad(dx.sum(), x)
    weight = case.tensors["weight"]
    with pytest.raises(NotImplementedError, match="in reverse mode only, none in forward mode"):
        torch.func.jvp(lambda w: short_conv(x.detach(), w, backend="triton")[0], (weight,), (weight,))


@check
def the_operator_passes_torch_librarys_own_checks() -> None:
    for words in ({"T": 3}, {"lengths": [2, 0, 1], "bias": False, "tail": False}, {"T": 0, "W": 1}):
        case = problem(**words)
        leaves = {n: x.requires_grad_() for n, x in case.tensors.items()}
        arguments = (leaves["x"], leaves["weight"], leaves.get("bias"), leaves.get("tail"), case.cu_seqlens, True)
        torch.library.opcheck(conv_op._conv_op.operator, arguments)


@check
def a_compiled_call_is_one_graph_with_the_same_results() -> None:
    for words in ({"T": 5}, {"lengths": [2, 0, 1]}):
        case, other = problem(**words), problem(**words)
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        case.call = lambda backend, tensors, compiled=compiled: compiled(backend, tensors)
        expected = other.results("triton")
        assert all(torch.equal(x, expected[n]) for n, x in case.results("triton").items())


@check
def gradients_in_a_batch_are_those_of_each() -> None:
    case = problem(T=11)
    leaves = [x.requires_grad_() for x in (case.tensors["x"], case.tensors["weight"])]
    y, _ = case.call("triton")
    d_y = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, d_y, is_grads_batched=True, retain_graph=True)
    for n, one in enumerate(d_y):
        for found, x in zip(batched, torch.autograd.grad(y, leaves, one, retain_graph=True), strict=True):
            assert torch.equal(found[n], x)


@check
def a_negative_view_is_what_it_says() -> None:
    x, weight = torch._neg_view(torch.randn(2, 11, 4)), torch.randn(4, 3)
    assert x.is_neg()
    assert x.is_contiguous()  # else a copy is made, which is no such view
    assert torch.equal(short_conv(x, weight, backend="triton")[0], short_conv(x.clone(), weight, backend="triton")[0])


@check
def the_automatic_choice_on_a_cpu_stays_pytorch() -> None:
    case = problem(T=20)
    assert torch.equal(case.call("auto").y, case.call("torch").y)
    x = case.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(case.call("auto").y.sum(), x, create_graph=True)
    torch.autograd.grad(dx.sum(), x)  # which the operator refuses


if __name__ == "__main__":
    assert (conv_op.BLOCK, conv_op.BLOCK_BACKWARD) == (64, 128)
    conv_op.BLOCK = conv_op.BLOCK_BACKWARD = BLOCK
    report(CASES, lambda words: errors(problem(**words)), CHECKS)
