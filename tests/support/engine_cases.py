"""Work for engines to do, importable by name wherever it runs, and what must hold of the events about it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

from hybridzoo.studies.engines import RETRIES, Event


def work(job, send):
    """Do what `job` says, a kind and a value: return, raise, die, sleep."""
    kind, value = job
    if kind == "raise":
        raise ValueError(f"bad\njob {value}")
    if kind == "die" or (kind == "die once" and _first(value)):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "sleep":
        send(os.getpid())
        time.sleep(value)
    if kind == "broken pipe":
        raise BrokenPipeError(f"of job {value}")
    if kind == "wait for":
        seen, made = value
        Path(made).touch()
        deadline = time.monotonic() + 20
        while not Path(seen).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return Path(seen).exists()
    if kind == "device":
        return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
    if kind == "node":
        return _on_a_node(value, send)
    send(value)
    import torch

    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def _first(marker):
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _on_a_node(marker, send):
    """Say on which Ray node this is and stay there, the first time; later, return the node."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    send(node)
    if _first(marker):
        time.sleep(300)
    return node


def collect(engine, jobs, on_event=None, retries=RETRIES):
    """Run the jobs and return the events, which must tell one whole story of each job."""
    events: list[Event] = []

    def both(event: Event) -> None:
        events.append(event)
        if on_event is not None:
            on_event(event)

    engine.run(work, jobs, both, retries)
    for index in range(len(jobs)):
        told = [event.kind for event in events if event.index == index and event.kind != "progress"]
        losses = told.count("lost")
        assert losses <= retries
        assert told == ["started", "lost"] * losses + ["started", told[-1]]
        assert told[-1] in ("done", "failed")
    assert Counter(event.index for event in events if event.is_end) == Counter(range(len(jobs)))
    return events


def ends(events):
    return {event.index: event for event in events if event.is_end}
