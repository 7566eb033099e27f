"""The short convolution's Triton kernels on the GPU itself, against the float64 PyTorch path: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_problems import make_conv
from delta_problems import relative_error
from device_reads import no_device_reads

from hybridzoo.kernels.fused.conv_op import _conv_op
from hybridzoo.kernels.short_conv import short_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Sums are in float32, so that only the rounding of each result is left: half of what is between two numbers.
TOLERANCES = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "odd length": {"T": 333, "C": 768},
    "whole blocks": {"T": 256, "C": 512, "B": 3},
    "no token": {"T": 0},
    "one token of many rows": {"T": 1, "C": 96, "B": 70},
    "fewer tokens than taps": {"T": 2},
    "packed": {"lengths": [0, 3, 0, 0, 257, 1, 2, 128, 0], "C": 320},
    "many sequences": {"lengths": [n % 7 for n in range(300)], "C": 32},
    "channels of odd number": {"T": 70, "C": 301},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("W", [1, 4, 7])
@pytest.mark.parametrize("more", [True, False], ids=["bias, silu, tail", "plain"])
@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
def test_it_is_the_convolution_forward_and_backward(shape: str, W: int, more: bool, dtype: torch.dtype) -> None:
    case = make_conv(**SHAPES[shape], W=W, bias=more, silu=more, tail=more).to(dtype, "cuda")
    found, truth = case.results("triton"), case.to(torch.float64, "cuda").results("torch")
    assert found.keys() == truth.keys()
    wrong = {}
    for name, expected in truth.items():
        error = relative_error(found[name], expected)
        if not error < TOLERANCES[dtype]:
            wrong[name] = f"{error:.1e}"
    assert not wrong


def test_two_runs_give_the_same_bits() -> None:
    case = make_conv(T=3000, C=512, B=4).to(torch.bfloat16, "cuda")
    first, second = (case.results("triton") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_any_split_into_calls_is_one_call_bit_for_bit() -> None:
    case = make_conv(T=200, C=96).to(torch.bfloat16, "cuda")
    y, end = case.call("triton")
    tail, outputs = case.tensors["tail"], []
    for piece in case.tensors["x"].split([1, 0, 2, 100, 97], 1):
        out, tail = case.call("triton", {**case.tensors, "x": piece, "tail": tail})
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(tail, end)


def test_a_slice_of_channels_is_read_where_it_lies() -> None:
    x = torch.randn(2, 100, 160, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(50, 4, device="cuda", dtype=torch.bfloat16)
    for start in (0, 3, 64):
        view = x[..., start : start + 50]
        expected = short_conv(view.contiguous(), weight, backend="triton")
        assert torch.equal(short_conv(view, weight, backend="triton").y, expected.y)


def test_it_is_what_a_gpu_gets_by_default_where_it_can() -> None:
    case = make_conv(T=40).to(torch.bfloat16, "cuda")
    assert torch.equal(case.call("auto").y, case.call("triton").y)
    double = case.to(torch.float64, "cuda")
    assert torch.equal(double.call("auto").y, double.call("torch").y)
    wide = make_conv(T=40, W=9).to(torch.float32, "cuda")
    assert torch.equal(wide.call("auto").y, wide.call("torch").y)


def test_the_operator_passes_torch_librarys_own_checks() -> None:
    for words in ({"T": 20}, {"lengths": [3, 0, 70]}, {"T": 3, "bias": False, "tail": False}):
        case = make_conv(**words).to(torch.float32, "cuda")
        t = {n: x.requires_grad_() for n, x in case.tensors.items()}
        torch.library.opcheck(
            _conv_op.operator, (t["x"], t["weight"], t.get("bias"), t.get("tail"), case.cu_seqlens, True)
        )


def test_a_compiled_call_is_one_graph_with_the_same_results() -> None:
    case = make_conv(lengths=[3, 0, 70], C=64).to(torch.bfloat16, "cuda")
    compiled = torch.compile(case.call, fullgraph=True)
    for x, y in zip(compiled("auto"), case.call("triton"), strict=True):
        assert torch.equal(x, y)
    leaves, eager = ({n: x.clone().requires_grad_() for n, x in case.tensors.items()} for _ in range(2))
    compiled("auto", leaves).y.sum().backward()
    case.call("triton", eager).y.sum().backward()
    assert all(torch.equal(x.grad, eager[n].grad) for n, x in leaves.items())


@pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device() -> None:
    case = make_conv(lengths=[30, 0, 41], C=64).to(torch.bfloat16, "cuda")
    leaves = {n: x.requires_grad_() for n, x in case.tensors.items()}
    case.call("triton", leaves).y.sum().backward()  # compiled by now
    with no_device_reads():
        case.call("auto", leaves).y.sum().backward()


def test_a_new_length_compiles_nothing() -> None:
    from hybridzoo.kernels.fused.conv import conv_backward_kernel, conv_kernel

    def made() -> int:
        return sum(len(caches[0]) for k in (conv_kernel, conv_backward_kernel) for caches in k.device_caches.values())

    counts = []
    for T, B in ((7, 2), (1, 1), (16, 3), (129, 16)):
        make_conv(T=T, B=B, C=48).to(torch.bfloat16, "cuda").results("triton")
        counts.append(made())
    assert counts == counts[:1] * 4
    assert counts[0] > 0


def test_more_rows_than_the_second_axis_of_a_grid_holds() -> None:
    x = torch.randn(70_000, 1, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 4, device="cuda", dtype=torch.bfloat16)
    y = short_conv(x, weight, activation=None, backend="triton").y
    assert relative_error(y, x.float() * weight[:, 3].float()) < 2**-8
