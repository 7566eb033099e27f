"""Which way a call goes on Triton: staged, or in a single pass. Imports no triton.

The staged way prepares all blocks at once and is the faster one; a content gate, which makes every chunk wait for the
one before, takes the single pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hybridzoo.kernels.recurrence_op import Call

_forced = False


def staged(call: Call) -> bool:
    """Whether a call goes the staged way."""
    return not (call.chunk or _forced)


@contextlib.contextmanager
def single_pass() -> Iterator[None]:
    """Within, in every thread, all calls take the single pass: to compare the two, or a content gate with none.

    The backward pass of a call must run within too.
    """
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
