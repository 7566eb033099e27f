"""The short convolution's Triton kernels without a GPU: right under the interpreter, compiled without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from hybridzoo.kernels.fused import conv_op
from hybridzoo.kernels.short_conv import short_conv

pytest.importorskip("triton", reason="triton is not installed; its wheels are for Linux")

import interpreted
import interpreted_conv
from compiled import usage

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def interpreter() -> dict[str, dict[str, Any]]:
    return interpreted.run_apart("interpreted_conv")


@pytest.mark.xdist_group("interpreter of the convolution")
@pytest.mark.parametrize("name", interpreted_conv.CASES)
def test_the_kernels_are_the_convolution_forward_and_backward(interpreter: dict[str, Any], name: str) -> None:
    found = interpreter["cases"][name]
    assert isinstance(found, dict), found
    wrong = {quantity: f"{error:.1e}" for quantity, error in found.items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.xdist_group("interpreter of the convolution")
@pytest.mark.parametrize("name", interpreted_conv.CHECKS)
def test_under_the_interpreter_it_holds_that(interpreter: dict[str, Any], name: str) -> None:
    raised = interpreter["checks"][name]
    assert raised is None, raised


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVERY = [
    (W, dtype, capability, packed, bias, tails)
    for W in range(1, conv_op.MAX_TAPS + 1)
    for dtype in DTYPES
    for capability in (80, 90, 100)
    for packed in (False, True)
    for bias in (False, True)
    for tails in (False, True)
]
# What the suite compiles; the rest is asked for by HYBRIDZOO_COMPILE=all.
FEW = [
    (4, "bf16", 90, False, False, False),
    (4, "bf16", 90, True, True, True),
    (4, "fp32", 80, True, True, False),
    (3, "fp16", 100, False, True, True),
    (8, "bf16", 100, True, True, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "W, dtype, capability, packed, bias, tails", EVERY if os.environ.get("HYBRIDZOO_COMPILE") == "all" else FEW
)
def test_a_shipped_configuration_compiles_without_a_spill(
    W: int, dtype: str, capability: int, packed: bool, bias: bool, tails: bool
) -> None:
    B, T, C, N = (1, 4096, 2048, 3) if packed else (2, 2048, 2048, 2)

    def empty(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, tail = empty(B, T, C), empty(N, C, W - 1)
    cu_seqlens = empty(N + 1, dtype=torch.int64) if packed else None
    call = conv_op.ConvCall(x, empty(C, W), empty(C) if bias else None, tail if tails else None, cu_seqlens, silu=True)
    form, found = conv_op.form_of(call, d_new=tails, d_tail=tails)
    given = tail if tails else None
    parts = empty(form.blocks(form.block_backward), W + bias, C, dtype=torch.float32)
    found |= {"y": x, "new_tail": tail, "dy": x, "d_new": given, "dx": x, "d_tail": given, "parts": parts}
    for launch in (conv_op.forward_launch(form), conv_op.backward_launch(form)):
        takes = usage(launch, found, capability)
        assert takes.stack == 0, takes
        assert takes.shared <= 1024, takes  # what turns a strided load about


def _call(
    W: int = 4, C: int = 3, dtype: torch.dtype = torch.float32, bias: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    tensors = {"x": torch.zeros(2, 5, C, dtype=dtype), "weight": torch.zeros(C, W, dtype=dtype)}
    return tensors if bias is None else {**tensors, "bias": torch.zeros(C, dtype=bias)}


REFUSED = [
    (_call(), "needs tensors on a CUDA device, got cpu; to try it there, set TRITON_INTERPRET=1"),
    (_call(dtype=torch.float64), "takes bfloat16, float16 and float32, got x in torch.float64: use backend='torch'"),
    (_call(bias=torch.float64), "takes bfloat16, float16 and float32, got bias in torch.float64: use backend='torch'"),
    (_call(W=9), "takes up to 8 taps, got W = 9: use backend='torch'"),
    (_call(C=0), "takes one channel or more, got C = 0: use backend='torch'"),
]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set, so tensors of the CPU are taken")
@pytest.mark.parametrize("arguments, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_it_cannot_do_is_an_error_by_name_and_pytorch_by_default(
    arguments: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=r"short_conv: backend='triton' ") as refused:
        short_conv(**arguments, backend="triton")
    assert message in str(refused.value)
    assert torch.equal(short_conv(**arguments).y, short_conv(**arguments, backend="torch").y)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, got 'cuda'"):
        short_conv(**_call(), backend="cuda")


def test_a_machine_without_triton_runs_the_pytorch_path() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None  # an import of it fails
        import torch
        from hybridzoo.kernels.short_conv import short_conv
        x = torch.ones(1, 3, 2, requires_grad=True)
        short_conv(x, torch.ones(2, 4)).y.sum().backward()
        try:
            short_conv(x, torch.ones(2, 4), backend="triton")
        except ValueError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert "backend='triton' needs the package triton, which cannot be imported" in out


def test_shapes_alone_go_through_it() -> None:
    x = torch.empty(2, 7, 3, device="meta", requires_grad=True)
    weight, bias = torch.empty(3, 4, device="meta", requires_grad=True), torch.empty(3, device="meta")
    y, tail = short_conv(x, weight, bias, backend="triton")
    assert (y.shape, tail.shape) == ((2, 7, 3), (2, 3, 3))
    y.sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
