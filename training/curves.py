"""Curves to watch while a model trains: TensorBoard's event files. Needs tensorboard (the extra `train`).

May import nothing of hybridzoo but the loop, which calls this as its `on_progress`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from hybridzoo.training.loop import Progress

SUFFIX = ".hybridzoo"
FLUSH_SECONDS = 10  # what is watched should not be minutes old


def require_tensorboard() -> None:
    """Raise `ModuleNotFoundError` without tensorboard, before there is anything to write."""
    import torch.utils.tensorboard  # noqa: F401


class Curves:
    """Writes each point of a run's history into a folder: a context manager, and what `train` takes as `on_progress`.

    Its scalars are `loss` (nats) and `grad_norm`, means since the point before, `lr`, `tokens_per_second`, and under
    `held-out/` the task's scores where they were taken. Curves that it wrote there before are replaced or, where a run
    goes on after its `first` steps, gone on with.

    Raises: `ModuleNotFoundError` without tensorboard.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}") if first == 0 else ():
            old.unlink()  # TensorBoard would draw both runs as one
        # What was written of later steps, which are now taken again, is not drawn.
        again = first + 1 if first else None
        self.writer = SummaryWriter(str(folder), purge_step=again, flush_secs=FLUSH_SECONDS, filename_suffix=SUFFIX)

    def __call__(self, progress: Progress) -> None:
        for name in ("loss", "grad_norm", "lr", "tokens_per_second"):
            self.writer.add_scalar(name, getattr(progress, name), progress.step)
        if progress.evaluated:
            for name, value in progress.metrics.items():
                self.writer.add_scalar(f"held-out/{name}", value, progress.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.writer.close()
