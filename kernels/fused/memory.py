"""The memory of a pass: tensors by the names that kernels give them, and where they lie.

What only a pass needs is one allocation, laid out in parts: a small call takes longer to ask for twenty than a GPU to
do its arithmetic. Kernels are handed addresses; the parts become tensors only where something looks at dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor | None]
# A shape and a dtype, or None for what is not there.
Part = tuple[tuple[int, ...], torch.dtype] | None
ALIGNED = 256  # bytes: where parts begin, as torch's own allocations do on a GPU at least


class Layout(NamedTuple):
    """Parts of one allocation by name, where each begins, and their size, in bytes."""

    parts: dict[str, Part]
    starts: dict[str, int | None]
    size: int

    def new(self, like: Tensor) -> Tensor:
        """Unwritten memory for all parts, on the device of a tensor."""
        return like.new_empty(self.size, dtype=torch.uint8)


def layout(parts: Mapping[str, Part], same: Mapping[str, str] | None = None) -> Layout:
    """Lay parts out one after another; a name in `same` stands for the part that it maps to."""
    starts: dict[str, int | None] = {}
    size = 0
    for name, part in parts.items():
        starts[name] = None
        if part is not None:
            shape, dtype = part
            starts[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
    same = same or {}
    more = {name: parts[other] for name, other in same.items()}
    return Layout({**parts, **more}, starts | {name: starts[other] for name, other in same.items()}, size)


class Memory:
    """Tensors, and allocations with their layouts, by the names that kernels give them."""

    def __init__(self, given: Tensors, *held: tuple[Layout, Tensor]) -> None:
        self._given: dict[str, Tensor | None] = {}
        # Whoever held what was kept may give it back anywhere.
        self._held = [(plan, buffer.clone() if buffer.data_ptr() % 16 else buffer) for plan, buffer in held]
        # Not by the launcher, which would ask each tensor once for each kernel.
        self.addresses: dict[str, int | None] = {}
        self.aligned = True  # to 16 bytes, which kernels are compiled for
        self.add(given)
        for plan, buffer in self._held:
            base = buffer.data_ptr()
            self.addresses.update({name: None if at is None else base + at for name, at in plan.starts.items()})

    def add(self, given: Tensors) -> None:
        """More tensors, for the launches that are started from now on."""
        addresses = {name: None if x is None else x.data_ptr() for name, x in given.items()}
        self.aligned = self.aligned and reduce(or_, filter(None, addresses.values()), 0) % 16 == 0
        self.addresses.update(addresses)
        self._given.update(given)

    @property
    def tensors(self) -> Tensors:
        """All of them as tensors."""
        found: dict[str, Tensor | None] = dict(self._given)
        for plan, buffer in self._held:
            for name, part in plan.parts.items():
                start = plan.starts[name]
                found[name] = None
                if part is not None and start is not None:
                    shape, dtype = part
                    size = math.prod(shape) * dtype.itemsize
                    found[name] = buffer[start : start + size].view(dtype).view(shape)
        return found
