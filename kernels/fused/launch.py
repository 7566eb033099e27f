"""How a kernel is started: all that it takes but tensors, made once for calls of one form, and its compiled self.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.fused.form import Form
from hybridzoo.kernels.fused.memory import Memory, Tensors

# The least log-decay of a token and key channel; below it the gradient is zero. exp(-20) is 2e-9.
FLOOR = -20.0
# What products are made of, and the inverse: factors of a tile reach exp(+-80), so fp16 inputs are multiplied as tf32.
MODES = {
    torch.bfloat16: ("bf16", "tf32x3"),
    torch.float16: ("tf32", "tf32x3"),
    torch.float32: ("ieee", "ieee"),
}


# What was compiled, by all that Triton compiles a kernel anew for: a new length compiles nothing.
_compiled: dict[Any, Any] = {}


class Launch:
    """A kernel, the numbers and constants that it is started with, and the compiler's options.

    Its other arguments are tensors. `kinds` says of what dtypes they are and which are None, or what decides it: each
    time the same. Triton takes 50 microseconds to see that it has compiled a kernel before, and a quarter of that to
    start one that it is handed; a small call waits for that.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Mapping[str, float],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
        kinds: tuple[Any, ...],
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.numbers, self.constants, self.options = dict(numbers), dict(constants), dict(options)
        self._given = {**self.numbers, **self.constants}
        names = kernel.arg_names
        self._order = {name: i for i, name in enumerate(names)}
        self._tensors = [name for name in names if name not in self._given]
        assert list(names[: len(self._tensors)]) == self._tensors, f"{kernel} takes numbers before tensors"
        self._rest = tuple([self._given[name] for name in names[len(self._tensors) :]])
        parameters = getattr(kernel, "params", ())  # the interpreter, which compiles nothing, has none
        seen = [_as_seen(numbers[x.name]) for x in parameters if x.name in numbers and not x.do_not_specialize]
        self._key = (id(kernel), *self.constants.values(), *self.options.values(), *seen, kinds)
        self._runs: dict[Any, Callable[..., None]] = {}  # by device, and where tensors lie within 16 bytes

    def start(self, device: torch.device, tensors: Tensors) -> None:
        """Queue the kernel on `device`, which need not be the current one."""
        with queue_of(device) as queue:
            self.starter(Memory(tensors), queue)()

    def starter(self, memory: Memory, queue: Queue) -> Callable[..., None]:
        """Return a function that starts the kernel on a queue, as often as it is called.

        `memory` holds at least those of the kernel's arguments that are tensors. What the function is called with,
        numbers and tensors that are aligned as well as those before, replaces arguments from then on.
        """
        values = [*map(memory.addresses.__getitem__, self._tensors), *self._rest]
        key: Any = queue.device
        if not memory.aligned:
            key = (key, *((memory.addresses[name] or 0) % 16 for name in self._tensors))
        given: dict[str, Any] = {}

        def start(**changes: Any) -> None:
            for name, x in changes.items():
                values[self._order[name]] = x.data_ptr() if isinstance(x, Tensor) else x
            run = self._runs.get(key)
            if run is None and (made := _compiled.get((self._key, key))) is not None:
                run = self._runs[key] = made[self.grid]
            if run is not None:
                run(*values, stream=queue.stream)
                return
            if not given:
                tensors = memory.tensors
                given.update({name: tensors[name] for name in self._tensors}, **self._given)
            given.update(changes)
            if (made := self.kernel[self.grid](**given, **self.options)) is not None:  # the interpreter makes nothing
                _compiled[self._key, key] = made

        return start if 0 not in self.grid else _nothing


def _as_seen(x: float) -> Any:
    """What Triton compiles anew for in a number."""
    return (x == 1, x % 16 == 0, x >= 2**31) if isinstance(x, int) else float


def _nothing(**changes: Any) -> None:
    """Start no program."""


class Queue(NamedTuple):
    """Where launches go: the current device and its current stream, None for the interpreter's."""

    device: int | None
    stream: int | None


@contextlib.contextmanager
def queue_of(device: torch.device) -> Iterator[Queue]:
    """Make `device` the current one while its queue is used."""
    if device.type != "cuda":
        yield Queue(None, None)
    elif device.index == torch.cuda.current_device():
        # As Triton does: torch's public way takes 20 times as long.
        yield Queue(device.index, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device), queue_of(device) as queue:
            yield queue


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start there before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def flags(form: Form) -> dict[str, Any]:
    """What the compiler knows of a call in kernels that read its gates; of writing only where it is read."""
    return {
        "DECAY": form.decay,
        "ERASE": form.erase,
        "CORRECT": form.correct,
        "STORED": form.stored,
        "NORM": form.qk_norm,
        "FLOOR": FLOOR,
        **common(form),
    }


def common(form: Form) -> dict[str, Any]:
    """What the compiler knows of a call in every kernel: are sequences packed, and the precision of products."""
    return {"VARLEN": form.packed, "MODE": MODES[form.dtype][0]}


def numbers(form: Form, span: int | None = None) -> dict[str, float]:
    """The numbers that every kernel takes, and a window of `span` blocks, which each start may say anew."""
    sizes = {"T": form.T, "H": form.H, "HV": form.HV, "K": form.K, "V": form.V}
    return {"scale": form.scale, **({} if span is None else window(0, span)), **sizes}


def window(first: int, count: int) -> dict[str, int]:
    """A window of `count` blocks of every sequence from `first` on, which scratch memory is for."""
    return {"first": first, "count": count}
