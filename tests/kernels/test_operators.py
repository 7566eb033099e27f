"""Whoever looks at calls sees operators; where nobody does, a call is the same and shorter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_problems import make_problem
from dispatched import dispatched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.kernels import operators

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
    assert torch.ops.hybridzoo.chunkwise_delta_rule in counter.get_flop_counts()["Global"]


def test_tensors_without_memory_get_shapes() -> None:
    problem = make_problem(with_state=False)
    empty = {name: x.to("meta") for name, x in problem.tensors.items()}
    o, _ = problem.call("torch", empty)
    assert (o.device.type, o.shape) == ("meta", problem.call("torch")[0].shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x) for name, x in problem.tensors.items()}
        assert problem.call("torch", fakes)[0].shape == o.shape


class OfAnotherKind(Tensor):
    """A subclass that changes nothing."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def within(manager: Any) -> Callable[[Callable[[Tensor], Tensor]], object]:
    def look(probe: Callable[[Tensor], Tensor]) -> None:
        with manager():
            probe(torch.ones(2, 2))

    return look


def transformed(transform: Callable[..., Any]) -> Callable[[Callable[[Tensor], Tensor]], object]:
    return lambda probe: transform(probe)(torch.ones(2, 2))


def unsaid(probe: Callable[[Tensor], Tensor]) -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.profiler, "_is_profiler_enabled", False)
        probe(torch.ones(2, 2))


# Who looks at calls, each with a function that has it look at the call of a probe.
LOOKS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "a dispatch mode": within(Seen),
    "a function mode": within(Functions),
    "the mode of fake tensors": within(FakeTensorMode),
    "a profiler": within(lambda: profile(activities=[ProfilerActivity.CPU], acc_events=True)),
    "a profiler that Python has not started": lambda probe: unsaid(probe),
    "a profiler of all threads": within(
        lambda: profile(
            activities=[ProfilerActivity.CPU],
            acc_events=True,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
    ),
    "autograd's profiler": within(torch.autograd.profiler.profile),
    "a tracer": transformed(make_fx),
    "the tracer of TorchScript": lambda probe: torch.jit.trace(probe, torch.ones(2, 2), check_trace=False),
    "vmap": transformed(torch.vmap),
    "grad": lambda probe: torch.func.grad(lambda x: probe(x).sum())(torch.ones(2, 2)),
    "functionalize": transformed(torch.func.functionalize),
    "a gradient in a batch": transformed(torch._vmap_internals._vmap),
    "whoever keeps autograd out": within(torch._C._AutoDispatchBelowAutograd),
    "no memory": lambda probe: probe(torch.ones(2, device="meta")),
    "zeros without memory": lambda probe: probe(torch._efficientzerotensor(2)),
    "a negative view": lambda probe: probe(torch._neg_view(torch.ones(2))),
    "a subclass": lambda probe: probe(torch.ones(2).as_subclass(OfAnotherKind)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whoever_looks_is_known(look: Callable[[Callable[[Tensor], Tensor]], object]) -> None:
    seen: list[bool] = []

    def probe(x: Tensor) -> Tensor:
        seen.append(operators._watched((x, None, True, 0.5)))
        seen.append(operators._watched((torch.ones(2), None, [torch.ones(2), x])))
        return x.clone()

    look(probe)
    assert seen
    assert all(seen)


def test_nobody_looks_in_whatever_training_and_inference_are_made_of() -> None:
    seen = []

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(operators._watched((x,)))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            seen.append(operators._watched((d, None, [d])))
            return d

    x = torch.nn.Parameter(torch.ones(2))
    Backward.apply(x).sum().backward()
    with torch.autocast("cpu"), torch.autograd.set_multithreading_enabled(False):
        Backward.apply(x).sum().backward()
    for manager in (torch.no_grad, torch.inference_mode):
        with manager():
            seen.append(operators._watched((x, torch.ones(2), None, 1, 0.5, False, [x])))
    assert seen == [False] * 6


@pytest.mark.parametrize("words", [{}, {"erase": "content", "predict": "stored", "chunk": 16}])
def test_where_nobody_looks_a_call_is_the_same(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(**words)
    asked = dispatched(monkeypatch, NAME)
    plain = problem.results("torch")
    assert not asked
    monkeypatch.setattr(operators, "_watched", lambda arguments: True)
    for name, x in problem.results("torch").items():
        assert torch.equal(x, plain[name]), name
    assert asked == [NAME, NAME, f"{NAME}_backward"]  # by autograd, and below it
