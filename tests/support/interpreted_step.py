"""The Triton kernel of decoding on the CPU, run as a script in a process of its own, as interpreted.py is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_problems import FLAGS, Problem, assert_close, make_problem, relative_error
from interpreted import report
from registry_cases import flag_rows

from hybridzoo.kernels import DeltaState

GDN2 = {"decay": "channel", "erase": "none", "correct": "channel", "write": "channel"}
CARVE = {"decay": "channel", "erase": "content", "correct": "scalar", "write": "scalar", "predict": "stored"}
# Every row of the registry, each flag of two of them at each other value, and then what a flag alone does not show.
CASES: dict[str, dict[str, Any]] = {
    **flag_rows(),
    **{f"gdn2, {flag} {value}": {**GDN2, flag: value} for flag, values in FLAGS.items() for value in values},
    **{f"carve, {flag} {value}": {**CARVE, flag: value} for flag, values in FLAGS.items() for value in values},
    "grouped values": {**GDN2, "H": 2, "group": 3},
    "carve, grouped values": {**CARVE, "H": 2, "group": 2},
    "head sizes that are no powers of two": {**GDN2, "K": 48, "V": 80},
    "carve, head sizes that are no powers of two": {**CARVE, "K": 48, "V": 80},
    "the largest heads": {**GDN2, "K": 256, "V": 256, "B": 1},
    "carve, many blocks of value channels": {**CARVE, "K": 128, "V": 128, "B": 2},
    "keys wider than values": {"K": 64, "V": 16, "decay": "scalar"},
    "strong decays": {**GDN2, "strength": 50.0},
    "strong decays, stored": {**GDN2, "strength": 50.0, "predict": "stored"},
    "strong scalar decays": {"decay": "scalar", "strength": 50.0, "predict": "stored"},
    "carve, strong decays": {**CARVE, "strength": 50.0},
    "corrections of 2": {"decay": "none", "e_max": 2.0},
    "a fresh state": {**GDN2, "with_state": False},
    "carve, a fresh state": {**CARVE, "with_state": False},
}


def problem(T: int = 1, **words: Any) -> Problem:
    """A problem of float32; with a content gate, rows at the middle, the end and the beginning of a chunk."""
    case = make_problem(dtype=torch.float32, T=T, **{"B": 3, "K": 16, "V": 32, "chunk": 16, **words})
    if case.chunk and case.state is not None:
        case.state.count.copy_(torch.tensor([3, 15, 0])[: len(case.state.count)])
    return case


def errors(words: dict[str, Any]) -> dict[str, float]:
    """Relative errors against the float64 recurrence, of q and k as they are and of q and k brought to unit length."""
    case = problem(**words)
    found: dict[str, float] = {}
    for norm in (False, True):
        o, end = case.call("triton", qk_l2norm=norm)
        truth, true_end = case.to(torch.float64).call("reference", qk_l2norm=norm)
        assert torch.equal(end.count, true_end.count)
        pairs = zip(("o", *end._fields), (o, *end), (truth, *true_end), strict=True)
        found |= {f"{n}, {'unit' if norm else 'given'} keys": relative_error(x, y) for n, x, y in pairs if y.numel()}
    return found


CHECKS: dict[str, Callable[[], None]] = {}


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Add a function that raises when a property does not hold."""
    CHECKS[run.__name__] = run
    return run


def copied(state: DeltaState) -> DeltaState:
    return DeltaState(*(x.clone() for x in state))


def same(xs: Any, ys: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@check
def in_place_is_the_same_bit_for_bit_in_the_given_tensors() -> None:
    for words in (GDN2, CARVE, {**CARVE, "K": 48, "V": 80, "H": 2, "group": 2}):
        case = problem(**words)
        before = copied(case.state)
        o, end = case.call("triton")
        assert same(case.state, before)
        state = copied(before)
        fields = tuple(state)
        o_in_place, given = case.call("triton", None, state, inplace_state=True)
        assert given is state
        assert all(x is y for x, y in zip(given, fields, strict=True))
        assert torch.equal(o_in_place, o)
        assert same(state, end)
        assert not torch.equal(state.S, before.S)


@check
def a_sequence_decoded_token_by_token_is_one_call() -> None:
    for words in (GDN2, CARVE, {**CARVE, "H": 2, "group": 2}, {"decay": "scalar", "erase": "token", "strength": 50.0}):
        case = problem(T=40, **words)
        truth, true_end = case.to(torch.float64).call("torch", qk_l2norm=True)
        state, outputs = copied(case.state), []
        for t in range(40):
            token = {n: x if n in ("down", "up") else x[:, t : t + 1] for n, x in case.tensors.items()}
            o, _ = case.call("triton", token, state, inplace_state=True, qk_l2norm=True, return_state=False)
            outputs.append(o)
        found, expected = ({"o": o, **end._asdict()} for o, end in ((torch.cat(outputs, 1), state), (truth, true_end)))
        assert_close(*({n: x for n, x in ends.items() if x.numel()} for ends in (found, expected)), tolerance=1e-5)


@check
def a_content_gate_that_reads_nothing_is_the_token_gate_bit_for_bit() -> None:
    content = problem(**CARVE, K=32, V=80)
    content.tensors["up"].zero_()
    tensors = {n: x for n, x in content.tensors.items() if n not in ("down", "up")}
    state = DeltaState.zeros(3, 1, 32, 80)._replace(S=content.state.S)
    (o, end), (o_token, end_token) = content.call("triton"), Problem(tensors, state, 0, content.options).call("triton")
    assert torch.equal(o, o_token)
    assert torch.equal(end.S, end_token.S)


@check
def inputs_and_states_of_any_layout_are_taken() -> None:
    case = problem(**CARVE, H=2, group=2)
    expected, end = case.call("triton")
    case.tensors["q"] = case.tensors["q"].transpose(2, 3).contiguous().transpose(2, 3)
    for name in ("k", "v", "log_decay", "correct", "erase_logits", "write"):  # every second row of something larger
        case.tensors[name] = case.tensors[name].repeat_interleave(2, 0)[::2]
    for name in ("down", "up"):
        case.tensors[name] = case.tensors[name].mT.contiguous().mT
    state = DeltaState(
        S=case.state.S.mT.contiguous().mT,
        # Two halves of one tensor, the one beside the other.
        **dict(zip(("o_sum", "o_mean"), torch.cat(case.state[1:3], 2).chunk(2, 2), strict=True)),
        count=case.state.count.repeat_interleave(2)[::2],
    )
    assert not any(x.is_contiguous() for x in (*state, case.tensors["q"], case.tensors["up"]))
    o, new = case.call("triton", None, state)
    assert torch.equal(o, expected)
    assert same(new, end)
    assert all(x.is_contiguous() for x in new)
    o, _ = case.call("triton", None, state, inplace_state=True)
    assert torch.equal(o, expected)
    assert same(state, end)


@check
def a_state_whose_places_share_memory_is_refused_in_place_and_left_alone() -> None:
    case = problem(**CARVE)
    S, o_sum, o_mean, count = case.state
    both = torch.randn(4, 1, 32)
    for state, said in (
        (DeltaState(S[:1].expand(3, -1, -1, -1), o_sum, o_mean, count), r"state\.S: with strides .* expanded"),
        (DeltaState(S, o_sum, o_mean, count[:1].expand(3)), r"state\.count: with strides"),
        (DeltaState(S, o_sum, o_sum, count), r"state\.(o_sum|o_mean) and state\.(o_sum|o_mean) into the same memory"),
        (DeltaState(S, both[:3], both[1:], count), r"state\.o_sum and state\.o_mean into the same memory"),
    ):
        before = copied(state)
        with pytest.raises(ValueError, match=said):
            case.call("triton", None, state, inplace_state=True)
        assert same(state, before)
        assert torch.equal(case.call("triton", None, state)[0], case.call("triton", None, before)[0])


@check
def one_content_pair_may_be_an_expanded_view_for_all_heads() -> None:
    case = problem(**CARVE, H=2, group=2)
    for dtype in (torch.float32, torch.float16):
        pair = {name: case.tensors[name][:1].to(dtype) for name in ("down", "up")}
        views = {**case.tensors, **{name: x.expand(4, -1, -1) for name, x in pair.items()}}
        copies = {name: x.contiguous() for name, x in views.items()}
        assert torch.equal(case.call("triton", views)[0], case.call("triton", copies)[0])


@check
def a_gradient_to_come_takes_the_way_of_sequences() -> None:
    case = problem(**CARVE)
    leaves = {n: x.clone().requires_grad_() for n, x in case.tensors.items()}
    case.call("triton", leaves, qk_l2norm=True)[0].sum().backward()
    assert all(x.grad is not None for x in leaves.values())
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        case.call("triton", leaves, copied(case.state), inplace_state=True)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            o, _ = case.call("triton", leaves, copied(case.state), inplace_state=True, qk_l2norm=True)
        assert not o.requires_grad
        assert torch.equal(o, case.call("triton", qk_l2norm=True)[0])


@check
def autograd_learns_of_a_state_written_in_place() -> None:
    case = problem(**CARVE)
    state, weight = copied(case.state), torch.ones((), requires_grad=True)
    losses = [(x * weight).sum() for x in state[:3]]
    with torch.no_grad():
        case.call("triton", None, state, inplace_state=True)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@check
def a_decay_below_the_floor_is_the_floor() -> None:
    case = problem(**GDN2)
    outputs = []
    for decay in (-20.0, -21.0, -float("inf")):
        case.tensors["log_decay"][:, :, :, ::3] = decay
        outputs.append(case.call("triton"))
    assert all(torch.equal(o, outputs[0][0]) and same(end, outputs[0][1]) for o, end in outputs)


@check
def float16_loses_only_its_own_rounding() -> None:
    case = problem(**CARVE).to(torch.float16)
    (o, end), (truth, true_end) = case.call("triton"), case.to(torch.float64).call("reference")
    assert (o.dtype, end.S.dtype, end.o_sum.dtype) == (torch.float16, torch.float32, torch.float32)
    assert relative_error(o, truth) < 1e-3
    assert_close(end._asdict(), true_end._asdict(), 1e-5)


@check
def autocast_changes_nothing() -> None:
    case = problem(**CARVE)
    expected, end = case.call("triton", qk_l2norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, new = case.call("triton", qk_l2norm=True)
    assert torch.equal(o, expected)
    assert same(new, end)


@check
def a_count_outside_the_chunk_is_refused() -> None:
    case = problem(**CARVE)
    case.state.count[1] = 16
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"state\.count must lie in 0 to 15"):
            case.call("triton", inplace_state=inplace)


@check
def no_sequence_is_no_work() -> None:
    case = problem(**CARVE)
    tensors = {n: x if n in ("down", "up") else x[:0] for n, x in case.tensors.items()}
    for inplace in (False, True):
        o, end = case.call("triton", tensors, DeltaState(*(x[:0] for x in case.state)), inplace_state=inplace)
        assert o.shape == (0, 1, 1, 32)
        assert end.S.shape == (0, 1, 16, 32)


@check
def the_operators_pass_torch_librarys_own_checks() -> None:
    from hybridzoo.kernels.fused import step_op

    names = ("q", "k", "v", "log_decay", "erase_logits", "down", "up", "correct", "write")
    for words in (GDN2, CARVE):
        case = problem(**words, H=2, group=2)
        inputs = tuple(case.tensors.get(n) for n in names)
        options = (words is CARVE, True, 0.5, case.chunk)
        torch.library.opcheck(step_op._step_op.operator, (*inputs, *copied(case.state), *options))
        torch.library.opcheck(step_op._in_place_op.operator, (*inputs, *copied(case.state), *options))


@check
def a_compiled_step_in_place_is_one_graph_with_the_same_results() -> None:
    for words in (GDN2, CARVE):
        case = problem(**words)

        def step(state: DeltaState, case: Problem = case) -> torch.Tensor:
            return case.call("triton", None, state, inplace_state=True, qk_l2norm=True)[0] * 2

        states = copied(case.state), copied(case.state)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            assert torch.equal(compiled(states[0]), step(states[1]))
            assert same(*states)


if __name__ == "__main__":
    report(CASES, errors, CHECKS)
