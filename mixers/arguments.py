"""The numbers of a call, as callers give them: checked, and made Python's own. May import nothing of the project."""

from __future__ import annotations

import numbers
import operator
from typing import Any


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number as an `int`, numpy's included; a bool is none.

    Raises: `TypeError` for anything else, `ValueError` for one out of range.
    """
    span = f"at least {least}" if most is None else f"{least} to {most}"
    says = f"{name} must be a whole number, {span}, got {value!r}"
    number = as_index(value)
    if number is None:
        raise TypeError(says)
    if number < least or (most is not None and number > most):
        raise ValueError(says)
    return number


def as_index(value: Any) -> int | None:
    """Return a whole number as an `int`; None for what is none, a bool among it."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(name: str, value: Any, range_: str) -> float:
    """Return a number as a `float`, numpy's included; a bool is none. `range_` says in words what it should be.

    Raises: `TypeError` for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, {range_}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return float("-inf") if value < 0 else float("inf")
