"""What every benchmark shares: timing two sides in turn, and a result that says where it was taken.

Shapes: none; times are seconds, written as milliseconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from hybridzoo.studies.environment import environment as made_with

Side = TypeVar("Side")
RESULTS = Path(__file__).parent / "results"


def in_turn(sides: Mapping[Side, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[Side, dict[str, float]]:
    """Time each side once a round, so that a busy moment of the machine falls on all of them alike.

    Returns: for each side the median, the fastest and the slowest quartile in milliseconds.
    """
    for side in sides.values():
        for _ in range(warmup):
            side()
    seconds: dict[Side, list[float]] = {name: [] for name in sides}
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
    """What a study's results say they were made with, and the versions of `packages`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {**made_with(device), "versions": {name: version(name) for name in packages}}


def record(name: str, result: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write a result as `benchmarks/results/NAME.json`, or below `out`."""
    path = (RESULTS if out is None else out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
