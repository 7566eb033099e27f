"""The recurrence's fast path against the token loop, and the identities that hold for any backend."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from delta_problems import FLAGS, Problem, assert_close, make_problem, problems, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridzoo.kernels import ContentGate, DeltaState, gated_delta_rule

BACKENDS = ("torch", "reference")
CONTENT_ROWS = [
    {"decay": "channel", "erase": "content", "predict": "stored"},
    {"decay": "scalar", "erase": "content", "predict": "decayed", "correct": "channel"},
    {"decay": "none", "erase": "content", "correct": "none", "write": "channel"},
]


@settings(max_examples=120)
@given(problem=problems())
def test_the_chunkwise_form_is_the_recurrence_in_float64(problem: Problem) -> None:
    assert_close(problem.results("torch"), problem.results("reference"), 1e-12)


@settings(max_examples=40)
@given(problem=problems(K=7, V=6))
def test_the_chunkwise_form_in_float32_stays_within_its_tolerance(problem: Problem) -> None:
    # Inputs are rounded first, so that both see the same problem. A state of one number is left to float64: its
    # gradient is a single sum that may cancel, and then no relative error of it is small. So is one token: what it
    # reads of itself is the product of `q k`, a single sum, with its value.
    assume(problem.tensors["q"].shape[:3].numel() > 1)
    single = problem.to(torch.float32)
    assert_close(single.results("torch"), single.to(torch.float64).results("reference"), 4e-6)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("predict", ["decayed", "stored"])
def test_log_decays_of_minus_50_a_token_and_full_resets_are_exact(decay: str, predict: str) -> None:
    problem = make_problem(decay=decay, predict=predict, T=100, dtype=torch.float32)
    decays = problem.tensors["log_decay"]
    decays.fill_(-50.0)
    decays[:, 7::9] = -0.01
    decays[:, 40:45] = -float("inf")
    found = problem.results("torch")
    assert all(torch.isfinite(x).all() for x in found.values())
    finite = problem.to(torch.float64)
    finite.tensors["log_decay"].clamp_(min=-700)  # the token loop's own gradient of exp(-inf) * inf is NaN
    assert_close(found, finite.results("reference"), 4e-6)


def test_one_repeated_key_keeps_float32_accuracy() -> None:
    problem = make_problem(decay="none", T=256, K=64, V=64, repeat_keys=True, e_max=2.0, dtype=torch.float32)
    assert_close(problem.results("torch"), problem.to(torch.float64).results("reference"), 2e-5)


def test_reflections_by_one_key_for_a_whole_sequence_lose_no_more_than_their_number() -> None:
    # e = 2 at every token turns the state about and about, and nothing forgets: rounding adds up with the length.
    problem = make_problem(decay="none", T=256, K=64, V=64, repeat_keys=True, dtype=torch.float32)
    problem.tensors["correct"] = torch.full_like(problem.tensors["correct"], 2.0)
    assert_close(problem.results("torch"), problem.to(torch.float64).results("reference"), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    problem = make_problem(erase="content", T=40, dtype=torch.float32)
    o, end = problem.call(backend)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_end = problem.call(backend)
    for x, y in zip((o, *end), (found, *found_end), strict=True):
        assert torch.equal(x, y)


def test_states_laid_out_in_another_order_give_the_operators_own_layout() -> None:
    problem = make_problem(T=20, dtype=torch.float32)
    turned = problem.state.S.mT.contiguous().mT
    _, end = problem.call("torch", state=problem.state._replace(S=turned))
    assert end.S.is_contiguous()
    assert torch.equal(end.S, problem.call("torch")[1].S)


@pytest.mark.parametrize("dtype, output, gradient", [(torch.bfloat16, 6e-3, 1.5e-2), (torch.float16, 1e-3, 2e-3)])
def test_sixteen_bit_inputs_lose_only_their_own_rounding(dtype: torch.dtype, output: float, gradient: float) -> None:
    problem = make_problem(T=130, K=32, V=32, erase="token", dtype=dtype)
    found, truth = problem.results("torch"), problem.to(torch.float64).results("reference")
    assert (found["o"].dtype, found["S"].dtype) == (dtype, torch.float32)
    for name, expected in truth.items():
        limit = gradient if name.startswith("d_") else output
        assert name == "count" or relative_error(found[name], expected, truth["d_v"]) < limit, name


@settings(max_examples=60)
@given(problem=problems(), backend=st.sampled_from(BACKENDS), data=st.data())
def test_any_split_into_calls_equals_one_call(problem: Problem, backend: str, data: st.DataObject) -> None:
    if problem.options["cu_seqlens"] is not None:
        return
    T = problem.tensors["q"].shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=3), label="cuts"))
    whole, end = problem.call(backend)
    state, outputs = problem.state, []
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        piece = {n: x if n in ("down", "up") else x[:, start:stop] for n, x in problem.tensors.items()}
        o, state = problem.call(backend, piece, state)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-12
    for field, x, y in zip(end._fields, state, end, strict=True):
        assert relative_error(x, y) < 1e-12, field
    assert torch.equal(state.count, end.count)


@settings(max_examples=60)
@given(problem=problems(lengths=[3, 0, 64, 21]), backend=st.sampled_from(BACKENDS))
def test_packed_sequences_equal_the_sequences_one_by_one(problem: Problem, backend: str) -> None:
    packed, end = problem.call(backend)
    bounds = problem.options["cu_seqlens"].tolist()
    for n, (start, stop) in enumerate(pairwise(bounds)):
        piece = {m: x if m in ("down", "up") else x[:, start:stop] for m, x in problem.tensors.items()}
        state = None if problem.state is None else DeltaState(*(x[n : n + 1] for x in problem.state))
        o, alone = problem.call(backend, piece, state, cu_seqlens=None)
        assert o.numel() == 0 or relative_error(packed[:, start:stop], o) < 1e-12
        for field, x, y in zip(end._fields, end, alone, strict=True):
            assert relative_error(x[n : n + 1], y) < 1e-12, field


@pytest.mark.parametrize("row", CONTENT_ROWS, ids=str)
@pytest.mark.parametrize("decay", FLAGS["decay"])
def test_a_changed_suffix_leaves_earlier_outputs_alone(row: dict[str, str], decay: str) -> None:
    problem = make_problem(**{**row, "decay": decay}, T=192, with_state=False, dtype=torch.float32)
    before, _ = problem.call("torch")
    for start in (64, 128, 150):
        changed = {n: x.clone() for n, x in problem.tensors.items()}
        for name, x in changed.items():
            if name not in ("down", "up"):
                x[:, start:] = x[:, start:].flip(1)
        after, _ = problem.call("torch", changed)
        if start % 64 == 0:
            assert torch.equal(before[:, :start], after[:, :start])
        assert relative_error(after[:, :start], before[:, :start]) < 1e-6
        assert not torch.equal(before[:, start:], after[:, start:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [64, 128])
def test_a_content_gate_that_reads_nothing_is_the_token_gate_bit_for_bit(backend: str, chunk: int) -> None:
    content = make_problem(erase="content", predict="stored", chunk=chunk, T=200, with_state=False, dtype=torch.float32)
    content.tensors["up"].zero_()
    token = Problem({n: x for n, x in content.tensors.items() if n not in ("down", "up")}, None, 0, content.options)
    found, expected = (problem.results(backend, ends=("o", "S")) for problem in (content, token))
    for name, x in expected.items():
        if name != "count":
            assert torch.equal(found[name], x), name


def test_a_decayed_prediction_turns_the_erase_mask_into_a_decay() -> None:
    erased = make_problem(erase="token")
    folded = dict(erased.tensors)
    folded["log_decay"] = folded["log_decay"] - torch.nn.functional.softplus(folded.pop("erase_logits"))
    assert relative_error(erased.call("torch")[0], erased.call("torch", folded)[0]) < 1e-13


def test_tied_channel_gates_are_scalar_gates() -> None:
    problem = make_problem(decay="scalar")
    wide = dict(problem.tensors)
    for name in ("log_decay", "correct"):
        wide[name] = wide[name][..., None].expand(*wide[name].shape, problem.tensors["k"].shape[-1])
    wide["write"] = wide["write"][..., None].expand_as(wide["v"])
    assert relative_error(problem.call("torch", wide)[0], problem.call("torch")[0]) < 1e-13


def test_without_a_correction_it_is_a_decayed_sum_over_pairs() -> None:
    problem = make_problem(B=1, T=40, decay="scalar", correct="none", with_state=False)
    q, k, v, g, w = (problem.tensors[n] for n in ("q", "k", "v", "log_decay", "write"))
    G = g.cumsum(1)[0, :, 0]
    decays = (G[:, None] - G[None, :]).exp().tril()
    expected = ((q[0, :, 0] @ k[0, :, 0].T) * decays) @ (w[..., None] * v)[0, :, 0] / q.shape[-1] ** 0.5
    assert relative_error(problem.call("torch")[0][0, :, 0], expected) < 1e-13


def test_normalising_inside_the_op_is_normalising_before_it() -> None:
    problem = make_problem()
    scaled = dict(problem.tensors)
    scaled["k"] = 3 * scaled["k"]
    normed = {n: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) if n in "qk" else x for n, x in scaled.items()}
    inside, outside = problem.call("torch", scaled, qk_l2norm=True)[0], problem.call("torch", normed)[0]
    assert relative_error(inside, outside) < 1e-12


def test_a_state_written_in_place_is_the_state_returned() -> None:
    problem = make_problem(erase="content", T=5)
    expected = problem.call("torch")[1]
    state = DeltaState(*(x.clone() for x in problem.state))
    _, same = problem.call("torch", None, state, inplace_state=True)
    assert same is state
    assert all(torch.equal(x, y) for x, y in zip(state, expected, strict=True))
    leaves = {n: x.requires_grad_() for n, x in problem.tensors.items()}
    with pytest.raises(ValueError, match="no_grad"):
        problem.call("torch", leaves, state, inplace_state=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_call_returns_the_state_it_was_given(backend: str) -> None:
    problem = make_problem(erase="content", T=0)
    o, state = problem.call(backend)
    assert o.shape == (2, 0, 1, 8)
    assert all(torch.equal(x, y) for x, y in zip(state, problem.state, strict=True))


def test_the_value_axis_erase_runs_on_the_reference_and_nowhere_else() -> None:
    problem = make_problem(T=6)
    mask = torch.full((2, 6, 1, 8), -800.0, dtype=torch.float64)  # erases nothing
    assert torch.equal(problem.call("reference", erase_value=mask)[0], problem.call("reference")[0])
    gone = problem.call("reference", erase_value=-mask)[0]  # erases everything before each token
    assert not torch.allclose(gone, problem.call("reference")[0])
    with pytest.raises(ValueError, match="no chunkwise form with one shared solve"):
        problem.call("torch", erase_value=mask)


def _inputs(**changes: object) -> dict[str, object]:
    x = torch.zeros(2, 5, 2, 4)
    return {"q": x, "k": x, "v": torch.zeros(2, 5, 4, 3), **changes}


FRESH = DeltaState.zeros(2, 4, 4, 3)
GATE = ContentGate(torch.zeros(4, 2, 3), torch.zeros(4, 4, 2))
BAD = [
    ({"q": torch.zeros(2, 5, 4)}, ValueError, r"q and v must be \[B, T, heads, dim\]"),
    ({"k": torch.zeros(2, 5, 2, 3)}, ValueError, r"k must be \[2, 5, 2, 4\], got \[2, 5, 2, 3\]"),
    ({"v": torch.zeros(2, 5, 3, 3)}, ValueError, "v has 3 heads, which is not a multiple of the 2 heads"),
    ({"v": torch.zeros(2, 5, 4, 3).double()}, TypeError, "must share a dtype"),
    ({"q": torch.zeros(2, 5, 2, 4).int()}, TypeError, "q must be floating point"),
    ({"log_decay": torch.zeros(2, 5, 4, 3)}, ValueError, r"log_decay must be \[2, 5, 4\] or \[2, 5, 4, 4\]"),
    ({"write": torch.zeros(2, 5, 4, 4)}, ValueError, r"write must be \[2, 5, 4\] or \[2, 5, 4, 3\]"),
    ({"predict": "past"}, ValueError, "predict must be 'decayed' or 'stored'"),
    ({"backend": "tritn"}, ValueError, "backend must be one of"),
    ({"segments": 0}, ValueError, "segments must be a whole number, at least 1"),
    ({"content": GATE}, ValueError, "content needs erase_logits"),
    ({"segments": 1.5}, ValueError, "segments must be a whole number"),
    ({"scale": torch.ones(())}, TypeError, "scale must be a number, got Tensor; multiply q by a scale"),
    ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    ({"state": (1, 2)}, TypeError, "state must be a DeltaState, got tuple"),
    ({"state": FRESH._replace(o_sum=None)}, TypeError, "state.o_sum must be a tensor, got NoneType"),
    ({"content": (1, 2)}, TypeError, "content must be a ContentGate, got tuple"),
    ({"content": GATE._replace(chunk=4.0), "erase_logits": torch.zeros(2, 5, 4, 4)}, ValueError, "whole number of"),
    ({"v": torch.zeros(2, 5, 4, 0)}, ValueError, "head sizes must be at least 1, got K = 4 and V = 0"),
    ({"inplace_state": True}, ValueError, "needs a state to write into"),
    ({"state": FRESH._replace(S=torch.zeros(3, 4, 4, 3))}, ValueError, r"state.S must be .* for 2 sequences"),
    ({"state": FRESH._replace(S=FRESH.S.double())}, TypeError, "state.S must be torch.float32"),
    (
        {"state": FRESH, "content": GATE, "erase_logits": torch.zeros(2, 5, 4, 4)},
        ValueError,
        "must come from a call with a content gate",
    ),
    ({"state": DeltaState.zeros(2, 4, 4, 3, content=True)}, ValueError, "from a call without a content gate"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "B must be 1, got 2"),
    ({"q": torch.zeros(2, 5, 2, 4, device="meta")}, ValueError, "is on cpu, but q is on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_refused_by_name(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_delta_rule(**_inputs(**change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bounds", "message"),
    [([1, 5], "start at 0"), ([0, 4], "end at T = 5"), ([0, 3, 2, 5], "must not decrease, got 3 then 2")],
)
def test_bounds_that_are_not_a_packing_are_refused(backend: str, bounds: list[int], message: str) -> None:
    x = torch.zeros(1, 5, 1, 4)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(x, x, x, cu_seqlens=torch.tensor(bounds), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_outside_its_chunk_is_refused(backend: str) -> None:
    problem = make_problem(erase="content", T=5)
    with pytest.raises(ValueError, match=r"state\.count must lie in 0 to 63"):
        problem.call(backend, state=problem.state._replace(count=torch.full((2,), 64, dtype=torch.int32)))


@pytest.mark.parametrize("ends", [True, False], ids=["final state", "no final state"])
@pytest.mark.parametrize("with_state", [True, False], ids=["given", "fresh"])
@pytest.mark.parametrize("erase", ["content", "token"])
def test_the_operator_passes_torch_librarys_own_checks(erase: str, with_state: bool, ends: bool) -> None:
    from hybridzoo.kernels import chunkwise_op

    problem = make_problem(erase=erase, T=20, with_state=with_state, dtype=torch.float32)
    for x in problem.tensors.values():
        x.requires_grad_()
    torch.library.opcheck(chunkwise_op._forward_op.operator, problem.flat(ends))


def test_a_compiled_call_is_one_graph_with_the_same_results() -> None:
    problem = make_problem(erase="content", T=70, dtype=torch.float32)
    compiled = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled("torch")[1], problem.call("torch")[1], strict=True):
        assert torch.equal(x, y)


def test_what_was_exported_without_a_gradient_has_one_later() -> None:
    problem = make_problem(T=20, with_state=False)

    class Rule(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return problem.call("torch", {**problem.tensors, "q": q})[0]

    q = problem.tensors["q"]
    with torch.no_grad():
        exported = torch.export.export(Rule(), (q,)).module()
    leaf = q.clone().requires_grad_()
    exported(leaf).sum().backward()
    again = q.clone().requires_grad_()
    Rule()(again).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, again.grad)


def test_a_tangent_is_refused_where_it_would_be_lost_and_goes_through_the_reference():
    problem = make_problem(T=5, B=1)
    q = problem.tensors["q"]

    def run(backend: str) -> Any:
        def of_q(x: torch.Tensor) -> torch.Tensor:
            return problem.call(backend, {**problem.tensors, "q": x})[0]

        return torch.func.jvp(of_q, (q,), (torch.ones_like(q),))

    with pytest.raises(NotImplementedError, match="reverse mode only"):
        run("torch")
    o, tangent = run("reference")
    moved = problem.call("torch", {**problem.tensors, "q": q + 1})[0]  # the output is linear in q
    assert_close({"o": tangent}, {"o": moved - o}, 1e-12)


def test_a_transform_of_torch_func_is_refused_and_goes_through_the_reference():
    problem = make_problem(T=5, B=3)

    def of_rows(backend: str) -> torch.Tensor:
        def one(q: torch.Tensor) -> torch.Tensor:
            row = Problem({**problem.tensors, "q": q[None]}, None, 0, problem.options)
            row.tensors = {n: x if n == "q" else x[:1] for n, x in row.tensors.items()}
            return row.call(backend)[0].sum()

        return torch.func.vmap(torch.func.grad(one))(problem.tensors["q"])

    gradients = of_rows("reference")
    assert torch.isfinite(gradients).all()
    assert gradients.shape == problem.tensors["q"].shape
    with pytest.raises(NotImplementedError, match=r"no transform of torch\.func, such as grad or vmap"):
        of_rows("torch")


def test_a_second_derivative_is_refused_and_goes_through_the_reference():
    problem = make_problem(T=5, B=1)

    def second(backend: str) -> torch.Tensor:
        k = problem.tensors["k"].clone().requires_grad_()
        o, _ = problem.call(backend, {**problem.tensors, "k": k})
        (first,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
        return torch.autograd.grad(first.square().sum() + k.sum(), k)[0]

    assert second("reference").abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        second("torch")
