"""What passes between host and device without a wait, and what is derived from a packing once for all its layers.

A GPU runs behind the host, which stands still wherever it asks for a value. So what the host knows already is not asked
for, what it must ask is asked once for all layers that are given the same `cu_seqlens`, and what it sends it does not
wait for. May import torch only.

Shapes: N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")

_KNOWN: Any = WeakIdKeyDictionary()  # tensor: its version, and what was made of it by key


def remembered(owner: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """Return `make()`, or what it gave before for this tensor and key, while the tensor lives and is not written to.

    Nothing is kept while a compiler traces, nor in inference mode, whose tensors tell no versions and cannot be used
    in training later.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or owner.is_inference():
        return make()
    version, made = _KNOWN.get(owner, (None, {}))
    if version != owner._version:
        made = {}
        _KNOWN[owner] = (owner._version, made)
    if key not in made:
        made[key] = make()
    kept: Made = made[key]
    return kept


def host_bounds(cu_seqlens: Tensor) -> list[int]:
    """The boundaries as numbers: waits for the device, once for all layers, where `sent_bounds` has not made them."""
    return remembered(cu_seqlens, "bounds", cu_seqlens.tolist)


def host_counts(cu_seqlens: Tensor) -> list[int]:
    """The tokens of each sequence, known as `host_bounds` are."""
    return [end - start for start, end in pairwise(host_bounds(cu_seqlens))]


def sent_bounds(bounds: Sequence[int], device: torch.device) -> Tensor:
    """Return `cu_seqlens [N+1]` int32 on `device`, whose numbers `host_bounds` knows without asking there."""
    cu_seqlens = sent(torch.tensor(bounds, dtype=torch.int32), device)
    remembered(cu_seqlens, "bounds", lambda: list(bounds))
    return cu_seqlens


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, without waiting for what that does at the moment."""
    return x.to(device, non_blocking=True)
