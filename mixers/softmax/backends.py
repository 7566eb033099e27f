"""The backends of softmax attention in one table, and the choice among them.

A backend that is asked for by name runs or raises; `auto` takes the first of its order that does not refuse the call.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from hybridzoo.mixers.softmax.dense import BAND_FROM
from hybridzoo.mixers.softmax.flash import FLASH
from hybridzoo.mixers.softmax.flex import FLEX
from hybridzoo.mixers.softmax.imports import installed
from hybridzoo.mixers.softmax.reference import REFERENCE
from hybridzoo.mixers.softmax.rule import Backend, Call
from hybridzoo.mixers.softmax.sdpa import SDPA
from hybridzoo.mixers.softmax.xformers import XFORMERS

BACKENDS: Mapping[str, Backend] = {b.name: b for b in (FLASH, FLEX, XFORMERS, SDPA, REFERENCE)}

# What `auto` tries, first to last; `reference` takes everything. FULL, SPARSE, PACKED and BEHIND go by the times in
# benchmarks/results/attention*.json, but that `sdpa` is a little before `flash` in forward passes of full attention.
PLAIN = ("sdpa", "reference")  # without a GPU
FULL = ("flash", "sdpa", "flex", "xformers", "reference")
SPARSE = (
    "flash",
    "flex",
    "xformers",
    "sdpa",
    "reference",
)  # windows and packs: masks that a kernel need not walk whole
PACKED = ("flash", "xformers", "flex", "sdpa", "reference")  # packs in training, without a window
SHORT = ("flash", "sdpa", "xformers", "flex", "reference")  # masks that cost less than what flex would compile for
BEHIND = ("sdpa", "flex", "flash", "xformers", "reference")  # a few tokens after many: nothing is laid out anew
CAPPED = ("flash", "flex", "reference")  # a soft-cap, which the others do not have
SHORT_CAPPED = ("flash", "reference")

# New tokens behind a cache up to which their scores, of every key, are few. From there on a kernel that holds none, and
# walks only what a window shows, is worth its laying out.
FEW = 128
# Tokens below which a mask or a soft-cap counts as short. A square of them is a quarter of a million scores a head,
# while FlexAttention compiles for seconds, in each process anew, and a study has one for every trial.
SHORT_BELOW = 512
# The same where a window is short enough for `sdpa` and `reference` to go block by block, at a cost that follows it.
SHORT_BAND_BELOW = 2048


def order(call: Call) -> tuple[str, ...]:
    """The backends that `auto` tries for this call, best first."""
    if call.device != "cuda":
        return PLAIN
    if call.cached and not call.packed:
        return BEHIND if call.tokens <= FEW else SPARSE
    banded = call.window is not None and not call.packed and BAND_FROM * call.window <= call.tokens
    short = call.tokens < (SHORT_BAND_BELOW if banded else SHORT_BELOW)
    if call.softcap and not call.cached:  # behind a cache a few tokens may have many scores
        return SHORT_CAPPED if short else CAPPED
    if call.window is None and not call.packed:
        return FULL
    if short:
        return SHORT
    return PACKED if call.window is None and call.gradient and not call.cached else SPARSE


def choose(call: Call, asked: str) -> Backend:
    """Return the backend that runs this call.

    Raises: `ValueError` where the one that was asked for by name cannot, with the reason.
    """
    if asked == "auto":
        for name in order(call):
            if BACKENDS[name].refusal(call) is None:
                return BACKENDS[name]
    if asked not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {asked!r}")
    backend = BACKENDS[asked]
    if (why := backend.refusal(call)) is not None:
        raise ValueError(f"backend={asked!r} {why}")
    return backend


class Found(NamedTuple):
    """A backend on this machine: its packages with their versions, None for those that are not installed, and why it
    cannot train or decode here, if so."""

    name: str
    summary: str
    versions: dict[str, str | None]
    training: str | None
    inference: str | None


def usual_call(**changes: object) -> Call:
    """Training on this machine, as a call: bfloat16 on a GPU, float32 elsewhere, 4,096 tokens, heads of 64, full."""
    gpu = torch.cuda.is_available()
    call = Call(
        device="cuda" if gpu else "cpu",
        number=0 if gpu else None,
        dtype=torch.bfloat16 if gpu else torch.float32,
        tokens=4096,
        head_dim=64,
        window=None,
        softcap=False,
        packed=False,
        cached=False,
        gradient=True,
        compiling=False,
    )
    return call._replace(**changes)  # type: ignore[arg-type]


def found() -> list[Found]:
    """Every backend, and what it does on this machine."""
    rows = []
    for backend in BACKENDS.values():
        versions = {package: installed(package) for package in backend.packages}
        training, inference = (backend.refusal(usual_call(gradient=gradient)) for gradient in (True, False))
        rows.append(Found(backend.name, backend.summary, versions, training, inference))
    return rows


def chosen() -> dict[str, str]:
    """What `auto` takes on this machine, by what is asked for."""
    cases = {
        "full": usual_call(),
        "window": usual_call(window=1024),
        "packed": usual_call(packed=True),
        "soft-cap": usual_call(softcap=True),
        "decoding": usual_call(tokens=1, cached=True, gradient=False),
    }
    return {name: choose(call, "auto").name for name, call in cases.items()}
