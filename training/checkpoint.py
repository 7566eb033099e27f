"""A training that may be stopped: one file holds all that it needs to go on exactly where it was.

May import config.py and the writing of whole files. loop.py fills and empties it; cli/train.py says where it lies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from hybridzoo.architectures.whole_file import remove_halves, whole_file
from hybridzoo.training.config import TrainConfig

FORMAT = 1
FREE = ("device", "log_every")  # words of a config in which a run may differ when it goes on


class CheckpointError(ValueError):
    """A kept run that cannot be read or written, or that is of another training than the one that asks for it."""


@dataclass(frozen=True)
class Kept:
    """A run after `step` steps: weights, the optimiser's state of each parameter, batches' generator, history.

    `pending [n, 2]` are the losses and gradient norms of the last n steps, which are in no point of the history yet;
    `seconds` is the time that the run has taken, evaluations included.
    """

    step: int
    model: dict[str, Tensor]
    optimiser: dict[int, dict[str, Tensor]]
    generator: Tensor
    pending: Tensor
    history: dict[str, Any]
    seconds: float


class Checkpoint:
    """Where a run is kept while it trains, and what was kept of it before: `step` steps, 0 where there was none.

    `train` starts from it, writes it every `every` seconds and when it is told to stop, and leaves it there at its end:
    `remove` it once the result is safe. `settings` says what is trained, in words that JSON has (the spec, the task's
    fingerprint); they and the config, but for `FREE`, must be those that the run was started with.

    Raises: `CheckpointError` that names the first setting that differs, or says why the file cannot be read or where it
    cannot be written.
    """

    def __init__(
        self, path: Path, config: TrainConfig, settings: Mapping[str, Any] | None = None, every: float = 300.0
    ) -> None:
        self.path, self.every = path, every
        train = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
        self.settings = {**(settings or {}), "train": train}
        if not path.parent.is_dir():
            raise CheckpointError(f"{path}: there is no folder {path.parent}")
        self.kept = self._read() if path.exists() else None
        self.step = self.kept.step if self.kept else 0
        self.seconds = self.kept.seconds if self.kept else 0.0
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last writing, or try, is `every` seconds ago."""
        return time.monotonic() >= self.written + self.every

    def write(self, kept: Kept) -> None:
        """Keep a run, whole or, if this is cut off, as it was kept before."""
        self.written = time.monotonic()
        parts = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
        try:
            with whole_file(self.path) as half:
                torch.save({"format": FORMAT, "settings": self.settings, **parts}, half)
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            raise CheckpointError(f"{self.path}: cannot be written: {error}") from None
        self.step, self.seconds, self.written = kept.step, kept.seconds, time.monotonic()

    def remove(self) -> None:
        """Forget what was kept."""
        self.path.unlink(missing_ok=True)
        remove_halves(self.path)
        self.kept, self.step, self.seconds = None, 0, 0.0

    def _read(self) -> Kept:
        try:
            data = torch.load(self.path, map_location="cpu", weights_only=True)
            made, settings = data["format"], data["settings"]
            kept = Kept(*(data.get(field.name) for field in dataclasses.fields(Kept)))
        except Exception as error:  # a damaged file may raise anything
            raise CheckpointError(f"{self.path}: not a run that was kept, or damaged ({error})") from None
        if made != FORMAT:
            raise CheckpointError(f"{self.path}: of format {made}, and this version reads {FORMAT}")
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


class StopSignals:
    """Whether the process was told to stop, by SIGINT or SIGTERM, while `stop_signals` listens."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.at_once = False  # raise where a signal hits, rather than remember it: nothing would be lost

    def __call__(self) -> bool:
        return self.came.is_set()

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; the second one raises, and so does the first where that is `at_once`."""
        if self.at_once or self.came.is_set():
            raise KeyboardInterrupt
        self.came.set()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Within, the first SIGINT or SIGTERM is remembered, and a second one raises `KeyboardInterrupt` where it hits.

    Only the main thread is told of signals: elsewhere none is heard, and none changed. One that is ignored stays so.
    """
    stop = StopSignals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: one for number, one in found.items() if one not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, stop.heard)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
