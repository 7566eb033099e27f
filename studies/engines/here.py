"""Jobs in this process, one after another: no workers to start, and a debugger reaches everything.

May import nothing of hybridzoo but its neighbours.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from hybridzoo.studies.engines.base import RETRIES, Event, OnEvent, Work, describe, sender


class Here:
    """Runs jobs in this process on `threads` threads."""

    name = "here"
    width = 1

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def run(self, work: Work, jobs: Sequence[Any], on_event: OnEvent, retries: int = RETRIES) -> None:
        """Run the jobs in their order; nothing is retried, since what kills a job ends this process with it."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for index, job in enumerate(jobs):
                on_event(Event("started", index))
                try:
                    result = work(job, sender(on_event, index))
                except Exception as error:
                    on_event(Event("failed", index, describe(error), traceback.format_exc()))
                else:
                    on_event(Event("done", index, result))
        finally:
            torch.set_num_threads(before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        return None
