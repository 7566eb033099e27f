"""Worker processes on this machine that take jobs one by one and report back while they work.

A worker that dies (killed, out of memory) costs its job one attempt, not the study: the parent notices, says so, and
starts another. A worker whose parent dies leaves at once. May import nothing of hybridzoo but its neighbours.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any, Self

from hybridzoo.studies.engines.base import RETRIES, Attempts, Event, OnEvent, Work, describe, sender

# Every library that might start threads of its own reads one of these when it is first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class WorkerStartError(RuntimeError):
    """A worker process ended before it could take a job."""


class Processes:
    """Runs jobs on `width` worker processes of `threads` threads each, started when first needed and then kept.

    `devices` are what CUDA_VISIBLE_DEVICES may name: worker i sees the one at i modulo their number, so that workers
    spread over the GPUs of a machine, and several share one where there are more workers than GPUs. None of them
    leaves the variable alone.
    """

    name = "processes"

    def __init__(self, width: int, threads: int, devices: Sequence[str] = ()) -> None:
        if width < 1:
            raise ValueError(f"worker processes: at least 1, got {width}")
        self.width, self.threads, self.devices = width, threads, tuple(devices)
        self.workers: list[_Worker] = []

    def run(self, work: Work, jobs: Sequence[Any], on_event: OnEvent, retries: int = RETRIES) -> None:
        """Run the jobs, handed out in their order as workers become free."""
        for place in range(len(self.workers), min(self.width, len(jobs))):
            self.workers.append(_Worker(self._environment(place)))
        try:
            _serve(self.workers, work, deque(enumerate(jobs)), Attempts(retries), on_event)
        except BaseException:
            self.close()
            raise

    def _environment(self, place: int) -> dict[str, str]:
        words = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        if self.devices:
            words["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        return words

    def close(self) -> None:
        """End the workers: idle ones leave by themselves, others are stopped."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.channel.close()  # all at once, so that idle ones leave side by side
        for worker in workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _serve(
    workers: Sequence[_Worker],
    work: Work,
    waiting: deque[tuple[int, Any]],
    attempts: Attempts,
    on_event: OnEvent,
) -> None:
    for worker in workers:
        _hand_out(worker, work, waiting, on_event)
    while any(worker.job is not None for worker in workers):
        by_channel = {worker.channel: worker for worker in workers if worker.job is not None}
        for channel in connection.wait(list(by_channel)):
            worker = by_channel[channel]  # type: ignore[index]
            assert worker.job is not None
            index, job = worker.job
            event = worker.receive(attempts, proven=any(one.was_ready for one in workers))
            if event.kind == "ready":
                continue  # its first word of the job may be long in coming: until then others are heard
            if event.kind == "progress":
                on_event(event)
                continue
            worker.job = None
            on_event(event)
            if event.kind == "lost":
                waiting.appendleft((index, job))
            if not worker.alive:
                worker.restart()
            _hand_out(worker, work, waiting, on_event)


def _hand_out(worker: _Worker, work: Work, waiting: deque[tuple[int, Any]], on_event: OnEvent) -> None:
    if waiting:
        index, job = waiting.popleft()
        worker.give(work, index, job)
        on_event(Event("started", index))


class _Worker:
    """One process, the pipe to it, and the job it is at."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.job: tuple[int, Any] | None = None
        self.was_ready = False  # ever, this process or one before it
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads can hang
        self.channel, theirs = context.Pipe()
        threads = int(self.environment[_THREAD_VARIABLES[0]])
        self.process = context.Process(target=_main, args=(theirs, threads), daemon=True)
        with _set(self.environment):
            self.process.start()
        theirs.close()
        self.alive, self.ready = True, False

    def restart(self) -> None:
        self.stop()
        self._start()

    def give(self, work: Work, index: int, job: Any) -> None:
        self.job = (index, job)
        with contextlib.suppress(OSError):  # it died while idle: receive() will say so
            self.channel.send((work, index, job))

    def receive(self, attempts: Attempts, proven: bool) -> Event:
        """Return what the worker said, or what becomes of its job where it died; `proven`: workers do start here.

        Raises: `WorkerStartError` where it could not start, and no worker ever did.
        """
        assert self.job is not None
        try:
            event: Event = self.channel.recv()
            if event.kind == "ready":
                self.ready = self.was_ready = True
            return event
        except (EOFError, OSError):
            self.alive = False
            self.process.join(10)
            code = self.process.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            if not self.ready and proven:
                return attempts.died(self.job[0], f"the worker process could not start ({name})")
            if not self.ready and name != "SIGKILL":
                raise WorkerStartError(
                    f"a worker process could not start ({name}; its own message is above). A script that runs a study "
                    "must do so under `if __name__ == '__main__':`, since each worker imports the script anew"
                ) from None
            hint = " (out of memory, perhaps)" if name == "SIGKILL" else ""
            return attempts.died(self.job[0], f"the worker process ended with {name}{hint}")

    def stop(self) -> None:
        self.channel.close()
        if self.job is None and self.alive:
            self.process.join(5)  # idle: it leaves when it sees the pipe closed
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.process.close()


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _ParentLost(BaseException):
    """What was to be sent reaches nobody. No Exception: a job that forgives errors must not go on alone."""


def _main(channel: connection.Connection[Any, Any], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)

    def tell(event: Event) -> None:
        try:
            channel.send(event)
        except OSError as error:
            raise _ParentLost from error

    with contextlib.suppress(_ParentLost):  # it is gone, or done with us
        tell(Event("ready", -1))
        while True:
            try:
                work, index, job = channel.recv()
            except (EOFError, OSError):
                return
            try:
                event = Event("done", index, work(job, sender(tell, index)))
            except Exception as error:  # a broken pipe of the job's own is one of its errors
                event = Event("failed", index, describe(error), traceback.format_exc())
            tell(event)


def _leave_with_parent() -> None:
    # A parent that was killed closes the pipe, but a worker in the middle of a long step would not look at it.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
