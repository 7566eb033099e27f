"""Norms: their defining equations, precision and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels.norms import gated_rms_norm, l2_norm, rms_norm


def test_rms_norm_agrees_with_torch() -> None:
    x, weight = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(rms_norm(x, None, 1e-5), F.rms_norm(x, (8,), None, 1e-5))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_the_gate_stands_on_the_side_that_is_asked_for(activation: str) -> None:
    x, gate, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 8), (2, 3, 8), (8,)))
    opened = {"silu": F.silu, "sigmoid": torch.sigmoid}[activation](gate)
    after = gated_rms_norm(x, gate, weight, 1e-5, activation)
    before = gated_rms_norm(x, gate, weight, 1e-5, activation, norm_before_gate=False)
    torch.testing.assert_close(after, rms_norm(x, weight, 1e-5) * opened)
    torch.testing.assert_close(before, rms_norm(x * opened, weight, 1e-5))


def test_l2_norm_gives_unit_length_and_keeps_zero_at_zero_with_a_finite_gradient() -> None:
    x = torch.randn(4, 16, dtype=torch.float64)
    x[0] = 0
    x.requires_grad_()
    y = l2_norm(x)
    torch.testing.assert_close(y[1:].norm(dim=-1), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert (y[0] == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


Gated = partial[torch.Tensor]
GATED: list[Gated] = [
    partial(gated_rms_norm, activation=activation, norm_before_gate=first)
    for activation in ("silu", "sigmoid")
    for first in (True, False)
]


@pytest.mark.parametrize("gated", GATED, ids=lambda gated: "-".join(str(word) for word in gated.keywords.values()))
@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("before", [(2, 3), ()])
def test_gradients_are_exact_the_second_too(gated: Gated, groups: tuple[int, ...], before: tuple[int, ...]) -> None:
    x, gate, weight = (
        torch.randn(*sizes, *groups, 4, dtype=torch.float64, requires_grad=True) for sizes in (before, before, ())
    )
    for norm, inputs in ((gated, (x, gate, weight)), (gated, (x, gate)), (rms_norm, (x, weight)), (l2_norm, (x,))):
        assert torch.autograd.gradcheck(norm, inputs)
        assert torch.autograd.gradgradcheck(norm, inputs)


@pytest.mark.parametrize("gated", GATED, ids=lambda gated: "-".join(str(word) for word in gated.keywords.values()))
def test_a_gradient_alone_and_tangents_are_those_of_the_written_equations(gated: Gated) -> None:
    x, gate, weight = (torch.randn(s, requires_grad=True) for s in ((5, 8), (5, 8), (8,)))
    d_y = torch.randn(5, 8)
    found = torch.autograd.grad(gated(x, gate, weight), (x, gate, weight), d_y)
    # Within a transform torch derives them itself.
    y, back = torch.func.vjp(gated, x.detach(), gate.detach(), weight.detach())
    torch.testing.assert_close(y, gated(x, gate, weight))
    for mine, torchs in zip(found, back(d_y), strict=True):
        torch.testing.assert_close(mine, torchs)
    # A batch of gradients at once, as a Jacobian takes them.
    y, many = gated(x, gate, weight), torch.stack([d_y, 2 * d_y])
    for mine, batch in zip(found, torch.autograd.grad(y, (x, gate, weight), many, is_grads_batched=True), strict=True):
        torch.testing.assert_close(batch, torch.stack([mine, 2 * mine]))
    _, tangent = torch.func.jvp(partial(gated, gate=gate.detach()), (x.detach(),), (d_y,))
    (along,) = torch.autograd.grad(gated(x, gate.detach()), x, torch.ones(5, 8))
    torch.testing.assert_close(tangent.sum(), (along * d_y).sum())


@pytest.mark.parametrize("gated", GATED, ids=lambda gated: "-".join(str(word) for word in gated.keywords.values()))
def test_a_gradient_that_is_not_asked_for_changes_no_other(gated: Gated) -> None:
    inputs = [torch.randn(s, requires_grad=True) for s in ((5, 8), (5, 8), (8,))]
    every = torch.autograd.grad(gated(*inputs).sum(), inputs)
    for i, x in enumerate(inputs):
        alone = [one if one is x else one.detach() for one in inputs]
        (found,) = torch.autograd.grad(gated(*alone).sum(), x)
        torch.testing.assert_close(found, every[i], rtol=0, atol=0)


def test_for_the_backward_pass_a_norm_keeps_its_inputs_alone() -> None:
    x, gate, weight = (torch.randn(s, requires_grad=True) for s in ((64, 32), (64, 32), (32,)))
    narrow, narrow_gate = x.bfloat16(), gate.bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gated_rms_norm(narrow, narrow_gate, weight)
        rms_norm(narrow, weight)
    inputs = {tensor.data_ptr() for tensor in (narrow, narrow_gate, weight)}
    assert {tensor.data_ptr() for tensor in kept} == inputs


def test_sixteen_bit_inputs_are_rounded_once() -> None:
    x, gate, weight = torch.randn(5, 32).bfloat16() * 100, torch.randn(5, 32).bfloat16(), torch.randn(32)
    for narrow, wide in (
        (rms_norm(x, weight), rms_norm(x.float(), weight)),
        (gated_rms_norm(x, gate, weight), gated_rms_norm(x.float(), gate.float(), weight)),
        (l2_norm(x), l2_norm(x.float())),
    ):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)


def test_wrong_shapes_and_activations_are_named() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rms_norm(x, torch.ones(1))
    with pytest.raises(ValueError, match="must have the shape of x"):
        gated_rms_norm(x, torch.zeros(1, 8))
    with pytest.raises(ValueError, match="'silu' or 'sigmoid', got 'tanh'"):
        gated_rms_norm(x, x, activation="tanh")  # type: ignore[arg-type]
