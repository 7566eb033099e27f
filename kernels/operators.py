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


class Operator:
    """A function that compilers, tracers, modes, transforms and profilers see as an operator of torch.library.

    Where nobody looks it is called as a function, for torch's dispatcher takes each argument apart and puts it together
    again: a seventh of the host's time in a small call. What it does is the same. An `ExecutionTraceObserver` that runs
    without a profiler is not known to look; a default device (`torch.set_default_device`) is a mode, and looks.
    """

    def __init__(self, operator: Any, function: Callable[..., Any]) -> None:
        self.operator, self._function = operator, function
        self._derived: Callable[[Callable[..., Any], Sequence[Any]], Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if _watched(arguments):
            return self.operator(*arguments)
        return self._function(*arguments) if self._derived is None else self._derived(self._function, arguments)

    def differentiate(
        self, function: type[torch.autograd.Function], n: int, results: Callable[..., Any] | None = None
    ) -> None:
        """Let `function` stand for the operator where one of its first `n` arguments needs a gradient.

        Its `forward(ctx, below, *arguments)` is given what computes the operator below autograd, to be called by
        `below_autograd`, and has no setup_context: then torch need not bind the arguments of each call, and transforms
        of torch.func are refused. What it returns is the operator's results, or `results` makes those of it.
        """

        def derived(below: Callable[..., Any], arguments: Sequence[Any]) -> Any:
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:n]):
                found = function.apply(below, *arguments)
                return found if results is None else results(*found)
            return below_autograd(below, arguments)

        self._derived = derived
        name = self.operator.name().partition("::")[2].partition(".")[0]
        _LIBRARY.impl(name, lambda *arguments: derived(self.operator, arguments), "Autograd")


def below_autograd(below: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call what autograd need not see: it has seen to gradients, or there are none."""
    with torch._C._AutoDispatchBelowAutograd():
        return below(*arguments)


def _watched(arguments: Sequence[Any]) -> bool:
    """Whether a compiler, tracer, mode, transform or profiler looks at calls, autograd must not, or an argument is no
    plain tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _ALONE
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()  # on this thread, also where C++ has started it
        or torch.autograd.profiler._is_profiler_enabled  # on any
        # Below autograd, where an operator records nothing; in inference mode there is no gradient to record.
        or (torch.is_grad_enabled() and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD))
        or not all(map(_plain, arguments))
    )


def _alone() -> frozenset[int]:
    """What the dispatcher adds to a tensor's own keys where nobody looks, with and without inference mode."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return frozenset((keys.raw_repr(), keys.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()))


_ALONE = _alone()
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded with all of autograd's keys
_TENSORS = frozenset((Tensor, torch.nn.Parameter))  # and none of their subclasses
_OTHERS = frozenset((type(None), bool, int, float))


def _plain(x: Any) -> bool:
    kind = type(x)
    if kind in _TENSORS:
        return not (x.is_meta or x.is_neg() or x._is_zerotensor())  # its memory holds what it does
    return kind in _OTHERS or (kind is list and all(map(_plain, x)))


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Register the operator `hybridzoo::{schema}`, which has no gradient yet, and return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hybridzoo::{name}", fake, lib=_LIBRARY)
    return Operator(getattr(torch.ops.hybridzoo, name).default, run)


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
