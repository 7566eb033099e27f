"""The probes by name, and running some or all of them. May import the probes and everything they may.

A probe is a function from `Settings` to a `Result`, in a file of its own; the order here is the paper's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from hybridzoo.mixers.schema import unknown
from hybridzoo.studies.theory import boundary, capacity, chunk, gradient, optimality, separation, stability
from hybridzoo.studies.theory.result import Result, Settings

Run: TypeAlias = Callable[[Settings], Result]


@dataclass(frozen=True)
class Probe:
    """A probe's name, what it asks in half a line, and the function that answers."""

    name: str
    about: str
    run: Run


_PROBES = (
    Probe("capacity", "how many pairs a state of K by V recalls exactly", capacity.probe),
    Probe("stability", "whether the state contracts, and how fast", stability.probe),
    Probe("gradient", "how far gradients reach along the state", gradient.probe),
    Probe("separation", "whether content gates solve what token gates cannot", separation.probe),
    Probe("chunk", "what a longer content chunk costs, and what it saves", chunk.probe),
    Probe("optimality", "whether 3:1 can be told from its neighbours", optimality.probe),
    Probe("boundary", "what an erase over value channels does to the chunkwise form", boundary.probe),
)


def list_probes() -> tuple[Probe, ...]:
    """Return every probe, in the paper's order."""
    return _PROBES


def find_probes(names: Sequence[str]) -> tuple[Probe, ...]:
    """Return the probes called `names`, each once and in the paper's order; all of them for no names.

    Raises: `SpecError` for a name that is none, with the nearest that is.
    """
    known = [probe.name for probe in _PROBES]
    for name in names:
        if name not in known:
            raise unknown("theory", "probe", name, known)
    return tuple(probe for probe in _PROBES if not names or probe.name in names)


def run_probes(probes: Sequence[Probe], settings: Settings) -> Iterator[Result]:
    """Run `probes` one after another, each from the same seed whichever others run, and give each result at once.

    torch's global generator is left where it was.
    """
    for probe in probes:
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            result = probe.run(settings)
        yield replace(result, seconds=time.perf_counter() - started)
