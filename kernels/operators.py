"""Functions as operators of torch.library, opaque to compilers, with gradients of first order in reverse mode.

By `torch.library.Library` and not `torch.library.custom_op`, whose autograd and version layers walk through the schema
in Python in each call: with many arguments that takes longer than a small call's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("hybridzoo", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register the operator `hybridzoo::{schema}`, which has no gradient yet, and return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hybridzoo::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hybridzoo, name).default


def differentiate(
    operator: Any, function: type[torch.autograd.Function], n: int, results: Callable[..., Any] | None = None
) -> None:
    """Let `function` stand for the operator where one of its first `n` arguments needs a gradient.

    Its `forward(ctx, ...)` calls the operator by `without_gradient`, and has no setup_context: then torch need not bind
    the arguments of each call, and transforms of torch.func are refused. What it returns is the operator's results, or
    `results` makes those of it.
    """

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:n]):
            found = function.apply(*arguments)
            return found if results is None else results(*found)
        return without_gradient(operator, arguments)

    _LIBRARY.impl(operator.name().partition("::")[2].partition(".")[0], run, "Autograd")


def without_gradient(operator: Any, arguments: Sequence[Any]) -> Any:
    """Call an operator as autograd does when it has seen to gradients itself."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def first_order(operator: Any, refusal: str) -> Callable[..., Sequence[Tensor]]:
    """Return a backward operator that raises `RuntimeError(refusal)` where a second derivative is asked for."""

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            return tuple(operator(*arguments))

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor) -> None:
            raise RuntimeError(refusal)

    def run(*arguments: Any) -> Sequence[Tensor]:
        gradients: Sequence[Tensor]
        gradients = First.apply(*arguments) if torch.is_grad_enabled() else operator(*arguments)
        return gradients

    return run


def dense_like(x: Tensor) -> Tensor:
    """Unwritten memory like `x`, contiguous whatever `x` is."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
