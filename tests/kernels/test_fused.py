"""The Triton backend without a GPU: its kernels are right under Triton's interpreter, and compile within bounds."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridzoo.kernels import ContentGate, gated_delta_rule
from hybridzoo.kernels.fused.config import MOST_SHARED, _cuts

pytest.importorskip("triton", reason="triton is not installed; its wheels are for Linux")

import interpreted
from compiled import planned, usage
from registry_cases import flag_rows

from hybridzoo.kernels.fused.launch import Launch, Queue
from hybridzoo.kernels.fused.memory import Memory

TOLERANCE = 1e-5
# Where spills go: bytes of stack that a thread may have. On Ampere a product's accumulators and operands both live in
# registers; float32 and float16 operands take twice the room.
STACK = {"bf16": 256, "bf16 on Ampere": 512, "4 bytes": 1024}
# A content gate's kernels hold a state while they call functions, which leave registers there too.
STACK_OF_GROUPS = 2048
# Two warps have less room for the step of states of bf16 heads of 64 than four, and are faster (benchmarks/NOTES.md).
STACK_OF_TWO_WARPS = 320
CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="session")
def interpreter() -> dict[str, dict[str, Any]]:
    return interpreted.run_apart()


@pytest.mark.xdist_group("interpreter")
@pytest.mark.parametrize("name", interpreted.CASES)
def test_the_kernels_are_the_recurrence_forward_and_backward(interpreter: dict[str, Any], name: str) -> None:
    found = interpreter["cases"][name]
    assert isinstance(found, dict), found
    wrong = {quantity: f"{error:.1e}" for quantity, error in found.items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.xdist_group("interpreter")
@pytest.mark.parametrize("name", interpreted.CHECKS)
def test_under_the_interpreter_it_holds_that(interpreter: dict[str, Any], name: str) -> None:
    raised = interpreter["checks"][name]
    assert raised is None, raised


ROWS = flag_rows()
SIZES = {"64": (64, 64), "128": (128, 128), "64x128": (64, 128), "256": (256, 256)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EVERY = [
    (row, size, dtype, capability, packed)
    for row in ROWS
    for size in SIZES
    for dtype in DTYPES
    for capability in CAPABILITIES
    for packed in (False, True)
]
# What the suite compiles; the rest takes the better part of an hour, and is asked for by HYBRIDZOO_COMPILE=all.
FEW = [
    ("linear_attention", "64", "bf16", 90, False),
    ("gla", "128", "bf16", 100, False),
    ("gated_delta_net", "128", "bf16", 80, True),
    ("kda", "64", "fp32", 90, False),
    ("kda", "64", "bf16", 90, True),
    ("gdn2", "128", "bf16", 90, False),
    ("carve", "64", "bf16", 100, True),
    ("carve", "128", "bf16", 90, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, size, dtype, capability, packed",
    EVERY if os.environ.get("HYBRIDZOO_COMPILE") == "all" else FEW,
    ids=lambda value: "packed" if value is True else "even" if value is False else str(value),
)
def test_a_shipped_configuration_compiles_within_its_bounds(
    row: str, size: str, dtype: str, capability: int, packed: bool
) -> None:
    kind = "4 bytes" if dtype != "bf16" else "bf16 on Ampere" if capability == 80 else "bf16"
    # As training has it, without a state before or after; and with both.
    words = {"norm": packed, "fresh": not packed, "inference": True}
    for launch, tensors in planned(ROWS[row], *SIZES[size], DTYPES[dtype], packed, **words):
        takes = usage(launch, tensors, capability)
        assert takes.shared <= MOST_SHARED * 1024, (launch.kernel.fn.__name__, takes)
        most = STACK_OF_GROUPS if "GROUP" in launch.constants else STACK[kind]
        if launch.constants.get("STATES") and launch.constants["C"] == 32 and launch.options["num_warps"] == 2:
            most = max(most, STACK_OF_TWO_WARPS)
        assert takes.stack <= most, (launch.kernel.fn.__name__, takes)
        # 32 registers and kilobytes of stack are what ptxas leaves when it gives up.
        assert takes.registers > 32, takes


def test_launches_that_share_what_is_compiled_are_given_tensors_of_the_same_dtypes() -> None:
    seen: dict[Any, Any] = {}
    for row in ("linear_attention", "gdn2", "carve"):
        for dtype, K in itertools.product(DTYPES.values(), (64, 128)):
            for heads, group, *flags in itertools.product((2, 4), (1, 2), *[(False, True)] * 3):
                words = dict(zip(("norm", "packed", "fresh"), flags, strict=True))
                for launch, tensors in planned(
                    ROWS[row], K, 64, dtype, heads=heads, group=group, inference=True, **words
                ):
                    given = [tensors.get(name) for name in launch.kernel.arg_names]
                    dtypes = [None if x is None else x.dtype for x in given]
                    assert seen.setdefault(launch._key, dtypes) == dtypes, (
                        launch.kernel.fn.__name__,
                        row,
                        heads,
                        group,
                    )
    assert len(seen) > 50


class _Kernel:
    """What a Launch asks of a kernel, and what compiled ones do: nothing."""

    arg_names = ("x", "n")

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., _Kernel]:
        return lambda *arguments, **named: self


def test_tensors_are_freed_when_the_last_start_has_returned() -> None:
    gc.disable()  # else circles are freed as well, some time
    try:
        kernel = _Kernel()
        for _ in range(2):  # compiled, and then found compiled
            x = torch.zeros(3)
            alive, launch = weakref.ref(x), Launch(kernel, (1, 1), {"n": 1}, {}, {}, ())
            start = launch.starter(Memory({"x": x}), Queue(None, None))
            start()
            start(n=2)
            del x, start
            assert alive() is None
    finally:
        gc.enable()


def _call(K: int = 16, V: int = 16, dtype: torch.dtype = torch.float32, chunk: int = 0, r: int = 2) -> dict[str, Any]:
    q, v = torch.zeros(1, 5, 1, K, dtype=dtype), torch.zeros(1, 5, 1, V, dtype=dtype)
    if not chunk:
        return {"q": q, "k": q, "v": v}
    pair = ContentGate(torch.zeros(1, r, V), torch.zeros(1, K, r), chunk)
    return {"q": q, "k": q, "v": v, "erase_logits": q, "content": pair}


REFUSED = [
    (_call(), "needs tensors on a CUDA device, got cpu; to try it there, set TRITON_INTERPRET=1"),
    (_call(dtype=torch.float64), "takes bfloat16, float16 and float32, got torch.float64"),
    (_call(K=24), "takes head sizes that are multiples of 16 up to 256, got K = 24 and V = 16"),
    (_call(V=272), "got K = 16 and V = 272"),
    (_call(chunk=24), "takes content chunks that are multiples of 16, got 24"),
    (_call(chunk=16, r=65), "takes content ranks from 1 to 64, got 65"),
]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set, so tensors of the CPU are taken")
@pytest.mark.parametrize("arguments, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_it_cannot_do_is_an_error_by_name_and_pytorch_by_default(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"backend='triton' ") as refused:
        gated_delta_rule(**arguments, backend="triton")
    assert message in str(refused.value)
    assert torch.equal(gated_delta_rule(**arguments)[0], gated_delta_rule(**arguments, backend="torch")[0])


def test_a_machine_without_triton_runs_everything_else() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None  # an import of it fails
        import torch
        from hybridzoo.kernels import gated_delta_rule
        x = torch.ones(1, 3, 1, 16, requires_grad=True)
        gated_delta_rule(x, x, x)[0].sum().backward()
        try:
            gated_delta_rule(x, x, x, backend="triton")
        except ValueError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert "backend='triton' needs the package triton, which cannot be imported" in out


@pytest.mark.parametrize("multiprocessors", (15, 16))
def test_a_gpu_too_small_for_a_group_is_refused_a_content_gate(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int
) -> None:
    from hybridzoo.kernels.fused import support

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 7))
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    support._known_refusal.cache_clear()
    try:
        assert support.device_refusal("cuda", 0) is None
        refused = support.device_refusal("cuda", 0, groups=True)
    finally:
        support._known_refusal.cache_clear()
    assert (refused is None) == (multiprocessors == 16)
    assert refused is None or "15" in refused


def test_no_group_is_larger_than_the_smallest_gpu_that_is_taken() -> None:
    from hybridzoo.kernels.fused.support import MOST_OF_A_GROUP

    sizes = range(16, 257, 16)
    groups = [
        _cuts(K, V, heads, 16, narrow, True, False, True, False).group
        for K, V, heads, narrow in itertools.product(sizes, sizes, (1, 64, 1024), (False, True))
    ]
    assert max(groups) == MOST_OF_A_GROUP


def test_a_triton_older_than_was_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from hybridzoo.kernels.fused import support

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    support._known_refusal.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"needs triton 3\.6 or later, got 3\.5\.1: use backend='torch'"):
            gated_delta_rule(**_call(), backend="triton")
    finally:
        support._known_refusal.cache_clear()


def test_the_operators_come_with_a_formula_for_their_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(1, 64, 2, 16, device="meta", requires_grad=True)
    counts = []
    for backend in ("triton", "torch"):
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule(x, x, x, backend=backend)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
