"""What the two passes over a sequence start with: a launch, its constants, and a call as the kernels read it.

Nothing here, nor in forward.py and backward.py, waits for the device.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_counts
from hybridzoo.kernels.fused.config import power
from hybridzoo.kernels.recurrence_op import Call

# The least log-decay of a token and key channel; below it the gradient is zero. exp(-20) is 2e-9.
FLOOR = -20.0
# What products are made of, and the inverse: factors of a tile reach exp(+-80), so fp16 inputs are multiplied as tf32.
MODES = {
    torch.bfloat16: ("bf16", "tf32x3"),
    torch.float16: ("tf32", "tf32x3"),
    torch.float32: ("ieee", "ieee"),
}


# What a kernel is not specialised on: lengths and windows. Every kernel names them so.
FREE = frozenset(("T", "first", "count", "origin", "span"))
# Kernels that were compiled, by all that Triton would compile them anew for.
_compiled: dict[tuple[Any, ...], Any] = {}


class Launch(NamedTuple):
    """A kernel with all that it is started with: `arguments` first, then `constants`, then the compiler's options."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def start(self, device: torch.device) -> None:
        """Queue the kernel on `device`, which need not be the current one."""
        with on_device(device):
            self.starter()()

    def starter(self) -> Callable[..., None]:
        """Return a function that queues the kernel on the current device, as often as it is called.

        What it is called with replaces arguments from then on: numbers in FREE, and tensors of the same dtype. Triton
        takes 50 microseconds to see that it has compiled a kernel before, and a quarter of that to start one that it is
        handed; a small call waits for that.
        """
        given = {**self.arguments, **self.constants}
        key: list[Any] = [id(self.kernel), torch.cuda.current_device() if torch.cuda.is_initialized() else None]
        values: list[Any] = []  # tensors as their addresses, which spares the launcher to ask for them
        for name in self.kernel.arg_names:
            x = given[name]
            if isinstance(x, Tensor):
                address = x.data_ptr()
                values.append(address)
                key += (x.dtype, address % 16)
                continue
            values.append(x)
            if name in self.constants:
                key.append(x)
            elif name not in FREE:  # what Triton sees in a number
                key += (x == 1, x % 16 == 0, x >= 2**31) if isinstance(x, int) else (type(x),)
        known = (*key, *self.options.values())
        order = {name: i for i, name in enumerate(self.kernel.arg_names) if name in self.arguments}

        def start(**changes: Any) -> None:
            if 0 in self.grid:
                return
            given.update(changes)
            for name, x in changes.items():
                values[order[name]] = x.data_ptr() if isinstance(x, Tensor) else x
            if (made := _compiled.get(known)) is not None:
                made[(*self.grid, 1)](*values)
            elif (made := self.kernel[self.grid](**given, **self.options)) is not None:  # the interpreter makes nothing
                _compiled[known] = made

        return start


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one, which launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
        "NORM": call.qk_norm,
        "FLOOR": FLOOR,
        **cuts(call),
    }


def cuts(call: Call) -> dict[str, Any]:
    """What the compiler knows of a call in every kernel: how sequences are cut, and the precision of products."""
    return {"CONTENT": call.chunk, "VARLEN": call.cu_seqlens is not None, "MODE": MODES[call.q.dtype][0]}


def rank(call: Call) -> dict[str, int]:
    """The content gate's rank, for the kernels that read its pair."""
    r = 1 if call.down is None else call.down.shape[1]
    return {"RANK": r, "BR": power(r)}


def sizes(call: Call, *names: str) -> dict[str, int]:
    """The sizes of a call by name."""
    (_, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    every = {"T": T, "H": H, "HV": HV, "K": K, "V": V}
    return {name: every[name] for name in names}


def contiguous(call: Call) -> Call:
    """The call as the kernels read it: dense tensors, and the content pair in float32."""
    call = Call(*[x.contiguous() if isinstance(x, Tensor) else x for x in call])  # type: ignore[arg-type]
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
