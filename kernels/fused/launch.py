"""What both ways of running the Triton kernels start with: a launch, its constants, and a call as kernels read it.

Nothing here, nor in single_pass.py and staged.py, waits for the device.

Shapes: B batch, T time, P parts that a gradient is summed of.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_counts
from hybridzoo.kernels.recurrence_op import Call

# The least log-decay of a token and key channel; below it the gradient is zero. exp(-20) is 2e-9.
FLOOR = -20.0
# What products are made of, and the inverse: factors of a tile reach exp(+-80), so fp16 inputs are multiplied as tf32.
MODES = {
    torch.bfloat16: ("bf16", "tf32x3"),
    torch.float16: ("tf32", "tf32x3"),
    torch.float32: ("ieee", "ieee"),
}


class Launch(NamedTuple):
    """A kernel with all that it is started with: `arguments` first, then `constants`, then the compiler's options."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def start(self, device: torch.device) -> None:
        """Queue the kernel on `device`, which need not be the current one."""
        if 0 in self.grid:
            return
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def kind(gate: Tensor | None) -> int:
    """0: no gate; 1: one value a head; 2: one a channel."""
    return 0 if gate is None else gate.ndim - 2


def flags(call: Call) -> dict[str, Any]:
    """What the compiler knows of a call in every kernel that reads its gates."""
    return {
        "DECAY": kind(call.log_decay),
        "ERASE": call.erase_logits is not None,
        "CORRECT": kind(call.correct),
        "STORED": call.stored,
        "VARLEN": call.cu_seqlens is not None,
        "MODE": MODES[call.q.dtype][0],
        "FLOOR": FLOOR,
    }


def contiguous(call: Call) -> Call:
    """The call as the kernels read it: dense tensors, and the content pair in float32."""
    dense = [None if x is None else x.contiguous() for x in call[:14]]
    call = Call(*dense, *call[14:])  # type: ignore[arg-type, call-arg]
    if call.down is None or call.up is None:
        return call
    return call._replace(down=call.down.float(), up=call.up.float())


def check_values(call: Call) -> None:
    """Refuse wrong counts and bounds where they lie in host memory; elsewhere reading them would stop the host."""
    if call.q.device.type != "cpu":
        return
    if call.chunk:
        check_counts(call.count.tolist(), call.chunk)
    if call.cu_seqlens is not None:
        check_bounds(call.cu_seqlens.tolist(), call.q.shape[1])


def joined(d: Tensor | None, like: Tensor | None, group: int = 1) -> Tensor | None:
    """Sum a gradient `[P, B, T, heads, ...]` over its parts, and over the value heads that share a key head."""
    if d is None or like is None:
        return None
    if group > 1:
        return d.unflatten(3, (-1, group)).sum((0, 4)).to(like.dtype)
    return d[0] if d.shape[0] == 1 else d.sum(0).to(like.dtype)
