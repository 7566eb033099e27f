"""Worker processes that take jobs one by one and report back while they work.

A worker that dies (killed, out of memory) costs its job, not the study: the parent notices, says so and starts another.
May import nothing of hybridzoo; runner.py gives it trials.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, TypeAlias

Send: TypeAlias = Callable[[Any], None]
Work: TypeAlias = Callable[[Any, Send], Any]

# Every library that might start threads of its own reads one of these when it is first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Event:
    """Something that happened to job `index`.

    `kind` is `started`; `progress`, with whatever the work sent; `done`, with its result; or `failed`, with the error
    in words as `value` and its traceback.
    """

    kind: str
    index: int
    value: Any = None
    traceback: str = ""


def run_jobs(work: Work, jobs: Sequence[Any], processes: int, threads: int, on_event: Callable[[Event], None]) -> None:
    """Run `work(job, send)` for every job, on `processes` workers of `threads` threads; 0 means in this process.

    `work` must be importable by name, and jobs and what is sent must pickle. Events arrive in the caller's thread. A
    job that raises is `failed` and the rest go on. Whatever ends this call early, `KeyboardInterrupt` included, ends
    the workers too.
    """
    if processes == 0:
        _run_here(work, jobs, threads, on_event)
        return
    workers = [_Worker(work, threads) for _ in range(min(processes, len(jobs)))]
    try:
        _serve(workers, deque(enumerate(jobs)), on_event)
    finally:
        for worker in workers:
            worker.channel.close()  # all at once, so that idle ones leave side by side
        for worker in workers:
            worker.stop()


def _run_here(work: Work, jobs: Sequence[Any], threads: int, on_event: Callable[[Event], None]) -> None:
    import torch  # here, not above: a worker must set its threads before the first import

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index, job in enumerate(jobs):
            on_event(Event("started", index))
            try:
                result = work(job, _sender(on_event, index))
            except Exception as error:
                on_event(Event("failed", index, describe(error), traceback.format_exc()))
            else:
                on_event(Event("done", index, result))
    finally:
        torch.set_num_threads(before)


def _sender(emit: Callable[[Event], None], index: int) -> Send:
    return lambda value: emit(Event("progress", index, value))


def describe(error: BaseException) -> str:
    """Say an error in one line: its type and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _serve(workers: list[_Worker], waiting: deque[tuple[int, Any]], on_event: Callable[[Event], None]) -> None:
    for worker in workers:
        _hand_out(worker, waiting, on_event)
    while any(worker.index is not None for worker in workers):
        by_channel = {worker.channel: worker for worker in workers if worker.index is not None}
        for channel in connection.wait(list(by_channel)):
            worker = by_channel[channel]  # type: ignore[index]
            event = worker.receive()
            if event.kind != "progress":
                worker.index = None
            on_event(event)
            if event.kind != "progress":
                if not worker.alive:
                    worker.restart()
                _hand_out(worker, waiting, on_event)


def _hand_out(worker: _Worker, waiting: deque[tuple[int, Any]], on_event: Callable[[Event], None]) -> None:
    if waiting:
        index, job = waiting.popleft()
        worker.give(index, job)
        on_event(Event("started", index))


class WorkerStartError(RuntimeError):
    """A worker process ended before it could take a job."""


class _Worker:
    """One process, the pipe to it, and the job it is at."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads
        self.index: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads can hang
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(self.work, theirs, self.threads), daemon=True)
        with _thread_environment(self.threads):
            self.process.start()
        theirs.close()
        self.alive, self.ready = True, False

    def restart(self) -> None:
        self.stop()
        self._start()

    def give(self, index: int, job: Any) -> None:
        self.index = index
        with contextlib.suppress(OSError):  # it died while idle: receive() will say so
            self.channel.send((index, job))

    def receive(self) -> Event:
        assert self.index is not None
        try:
            event = self.channel.recv()
            if event.kind == "ready":
                self.ready = True
                event = self.channel.recv()
            return event
        except (EOFError, OSError):
            self.alive = False
            self.process.join(10)
            code = self.process.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            if not self.ready:
                raise WorkerStartError(
                    f"a worker process could not start ({name}; its own message is above). A script that runs a study "
                    "must do so under `if __name__ == '__main__':`, since each worker imports the script anew"
                ) from None
            hint = " (out of memory, perhaps)" if name == "SIGKILL" else ""
            return Event("failed", self.index, f"the worker process ended with {name}{hint}", "")

    def stop(self) -> None:
        self.channel.close()
        if self.index is None and self.alive:
            self.process.join(5)  # idle: it leaves when it sees the pipe closed
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.process.close()


@contextlib.contextmanager
def _thread_environment(threads: int) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(work: Work, channel: connection.Connection[Any, Any], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    import torch

    torch.set_num_threads(threads)
    try:
        channel.send(Event("ready", -1))
        while True:
            index, job = channel.recv()
            try:
                result = work(job, _sender(channel.send, index))
                event = Event("done", index, result)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                event = Event("failed", index, describe(error), traceback.format_exc())
            channel.send(event)
    except (EOFError, OSError):
        return  # the parent is gone, or done with us
