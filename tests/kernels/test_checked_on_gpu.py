"""The kernels were checked on a GPU since they last changed."""

from __future__ import annotations

import json
from pathlib import Path

from hybridzoo import kernels
from hybridzoo.kernels.source import folder_digest

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "triton_check.json").read_text())


def test_the_record_of_the_check_is_of_these_kernels() -> None:
    assert RECORD["kernels"] == folder_digest(Path(kernels.__file__).parent), (
        "kernels/ changed since it was last checked on a GPU: run, on one, "
        "pytest -m gpu tests/kernels --record benchmarks/results/triton_check.json"
    )


def test_the_record_says_where_it_was_taken_and_covers_the_registry() -> None:
    assert "NVIDIA" in RECORD["environment"]["device_name"]
    assert RECORD["environment"]["triton"]
    from registry_cases import flag_rows

    for row in flag_rows():
        for dtype in ("bfloat16", "float32"):
            assert any(f"forward_and_backward[{row}-" in test and dtype in test for test in RECORD["passed"]), (
                row,
                dtype,
            )
