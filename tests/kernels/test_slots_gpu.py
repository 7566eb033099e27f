"""Attention to a cache's slots on the GPU itself, against the definition in float64: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_problems import relative_error
from device_reads import no_device_reads
from slots_problems import make_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Weights are rounded to the cache's dtype before they meet values, and so is the output; the sums are float32.
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "one slot": {"lengths": (0,), "C": 1},
    "rows of every length": {"lengths": (0, 1, 255, 256, 257, 2000), "C": 2048, "D": 64},
    "a long row": {"lengths": (65_535,), "C": 65_536, "H": 4, "H_kv": 4, "D": 128},
    "rings that have gone round": {"lengths": (5, 1023, 1024, 90_000), "C": 1024, "D": 128},
    "grouped heads": {"lengths": (3000, 17, 600), "C": 3328, "H": 8, "H_kv": 2, "D": 128},
    "one key head for many": {"lengths": (700,) * 3, "C": 768, "H": 20, "H_kv": 1, "D": 96},
    "the largest heads": {"lengths": (900, 30), "C": 1024, "H": 4, "H_kv": 2, "D": 256},
    "more rows than programs are asked for": {"lengths": tuple(range(100, 1000, 3)), "C": 1024, "D": 32},
    "capped scores": {"lengths": (900, 30), "C": 1024, "D": 64, "softcap": 2.0, "scale": 3.0},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
def test_it_is_attention_to_what_a_row_has_seen(shape: str, dtype: torch.dtype) -> None:
    case = make_slots(**SHAPES[shape]).to(dtype, "cuda")
    found = case.found()
    assert found.dtype == dtype
    assert relative_error(found, case.truth()) < TOLERANCES[dtype]


def test_two_runs_give_the_same_bits() -> None:
    case = make_slots(lengths=(5000, 300), C=8192, H=8, H_kv=4, D=128).to(torch.bfloat16, "cuda")
    first = case.found()
    assert all(torch.equal(case.found(), first) for _ in range(5))


def test_a_graph_reads_how_long_rows_are_when_it_is_replayed() -> None:
    case = make_slots(lengths=(1023, 1023), C=1024, D=64).to(torch.bfloat16, "cuda")
    case.found()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with no_device_reads(), torch.cuda.graph(graph):
        o = case.found()
    for lengths in ((0, 1), (500, 1023), (1023, 7)):
        case.length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(o, case.found())
