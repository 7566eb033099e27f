"""How long a call takes on a GPU, and whether the fused kernels run there. May import kernels.

A call on a GPU returns before it is done, and its first one compiles: each is waited for, and the first do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hybridzoo.kernels.fused.support import device_refusal

WARM = 3  # calls that compile and let the allocator settle


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int, warm: int = WARM) -> float:
    """Return the median of `repeats` calls on `device`, each waited for, after `warm` that do not count."""
    taken = []
    for _ in range(warm + repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[warm:])


def fused_refusal(device: torch.device, content: bool) -> str | None:
    """Return why the fused kernels, those of a content gate if `content`, cannot run on `device`, or None."""
    return device_refusal(device.type, device.index, content)


def gpu_facts(device: torch.device, shape: tuple[int, int, int, int], content: bool) -> dict[str, Any]:
    """Return what was timed on a GPU, for a result's facts: B, T, H and D, and whether the fused kernels took it."""
    return {"gpu_shape": dict(zip("BTHD", shape, strict=True)), "triton": fused_refusal(device, content) or "taken"}


def in_words(shape: tuple[int, int, int, int]) -> str:
    """Return a shape as a sentence has it: `B8 T1024 H12 D64`."""
    return " ".join(f"{name}{size}" for name, size in zip("BTHD", shape, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
