"""torch.compile of whole models: one graph, no break, and what comes out is what comes out without it.

Graphs are traced, and their backward derived and run, by the backend aot_eager: whatever would break a graph breaks it
there, in one to four seconds a model. The code generator behind the default backend, inductor, takes 25 to 70 seconds a
model on two cores and needs a C++ compiler, so it runs once, on a stack that holds both kinds of mixer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from hybridzoo.architectures import HybridLM

Shallow = Callable[..., HybridLM]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def random_ids(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def assert_compiles_to_equal_results(model: HybridLM, backend: str) -> None:
    ids = random_ids(model.spec.vocab_size, 2, 66)
    eager = model(ids, labels=ids).loss
    expected = torch.autograd.grad(eager, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids).loss
    actual = torch.autograd.grad(compiled, list(model.parameters()))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for (name, _), got, want in zip(model.named_parameters(), actual, expected, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-7, name


def test_every_tiny_spec_compiles_whole_with_equal_loss_and_gradients(tiny_spec: str, shallow: Shallow) -> None:
    assert_compiles_to_equal_results(shallow(tiny_spec, dtype=torch.float32), "aot_eager")


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.mark.slow
def test_a_hybrid_compiles_whole_to_machine_code_with_equal_loss_and_gradients(shallow: Shallow) -> None:
    model = shallow("carve-hybrid-tiny", dtype=torch.float32)
    assert_compiles_to_equal_results(model, "inductor" if has_compiler() else "aot_eager")


def test_packed_sequences_compile_whole(shallow: Shallow) -> None:
    model = shallow("carve-hybrid-tiny", dtype=torch.float32)
    ids, bounds = random_ids(256, 1, 70), torch.tensor([0, 3, 3, 66, 70], dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(ids, labels=ids, cu_seqlens=bounds)
    traced = compiled(ids, labels=ids, cu_seqlens=bounds)
    torch.testing.assert_close((traced.loss, traced.logits), (eager.loss, eager.logits), rtol=1e-4, atol=1e-4)


def test_without_a_state_packed_training_makes_no_keys_for_each_sequence(shallow: Shallow) -> None:
    """A compiler knows no lengths: a state of N sequences would hold N times the keys of the whole row."""
    model = shallow("carve-hybrid-tiny", ["mixers.a.window=null"], dtype=torch.float32)
    ids, bounds = random_ids(256, 1, 70), torch.tensor([0, 3, 3, 9, 66, 70], dtype=torch.int32)
    made: list[torch.Size] = []

    def seen(graph: torch.fx.GraphModule, inputs: object) -> object:
        values = [node.meta.get("val") for node in graph.graph.nodes]
        made.extend(value.shape for value in values if isinstance(value, Tensor))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=seen))
    per_sequence = {}
    for wanted in (True, False):
        made.clear()
        out = compiled(ids, labels=ids, cu_seqlens=bounds, return_state=wanted)
        assert (out.state is not None) == wanted
        torch.testing.assert_close(out.loss, model(ids, labels=ids, cu_seqlens=bounds).loss, rtol=1e-5, atol=1e-6)
        per_sequence[wanted] = [shape for shape in made if tuple(shape[:2]) == (5, 70)]
    assert per_sequence[True]
    assert not per_sequence[False]


@torch.no_grad()
def test_one_token_after_a_state_compiles_whole(shallow: Shallow) -> None:
    model = shallow("carve-hybrid-tiny", dtype=torch.float32)
    ids = random_ids(256, 2, 20)
    state = model(ids[:, :-1]).state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids[:, -1:], state=state).logits, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4
    )


def test_a_graph_that_breaks_would_be_seen(shallow: Shallow) -> None:
    model = shallow("transformer-tiny", dtype=torch.float32)
    model.norm.register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_compiles_to_equal_results(model, "aot_eager")


def test_going_on_from_a_state_compiles_whole_under_a_max_context(shallow: Shallow) -> None:
    model = shallow("carve-hybrid-tiny", ["max_context=64"])
    with torch.no_grad():
        state = model(random_ids(256, 2, 9)).state
    more = random_ids(256, 2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(more, state=state).logits, model(more, state=state).logits)
