"""What the host asks of tensors, counted: on a GPU it would stand still there until the device has caught up."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import hybridzoo.kernels

# On a GPU nothing in there reads. What is there for a CPU, checks of boundaries and the chunkwise backend, does.
KERNELS = str(Path(hybridzoo.kernels.__file__).parent)
READS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "__array__"),
}


class HostReads(TorchFunctionMode):
    """Within, `places` counts each read by where it stands: a value taken, or as many elements as a mask has set."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS or (name in ("__getitem__", "__setitem__") and _masked(args[1])):
            frame, inside = sys._getframe(1), False
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            while frame is not None and not inside:
                inside, frame = frame.f_code.co_filename.startswith(KERNELS), frame.f_back
            self.places[place] += not inside
        return function(*args, **(kwargs or {}))


def _masked(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
