"""The Triton kernels on the CPU, run as a script in a process of its own, since TRITON_INTERPRET=1 must be set before
triton is imported. Prints one JSON object: for each case the error of each quantity, and for each check what it raised.

Fresh memory holds NaN here, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_problems import Problem, assert_close, gradients_without_ends, make_problem, relative_error
from dispatched import dispatched

from hybridzoo.kernels import DeltaState
from hybridzoo.kernels.fused.memory import Memory, layout

# All values of every flag, and then what a gate alone does not show. Lengths end within a tile of 16 and within a
# content chunk.
CASES: dict[str, dict[str, Any]] = {
    "linear attention": {"decay": "none", "correct": "none", "write": "one"},
    "gla": {"correct": "none", "write": "one", "T": 33},
    "mamba2": {"decay": "scalar", "correct": "none"},
    "write a channel without correction": {"correct": "none", "write": "channel", "lengths": [40, 0, 3]},
    "delta_net": {"decay": "none", "T": 48},
    "gated_delta_net": {"decay": "scalar", "lengths": [0, 1, 16, 30, 0]},
    "kda": {"lengths": [17, 15, 0, 9]},
    "gdn2": {"correct": "channel", "write": "channel"},
    "a write of one": {"write": "one", "correct": "channel", "T": 20},
    "stored, scalar decay": {"decay": "scalar", "predict": "stored", "T": 40},
    "stored, channel decay": {"predict": "stored", "correct": "channel", "lengths": [33, 2]},
    "erase alone": {"decay": "none", "erase": "token", "T": 35},
    "erase and scalar decay": {"decay": "scalar", "erase": "token", "predict": "stored", "write": "channel", "T": 35},
    "erase and channel decay": {"erase": "token", "correct": "none", "T": 35},
    "carve without content": {"erase": "token", "predict": "stored"},
    "carve": {"erase": "content", "predict": "stored", "chunk": 16},
    "carve, chunks of two tiles": {"erase": "content", "predict": "stored", "chunk": 32, "T": 57},
    "carve, chunks longer than the call": {"erase": "content", "predict": "stored", "chunk": 64, "T": 20},
    "carve, packed": {"erase": "content", "predict": "stored", "chunk": 32, "lengths": [40, 0, 1, 29]},
    "carve, three rows at different counts": {"erase": "content", "predict": "stored", "chunk": 48, "B": 3, "T": 37},
    "carve, decayed": {
        "erase": "content",
        "chunk": 16,
        "decay": "scalar",
        "correct": "channel",
        "write": "channel",
        "T": 40,
    },
    "content without decay or correction": {
        "seed": 1,
        "erase": "content",
        "chunk": 16,
        "decay": "none",
        "correct": "none",
        "T": 40,
    },
    "content over grouped heads, packed": {
        "erase": "content",
        "predict": "stored",
        "chunk": 16,
        "group": 2,
        "lengths": [21, 20],
    },
    "grouped values": {"H": 2, "group": 2, "T": 20},
    "head sizes that are no powers of two": {"K": 48, "V": 80, "T": 20},
    "value heads in blocks": {"K": 64, "V": 256, "T": 18, "B": 1, "write": "channel", "decay": "scalar"},
    "value heads in blocks, grouped": {"K": 64, "V": 240, "T": 18, "B": 1, "group": 2, "erase": "token"},
    "keys wider than values": {"K": 32, "V": 16, "T": 20},
    "no initial state": {"with_state": False, "erase": "content", "chunk": 16, "predict": "stored", "T": 40},
    "strong decays": {"strength": 50.0, "correct": "channel"},
    "strong decays, stored": {"strength": 50.0, "predict": "stored"},
    "strong scalar decays": {"strength": 50.0, "decay": "scalar", "predict": "stored"},
    "weak decays": {"strength": 0.01},
    "one repeated key, corrections of 2": {"decay": "none", "repeat_keys": True, "e_max": 2.0},
    "one token": {"T": 1, "erase": "content", "chunk": 16, "predict": "stored"},
    "no token": {"T": 0, "erase": "content", "chunk": 16},
    "no row": {"B": 0, "T": 20, "erase": "content", "chunk": 16},
    "sequences without a token": {"lengths": [0, 0], "erase": "content", "chunk": 16},
}


def problem(**words: Any) -> Problem:
    """A problem of float32 at sizes that these kernels take and the interpreter can afford."""
    return make_problem(dtype=torch.float32, **{"K": 16, "V": 32, **words})


def errors(case: Problem) -> dict[str, float]:
    """Relative errors by name against the float64 `torch` backend; gradients that underflow are held against d_v."""
    found, truth = case.results("triton"), case.to(torch.float64).results("torch")
    assert torch.equal(found.pop("count"), truth.pop("count"))
    assert found.keys() == truth.keys()
    floors = {name: truth.get("d_v") if name.startswith("d_") else None for name in truth}
    return {name: relative_error(found[name], truth[name], floors[name]) for name in truth}


CONTENT = {"erase": "content", "predict": "stored", "chunk": 16, "T": 40}
CHECKS: dict[str, Callable[[], None]] = {}


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Add a function that raises when a property does not hold."""
    CHECKS[run.__name__] = run
    return run


@check
def a_content_gate_that_reads_nothing_is_the_token_gate() -> None:
    content = problem(**CONTENT, with_state=False)
    content.tensors["up"].zero_()
    token = Problem({n: x for n, x in content.tensors.items() if n not in ("down", "up")}, None, 0, content.options)
    found, expected = (case.results("triton", ends=("o", "S")) for case in (content, token))
    assert max(relative_error(found[name], x) for name, x in expected.items() if name != "count") < 1e-6


@check
def two_runs_give_the_same_bits() -> None:
    case = problem(**CONTENT, group=2)
    assert all(torch.equal(x, y) for x, y in zip(*(case.results("triton").values() for _ in "12"), strict=True))


@check
def any_number_of_segments_gives_the_same_bits() -> None:
    for words in ({"T": 70}, {"T": 70, "erase": "content", "chunk": 16}, {"lengths": [40, 0, 30]}):
        found = []
        for segments in (None, 1, 3, 100):
            case = problem(**words)
            case.options["segments"] = segments
            found.append(case.results("triton"))
        assert all(torch.equal(x, again[name]) for again in found[1:] for name, x in found[0].items())


@check
def no_state_is_one_of_zeros_and_asking_for_the_final_one_changes_no_bit() -> None:
    packed = {"T": 24, "lengths": [5, 0, 19], "erase": "content", "chunk": 16}
    for words in ({"T": 40}, {"T": 40, "decay": "none"}, CONTENT, packed):
        for segments in (1, 3):
            case = problem(**words)
            case.options["segments"] = segments
            found = [gradients_without_ends(case, given, ends) for given in (True, False) for ends in (True, False)]
            assert all(torch.equal(x, other[n]) for other in found[1:] for n, x in found[0].items())


@check
def queries_and_keys_are_brought_to_unit_length_and_the_gradient_goes_through() -> None:
    for words in ({"K": 48, "group": 2}, {**CONTENT}, {"decay": "none", "correct": "none", "lengths": [20, 0, 3]}):
        case = problem(**words)
        case.tensors["k"] = 3 * case.tensors["k"]
        case.options["qk_l2norm"] = True
        assert max(errors(case).values()) < 1e-5


@check
def a_scale_of_zero_has_a_gradient_with_unit_queries() -> None:
    case = problem(T=20)
    case.options |= {"qk_l2norm": True, "scale": 0.0}
    results = case.results("triton")
    assert not results["o"].any()
    assert not results["d_q"].any()


@check
def any_split_into_calls_is_one_call() -> None:
    case = problem(**CONTENT)
    whole, end = case.call("triton")
    state, outputs = case.state, []
    for start, stop in ((0, 1), (1, 22), (22, 22), (22, 40)):
        piece = {n: x if n in ("down", "up") else x[:, start:stop] for n, x in case.tensors.items()}
        o, state = case.call("triton", piece, state)
        outputs.append(o)
    assert_close({"o": torch.cat(outputs, 1), **state._asdict()}, {"o": whole, **end._asdict()}, 2e-6)


@check
def inputs_of_any_layout_are_taken() -> None:
    case = problem(**CONTENT, B=2)
    expected = case.results("triton")
    for name in ("q", "v", "erase_logits"):
        case.tensors[name] = case.tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("k", "log_decay", "correct"):  # every second channel or token of something larger
        case.tensors[name] = case.tensors[name].repeat_interleave(2, 1)[:, ::2]
    case.state = case.state._replace(S=case.state.S.mT.contiguous().mT)
    o, end = case.call("triton")
    assert torch.equal(o, expected["o"])
    assert torch.equal(end.S, expected["S"])
    assert end.S.is_contiguous()


@check
def negative_views_are_what_they_say() -> None:
    case = problem(**CONTENT)
    expected = case.results("triton")
    case.tensors["v"], case.tensors["log_decay"] = (torch._neg_view(-case.tensors[n]) for n in ("v", "log_decay"))
    assert case.tensors["v"].is_neg()
    found, end = case.call("triton")
    assert torch.equal(found, expected["o"])
    assert torch.equal(end.S, expected["S"])


@check
def zeros_without_memory_are_zeros() -> None:
    leaves = problem(T=20)
    q = leaves.tensors["q"].requires_grad_()
    leaves.call("triton")[0].sgn().sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


@check
def another_default_dtype_changes_nothing() -> None:
    case = problem(**CONTENT)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    d_o = torch.randn_like(case.tensors["v"])
    expected = torch.autograd.grad(case.call("triton")[0], leaves, d_o)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = torch.autograd.grad(case.call("triton")[0], leaves, d_o)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@check
def what_is_kept_may_come_back_anywhere() -> None:
    case = problem(**CONTENT)
    expected = case.results("triton")
    for shift in (1, 2, 4, 8):

        def moved(x: torch.Tensor, shift: int = shift) -> torch.Tensor:
            if x.dtype != torch.uint8:
                return x
            room = torch.empty(x.numel() + shift, dtype=x.dtype)
            return room[shift:].copy_(x)

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved):
            found = case.results("triton")
        assert all(torch.equal(x, found[name]) for name, x in expected.items())
        # Which kernels on a GPU need, though not the interpreter.
        parts = layout({"X": ((16,), torch.float32)})
        memory = Memory({}, (parts, moved(torch.zeros(parts.size, dtype=torch.uint8))))
        assert memory.aligned
        assert (memory.addresses["X"] or 0) % 16 == 0


@check
def eager_calls_go_past_the_dispatcher_in_both_passes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = dispatched(patch, "hybridzoo::fused_delta_rule")
        problem(**CONTENT).results("triton")
        assert not asked


@check
def one_content_pair_may_be_an_expanded_view_for_all_heads() -> None:
    case = problem(**CONTENT, group=2)
    for name in ("down", "up"):
        case.tensors[name] = case.tensors[name][:1]
    views = {n: x.expand(2, -1, -1) if n in ("down", "up") else x for n, x in case.tensors.items()}
    copies = {n: x.clone() for n, x in views.items()}
    assert torch.equal(case.call("triton", views)[0], case.call("triton", copies)[0])


@check
def float16_loses_only_its_own_rounding() -> None:
    case = problem(T=40, erase="token").to(torch.float16)
    found, truth = case.results("triton"), case.to(torch.float64).results("torch")
    assert (found["o"].dtype, found["S"].dtype, found["d_q"].dtype) == (torch.float16, torch.float32, torch.float16)
    for name, expected in truth.items():
        limit = 2e-3 if name.startswith("d_") else 1e-3
        assert name == "count" or relative_error(found[name], expected, truth["d_v"]) < limit, name


@check
def full_resets_are_right_to_the_floor() -> None:
    case = problem(T=40)
    case.tensors["log_decay"][:, 7::9] = -float("inf")
    finite = case.to(torch.float64)
    finite.tensors["log_decay"].clamp_(min=-700)
    found, truth = case.results("triton"), finite.results("torch")
    assert_close(found, truth, 1e-5)


@check
def autocast_changes_nothing() -> None:
    case = problem(T=20)
    expected, _ = case.call("triton")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.call("triton")[0], expected)


@check
def a_state_is_written_in_place() -> None:
    case = problem(**CONTENT)
    expected = case.call("triton")[1]
    state = DeltaState(*(x.clone() for x in case.state))
    _, same = case.call("triton", None, state, inplace_state=True)
    assert same is state
    assert all(torch.equal(x, y) for x, y in zip(state, expected, strict=True))


@check
def what_is_not_a_packing_or_a_count_is_refused() -> None:
    case = problem(**CONTENT)
    seen = torch.full((2,), 16, dtype=torch.int32)
    for change, said in (
        ({"cu_seqlens": torch.tensor([0, 3, 2, 40])}, "must not decrease"),
        ({}, r"state\.count must"),
    ):
        x = {n: t if n in ("down", "up") else t[:1] for n, t in case.tensors.items()} if change else case.tensors
        state = DeltaState.zeros(3, 1, 16, 32, True) if change else case.state._replace(count=seen)
        with pytest.raises(ValueError, match=said):
            case.call("triton", x, state, **change)


@check
def the_operator_passes_torch_librarys_own_checks() -> None:
    from hybridzoo.kernels.fused import op

    packed = {"T": 24, "lengths": [5, 0, 19], "group": 2, "decay": "scalar", "write": "one"}
    for words in ({"T": 20}, packed, CONTENT):
        for with_state, ends in ((True, True), (False, False)):
            case = problem(**words, with_state=with_state)
            for x in case.tensors.values():
                x.requires_grad_()
            torch.library.opcheck(op._forward_op.operator, case.flat(ends))


@check
def a_compiled_call_is_one_graph_with_the_same_results() -> None:
    case = problem(**CONTENT)
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled("triton")[1], case.call("triton")[1], strict=True))
    leaves = {n: x.clone().requires_grad_() for n, x in case.tensors.items()}
    compiled("triton", leaves)[0].sum().backward()
    eager = {n: x.clone().requires_grad_() for n, x in case.tensors.items()}
    case.call("triton", eager)[0].sum().backward()
    assert all(torch.equal(x.grad, eager[n].grad) for n, x in leaves.items())


@check
def a_transform_of_torch_func_is_refused() -> None:
    for T in (5, 1):
        case = problem(T=T)

        def of_row(q: torch.Tensor, case: Problem = case) -> torch.Tensor:
            return case.call("triton", {**case.tensors, "q": q})[0]

        with pytest.raises(NotImplementedError, match=r"no transform of torch\.func, such as grad or vmap"):
            torch.func.vmap(of_row)(case.tensors["q"][None])


@check
def the_automatic_choice_on_a_cpu_stays_pytorch() -> None:
    case = problem(T=20)
    assert torch.equal(case.call("auto")[0], case.call("torch")[0])
    assert not torch.equal(case.call("auto")[0], case.call("triton")[0])


def _outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (Exception, pytest.fail.Exception):  # the latter is what pytest.raises ends with, and no Exception
        return traceback.format_exc()


def report(
    cases: Mapping[str, Any], measure: Callable[[Any], dict[str, float]], checks: Mapping[str, Callable[[], None]]
) -> None:
    """Measure every case, run every check, and print what came of them."""
    torch.use_deterministic_algorithms(True)  # so `torch.empty` and its kin are filled with NaN
    assert torch.empty(4).isnan().all()
    # A pair of tokens that is of no use may overflow before it is masked.
    warnings.filterwarnings("ignore", "(overflow|invalid value) encountered in", RuntimeWarning)
    measured = {name: _outcome(lambda words=words: measure(words)) for name, words in cases.items()}
    raised = {name: _outcome(run) for name, run in checks.items()}
    print(json.dumps({"cases": measured, "checks": raised}))


def run_apart(module: str = "interpreted") -> dict[str, dict[str, Any]]:
    """Run this file, or another one that reports, in an interpreter of its own, and return what it printed."""
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-P", "-m", module]
    out = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


if __name__ == "__main__":
    report(CASES, lambda words: errors(problem(**words)), CHECKS)
