"""The kernels of attention to a cache's slots on the CPU; interpreted.py runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from delta_problems import relative_error
from interpreted import report
from slots_problems import SlotsProblem, make_slots

from hybridzoo.kernels.fused import slots_op

CASES: dict[str, dict[str, Any]] = {
    "one slot": {"lengths": (0,), "C": 1},
    "fewer slots than a block": {"lengths": (3, 0, 6), "C": 7},
    "the first token of a page": {"lengths": (0, 255), "C": 256},
    "parts, some of them empty": {"lengths": (0, 255, 256, 700), "C": 1024},
    "slots that are no multiple of a block": {"lengths": (600, 3), "C": 601},
    "rings that have gone round": {"lengths": (5, 63, 64, 10_000), "C": 64},
    "grouped heads": {"lengths": (40, 9), "C": 300, "H": 6, "H_kv": 2},
    "one key head for many": {"lengths": (520,), "C": 600, "H": 20, "H_kv": 1},
    "heads that are no power of two": {"lengths": (290, 12), "C": 512, "D": 48},
    "the largest heads": {"lengths": (30,), "C": 40, "D": 256, "H": 1, "H_kv": 1},
    "capped scores": {"lengths": (300, 17), "C": 512, "softcap": 2.0, "scale": 3.0},
    "scores in the hundreds": {"lengths": (300,), "C": 512, "scale": 100.0},
}


def errors(case: SlotsProblem) -> dict[str, float]:
    """The relative error, cut as it ships, and in one part and in as many as there can be."""
    case = case.to(torch.float32)
    truth = case.truth()
    found = {"as it ships": relative_error(case.found(), truth)}
    shipped = slots_op.PROGRAMS
    for name, programs in (("one part", 1), ("all parts", 10**6)):
        slots_op.PROGRAMS = programs
        slots_op.launches_of.cache_clear()
        found[name] = relative_error(case.found(), truth)
    slots_op.PROGRAMS = shipped
    slots_op.launches_of.cache_clear()
    return found


CHECKS: dict[str, Callable[[], None]] = {}


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Add a function that raises when a property does not hold."""
    CHECKS[run.__name__] = run
    return run


@check
def two_runs_give_the_same_bits() -> None:
    case = make_slots(lengths=(700, 30), C=1024).to(torch.float32)
    assert torch.equal(case.found(), case.found())


@check
def a_row_is_what_it_is_alone_bit_for_bit() -> None:
    case = make_slots(lengths=(200, 30, 64), C=256).to(torch.float32)
    together = case.found()
    for n in range(3):
        alone = SlotsProblem(*(x[n : n + 1] for x in (case.q, case.k, case.v, case.length)), case.scale, None)
        assert torch.equal(alone.found(), together[n : n + 1])


@check
def room_that_is_made_ahead_changes_nothing_but_rounding() -> None:
    small, large = (make_slots(lengths=(200, 30), C=C).to(torch.float32) for C in (256, 2048))
    for x, y in ((large.k, small.k), (large.v, small.v), (large.q, small.q)):
        x[:, :, : y.shape[2]] = y
    assert relative_error(large.found(), small.found()) < 1e-6


if __name__ == "__main__":
    report(CASES, lambda words: errors(make_slots(**words)), CHECKS)
