"""Measuring on one GPU what several processes prepare side by side: each waits for the others, then measures in turn.

A peer that tunes its kernels when it first meets a size takes minutes for it; what is timed meanwhile says nothing.

Shapes: none; times are milliseconds, memory MiB.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

WAIT = 360.0  # seconds until measuring begins without whoever is still tuning
MIB = 2**20

Result = dict[str, Any]
Side = TypeVar("Side")


def installed(package: str) -> str | None:
    """The version of `package`, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measured_in_turn(
    jobs: Sequence[tuple[Any, ...]], prepare: Callable[..., None], measure: Callable[..., Iterator[Result]]
) -> list[Result]:
    """Call `prepare(*job)` of every job at once, in a process each, then `measure(*job)` of one after another.

    Each result is printed as it comes, with `quiet`: whether everybody was ready before. A job that fails is a result
    with its first argument and its error.
    """
    context = multiprocessing.get_context("spawn")
    ready, turn, results = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    workers = [
        context.Process(target=_work, args=(job, prepare, measure, ready, turn, results), daemon=True) for job in jobs
    ]
    for worker in workers:
        worker.start()
    found, left = [], len(workers)
    while left:
        result = results.get()
        if result is None:
            left -= 1
            continue
        print(json.dumps(result), flush=True)
        found.append(result)
    return found


def _work(
    job: tuple[Any, ...],
    prepare: Callable[..., None],
    measure: Callable[..., Iterator[Result]],
    ready: Any,
    turn: Any,
    results: Any,
) -> None:
    try:
        prepare(*job)
        torch.cuda.empty_cache()
        try:
            ready.wait(WAIT)
            quiet = True
        except threading.BrokenBarrierError:
            quiet = False  # somebody was still tuning, on the same GPU
        with turn:
            for result in measure(*job):
                results.put({**result, "quiet": quiet})
            torch.cuda.empty_cache()
    except Exception as error:
        results.put({"job": job[0], "error": f"{type(error).__name__}: {error}"[:500]})
        ready.abort()
    results.put(None)


def gpu_in_turn(
    sides: Mapping[Side, Callable[[], object]], rounds: int, warmup: int = 2, calls: int = 1
) -> dict[Side, float]:
    """The median milliseconds of a call of each side on the GPU, all timed once a round; the first `warmup` do not
    count.

    By itself a call finds an idle GPU, which waits for the host; of several `calls` in a row, as in training, the host
    prepares the next while the GPU works, and the longer of the two counts.
    """
    times: dict[Side, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + warmup):
        for name, side in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                side()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: round(statistics.median(ms[warmup:]), 3) for name, ms in times.items()}


def peak_mib(run: Callable[[], object]) -> float:
    """The most memory that `run` held on the GPU, above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)
