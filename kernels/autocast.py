"""Keeping autocast out of the recurrence. May import torch only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Run `function` in the dtypes that it chooses itself.

    Autocast stays on inside a custom operator and in whatever an oracle calls, where it would round the products of a
    float32 state to bf16, and meet in-place products with operands of another dtype.
    """

    @functools.wraps(function)
    def run(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        kind = first.device.type
        if not torch.is_autocast_enabled(kind):
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return cast("Callable[Concatenate[Tensor, P], R]", run)
