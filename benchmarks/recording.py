"""What every benchmark shares: timing two sides in turn, and a result that says where it was taken.

Shapes: none; times are seconds, written as milliseconds.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Time each side once a round, so that a busy moment of the machine falls on all of them alike.

    Returns: for each side the median, the fastest and the slowest quartile in milliseconds.
    """
    for side in sides.values():
        for _ in range(warmup):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: _spread(times) for name, times in seconds.items()}


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {key: round(1e3 * x, 2) for key, x in (("median", middle), ("quartile_1", low), ("quartile_3", high))}


def environment(*packages: str) -> dict[str, Any]:
    """The device, the versions of torch and `packages`, and the commit that is timed."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
        "commit": _commit(),
    }


def record(name: str, result: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write a result as `benchmarks/results/NAME.json`, or below `out`."""
    path = (RESULTS if out is None else out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", "../kernels", "../mixers", ".")
    return commit + (" with changes" if any(not line.startswith("??") for line in changed.splitlines()) else "")
