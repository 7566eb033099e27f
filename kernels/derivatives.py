"""Keeping derivatives that an operator does not have from being wrong in silence. May import torch only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(name: str) -> None:
    """Raise `NotImplementedError` within a transform of torch.func, which may hide what requires a gradient."""
    if in_transform():
        raise NotImplementedError(
            f"{name} goes through no transform of torch.func, such as grad or vmap: use backend='reference' there"
        )


def refuse_forward_mode(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise `NotImplementedError` where a tensor carries a tangent, which an operator would drop without a word."""
    if has_tangent(tensors):
        raise NotImplementedError(f"{name} has derivatives in reverse mode only, none in forward mode")


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors carries a tangent of forward mode; never where a compiler traces."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # no tangent is about
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
