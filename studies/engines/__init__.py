"""Where the trials of a study run: in this process, on worker processes, or on Ray.

The runner hands jobs to an `Engine` and hears events; which engine it is makes no other difference. docs/engines.md
says how to choose. May import nothing of hybridzoo.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, TypeAlias

from hybridzoo.studies.engines.base import RETRIES, Engine, EngineError, Event, OnEvent, Send, Work, describe
from hybridzoo.studies.engines.here import Here
from hybridzoo.studies.engines.processes import Processes, WorkerStartError

EngineName: TypeAlias = Literal["here", "processes", "ray"]
ENGINES: tuple[EngineName, ...] = ("here", "processes", "ray")


def make_engine(
    name: EngineName | None = None,
    *,
    processes: int | None = None,
    threads: int | None = None,
    gpu_share: float | None = None,
    devices: Sequence[str] = (),
    jobs: int | None = None,
) -> Engine:
    """Return the engine of that name; without one, `here` for 0 processes and `processes` for any other number.

    `processes` are jobs at a time: by default one a core, or one for each of `devices`, the GPUs to run on; on Ray, as
    many as fit. `threads` are those of each job: by default what OMP_NUM_THREADS asks for, else the cores shared out
    evenly (on Ray: 1). `gpu_share` is the part of a GPU that a job takes: on Ray what its task asks for; on worker
    processes it sets the default of `processes`, so that 0.25 runs four on each GPU. `jobs` is the most that there
    will be at a time: no more workers are started.

    Raises: `EngineError` for a combination that makes no sense, and for a Ray that has not what is asked for;
    `ModuleNotFoundError` without Ray where that is asked for.
    """
    name = check_engine(name, processes, gpu_share)
    if name == "ray":
        from hybridzoo.studies.engines.cluster import Cluster

        return Cluster(threads or threads_asked_for() or 1, gpu_share, processes)
    if name == "here":
        return Here(threads or threads_asked_for() or cores())
    width = processes or _default_width(devices, gpu_share)
    if jobs is not None:
        width = max(1, min(width, jobs))
    each = threads or threads_asked_for() or max(1, cores() // width)
    # One device needs no dealing out, and 'cuda:0' must stay what it was.
    return Processes(width, each, devices if len(devices) > 1 else ())


def check_engine(name: EngineName | None, processes: int | None, gpu_share: float | None) -> EngineName:
    """Return the engine that `make_engine` would start, and start nothing.

    Raises what `make_engine` does, but for what only a running Ray can tell: a study asks before it plans.
    """
    if name is not None and name not in ENGINES:
        raise EngineError(f"engine: '{name}' is not one of {', '.join(ENGINES)}")
    if processes is not None and processes < 0:
        raise EngineError(f"processes: must not be negative, got {processes}")
    if gpu_share is not None and not 0 <= gpu_share <= 1:
        raise EngineError(f"gpu share: must be from 0 to 1, got {gpu_share:g}")
    name = name or ("here" if processes == 0 else "processes")
    if name == "here" and processes:
        raise EngineError(f"processes: --engine here runs one trial at a time, in this process, not {processes}")
    if name != "here" and processes == 0:
        raise EngineError(f"processes: 0 means this process, which is --engine here and not {name}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    return name


def _default_width(devices: Sequence[str], gpu_share: float | None) -> int:
    if not devices:
        return cores()
    return len(devices) * int(1 / (gpu_share or 1.0) + 1e-9)


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that torch may use here, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [str(i) for i in range(count)] if named is None else [word.strip() for word in named.split(",")]
    return tuple(listed[:count])


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_asked_for() -> int | None:
    """Return what OMP_NUM_THREADS asks for, if it does."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None


__all__ = [
    "ENGINES",
    "RETRIES",
    "Engine",
    "EngineError",
    "EngineName",
    "Event",
    "Here",
    "OnEvent",
    "Processes",
    "Send",
    "Work",
    "WorkerStartError",
    "check_engine",
    "cores",
    "describe",
    "make_engine",
    "threads_asked_for",
    "visible_devices",
]
