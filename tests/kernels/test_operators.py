"""Whoever looks at calls sees operators; where nobody does, a call is the same and shorter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_problems import make_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.kernels import chunkwise_op, operators

NAME = "hybridzoo::chunkwise_delta_rule"


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_a_mode_sees_both_passes() -> None:
    with Seen() as seen:
        make_problem().results("torch")
    assert [name for name in seen.names if name.startswith("hybridzoo")] == [NAME, f"{NAME}_backward"]


def test_a_profiler_sees_both_passes() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        make_problem().results("torch")
    assert {NAME, f"{NAME}_backward"} <= {event.name for event in profiled.events()}


def test_a_tracer_sees_one_call() -> None:
    problem = make_problem()

    def run(q: Tensor) -> Tensor:
        return problem.call("torch", {**problem.tensors, "q": q})[0]

    graph = make_fx(run)(problem.tensors["q"])
    assert "torch.ops.hybridzoo.chunkwise_delta_rule.default(" in graph.code


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        make_problem().call("torch")
    assert counter.get_total_flops() > 0


def test_tensors_without_memory_get_shapes() -> None:
    problem = make_problem(with_state=False)
    empty = {name: x.to("meta") for name, x in problem.tensors.items()}
    o, _ = problem.call("torch", empty)
    assert (o.device.type, o.shape) == ("meta", problem.call("torch")[0].shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x) for name, x in problem.tensors.items()}
        assert problem.call("torch", fakes)[0].shape == o.shape


@pytest.mark.parametrize("words", [{}, {"erase": "content", "predict": "stored", "chunk": 16}])
def test_where_nobody_looks_a_call_is_the_same(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(**words)
    dispatched = list[str]()
    operator = chunkwise_op._forward_op.operator

    def counted(*arguments: Any) -> Any:
        dispatched.append(operator.name())
        return operator(*arguments)

    monkeypatch.setattr(chunkwise_op._forward_op, "operator", counted)
    plain = problem.results("torch")
    assert not dispatched
    monkeypatch.setattr(operators, "_watched", lambda arguments: True)
    for name, x in problem.results("torch").items():
        assert torch.equal(x, plain[name]), name
    assert dispatched
