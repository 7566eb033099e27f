"""Decoding on the GPU itself, against the float64 `torch` backend: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_problems import Problem, make_problem, relative_error
from device_reads import no_device_reads
from registry_cases import flag_rows

from hybridzoo.kernels import DeltaState, gated_delta_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# The output is rounded to the inputs' dtype; the state is float32 whatever they are.
TOLERANCES = {torch.bfloat16: (6e-3, 1e-5), torch.float16: (2e-3, 1e-5), torch.float32: (1e-5, 1e-5)}
SHAPES: dict[str, dict[str, Any]] = {
    "128": {"K": 128, "V": 128, "H": 2, "B": 5},
    "64, grouped": {"K": 64, "V": 64, "H": 2, "group": 2, "B": 3},
    "96 x 48, strong decays": {"K": 96, "V": 48, "strength": 50.0},
    "128 x 16": {"K": 128, "V": 16},
}
ROWS = flag_rows()
CARVE = {"erase": "content", "predict": "stored"}


def on_gpu(dtype: torch.dtype, T: int = 1, **words: Any) -> Problem:
    """A problem rounded to `dtype`, on the GPU; with a content gate, its second row at the end of a chunk."""
    case = make_problem(T=T, chunk=16, **words).to(dtype)
    if case.chunk:
        case.state.count[1] = 15
    state = DeltaState(*(x.cuda() for x in case.state))
    return Problem({n: x.cuda() for n, x in case.tensors.items()}, state, case.chunk, case.options)


def copied(state: DeltaState) -> DeltaState:
    return DeltaState(*(x.clone() for x in state))


def tokens(case: Problem) -> list[dict[str, torch.Tensor]]:
    """The problem's tensors, one token at a time."""
    return [
        {n: x if n in ("down", "up") else x[:, t : t + 1] for n, x in case.tensors.items()}
        for t in range(case.tensors["q"].shape[1])
    ]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
def test_every_row_of_flags_is_the_recurrence(row: str, shape: str, dtype: torch.dtype) -> None:
    case = on_gpu(dtype, **ROWS[row], **SHAPES[shape])
    for norm in (False, True):
        o, end = case.call("triton", qk_l2norm=norm)
        assert o.dtype == dtype
        truth, true_end = case.to(torch.float64).call("torch", qk_l2norm=norm)
        assert torch.equal(end.count, true_end.count)
        limit, state_limit = TOLERANCES[dtype]
        assert relative_error(o, truth) < limit
        for name in ("S", "o_sum", "o_mean"):
            found, expected = getattr(end, name), getattr(true_end, name)
            assert not expected.numel() or relative_error(found, expected) < state_limit, name


@pytest.mark.parametrize("row", ROWS)
def test_in_place_is_the_same_bit_for_bit_and_so_is_every_run(row: str) -> None:
    case = on_gpu(torch.bfloat16, **ROWS[row], K=128, V=128, H=4, B=64)
    o, end = case.call("triton", qk_l2norm=True)
    for _ in range(5):  # a race would show in one of many heads, or not at the first time
        state = copied(case.state)
        again, given = case.call("triton", None, state, inplace_state=True, qk_l2norm=True)
        assert given is state
        assert torch.equal(again, o)
        assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))


@pytest.mark.parametrize("row", ["gdn2", "carve"])
def test_a_sequence_decoded_token_by_token_is_one_call(row: str) -> None:
    case = on_gpu(torch.float32, T=40, **ROWS[row], K=64, V=64, H=2, group=2)
    truth, true_end = case.to(torch.float64).call("torch", qk_l2norm=True)
    state, outputs = copied(case.state), []
    for token in tokens(case):
        o, _ = case.call("triton", token, state, inplace_state=True, qk_l2norm=True)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), truth) < 1e-5
    assert relative_error(state.S, true_end.S) < 1e-5
    assert torch.equal(state.count, true_end.count)


@pytest.mark.parametrize("row", ["gdn2", "carve"])
def test_a_captured_step_replayed_decodes_token_after_token(row: str) -> None:
    case = on_gpu(torch.bfloat16, T=20, **ROWS[row], K=64, V=64, H=2)
    eager = copied(case.state)
    expected = [case.call("triton", token, eager, inplace_state=True, qk_l2norm=True)[0] for token in tokens(case)]
    static = {n: x.clone() for n, x in tokens(case)[0].items()}
    state = copied(case.state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = case.call("triton", static, state, inplace_state=True, qk_l2norm=True)
    for token, output in zip(tokens(case), expected, strict=True):
        for name, x in token.items():
            static[name].copy_(x)
        graph.replay()
        assert torch.equal(o, output)
    assert all(torch.equal(x, y) for x, y in zip(state, eager, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_device(inplace: bool) -> None:
    case = on_gpu(torch.bfloat16, **CARVE, K=32, V=32)
    case.call("triton", inplace_state=inplace)  # compiled by now
    with no_device_reads():
        case.call("triton", inplace_state=inplace)


def test_a_state_that_is_not_contiguous_is_written_where_it_lies() -> None:
    case = on_gpu(torch.bfloat16, **CARVE, K=32, V=48)
    o, end = case.call("triton")
    state = copied(case.state)._replace(S=case.state.S.mT.contiguous().mT)
    assert torch.equal(case.call("triton", None, state, inplace_state=True)[0], o)
    assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))


def test_a_compiled_step_in_place_is_one_graph_with_the_same_results() -> None:
    case = on_gpu(torch.bfloat16, **CARVE, K=32, V=32)

    def step(state: DeltaState) -> torch.Tensor:
        return case.call("triton", None, state, inplace_state=True, qk_l2norm=True)[0]

    states = copied(case.state), copied(case.state)
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(states[0]), step(states[1]))
        assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))


def test_a_state_of_more_than_2_to_the_31_numbers_is_decoded_to_its_last_head() -> None:
    N, K = 40_000, 256  # 2.6e9 numbers, 10 GB
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory on the GPU")
    x = torch.randn(N, 1, 1, K, device="cuda", dtype=torch.bfloat16)
    state = DeltaState.zeros(N, 1, K, K, device="cuda")
    o, _ = gated_delta_rule(x, x, x, state=state, inplace_state=True, backend="triton")
    wide = x[-1, 0, 0].float()
    assert relative_error(o[-1, 0, 0], wide * wide.square().sum() / 16) < 6e-3
    assert relative_error(state.S[-1, 0], wide[:, None] * wide) < 1e-5
