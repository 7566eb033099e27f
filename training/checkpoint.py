"""A training that may be stopped: one file holds all that it needs to go on exactly where it was.

May import config.py and history.py. loop.py fills and empties it; cli/train.py says where it lies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridzoo.training.config import TrainConfig

FORMAT = 1


class CheckpointError(ValueError):
    """A kept run that cannot be read, or that is of another training than the one that asks for it."""


@dataclass(frozen=True)
class Kept:
    """A run after `step` steps: weights, the optimiser's state of each parameter, batches' generator, history.

    `pending [n, 2]` are the losses and gradient norms of the last n steps, which are in no point of the history yet.
    """

    step: int
    model: dict[str, Tensor]
    optimiser: dict[int, dict[str, Tensor]]
    generator: Tensor
    pending: Tensor
    history: dict[str, Any]


class Checkpoint:
    """Where a run is kept while it trains, and what was kept of it before: `step` steps, 0 where there was none.

    `train` starts from it, writes it every `seconds` and when it is told to stop, and leaves it there at its end:
    `remove` it once the result is safe. `settings` says what is trained, in words that JSON has (the spec, the task);
    they and the config, but for its device, must be those that the run was started with.

    Raises: `CheckpointError` that names the first setting that differs, or says why the file cannot be read.
    """

    def __init__(
        self, path: Path, config: TrainConfig, settings: Mapping[str, Any] | None = None, seconds: float = 300.0
    ) -> None:
        self.path, self.seconds = path, seconds
        train = {name: value for name, value in dataclasses.asdict(config).items() if name != "device"}
        self.settings = {**(settings or {}), "train": train}
        self.kept = self._read() if path.exists() else None
        self.step = self.kept.step if self.kept else 0
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last writing is `seconds` ago."""
        return time.monotonic() >= self.written + self.seconds

    def write(self, kept: Kept) -> None:
        """Keep a run, whole or, if this is cut off, as it was kept before."""
        half = self._half()
        parts = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
        torch.save({"format": FORMAT, "settings": self.settings, **parts}, half)
        os.replace(half, self.path)
        self.step, self.written = kept.step, time.monotonic()

    def remove(self) -> None:
        """Forget what was kept."""
        self.path.unlink(missing_ok=True)
        self._half().unlink(missing_ok=True)  # of a writing that was killed
        self.kept, self.step = None, 0

    def _half(self) -> Path:
        return self.path.with_name(f".{self.path.name}.tmp")

    def _read(self) -> Kept:
        try:
            data = torch.load(self.path, map_location="cpu", weights_only=True)
            if data["format"] != FORMAT:
                raise CheckpointError(f"{self.path}: of format {data['format']}, and this version reads {FORMAT}")
            settings, kept = data["settings"], Kept(*(data[field.name] for field in dataclasses.fields(Kept)))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: not a run that was kept, or damaged ({error})") from None
        if (other := _first_difference(settings, self.settings)) is not None:
            name, there, here = other
            raise CheckpointError(f"{self.path}: kept of another training: {name} is {there!r} there, {here!r} here")
        return kept


def _first_difference(there: Any, here: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Where two settings first differ, by the names on the way there, and what either has; None where nowhere."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in dict.fromkeys([*there, *here]):
            found = _first_difference(there.get(name), here.get(name), f"{place}.{name}" if place else str(name))
            if found is not None:
                return found
        return None
    return None if there == here else (place, there, here)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is remembered: the yielded function says whether one came.

    The second one raises `KeyboardInterrupt` wherever it hits. Only the main thread is told of signals: elsewhere none
    is heard, and none changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def heard(number: int, frame: object) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
