"""The width of the channel mixers as the means to a budget: the one at which a count comes closest to its target.

May import architectures. solve.py asks for it; nothing but the FFN width moves here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hybridzoo.architectures import Spec, account

Count = Callable[[Spec], int]

MAX_WIDTH = 2**24  # a width past any use: a budget that needs it is a typing error


@dataclass(frozen=True)
class Equalised:
    """A spec brought to a budget: `value` is what it came to, `why` says what is wrong if it is not `reached`."""

    spec: Spec
    value: int
    reached: bool
    why: str = ""


def parameters(spec: Spec) -> int:
    """Count a spec's parameters."""
    return account(spec, context=1).parameters


def with_width(spec: Spec, width: int) -> Spec:
    """Return `spec` with every channel mixer `width` wide."""
    ffn = replace(spec.ffn, width=width)
    layers = tuple(replace(layer, ffn=ffn if layer.ffn is not None else None) for layer in spec.layers)
    return replace(spec, ffn=ffn, layers=layers)


def equalise(spec: Spec, target: float, tolerance: float, count: Count = parameters) -> Equalised:
    """Return `spec` with the FFN width that brings `count` (which grows with the width) closest to `target`.

    The width is a multiple of the spec's `multiple_of` where that comes within a tenth of the tolerance, else any
    integer. `reached` is false where even the best width stays further than `tolerance` (a share of the target) away.
    """
    now = count(spec)
    if now == target:
        return Equalised(spec, now, True)
    if all(layer.ffn is None for layer in spec.layers):
        return _judged(spec, now, target, tolerance, "it has no FFN whose width could change that")
    width = _width(spec, target, count)
    coarse = max(1, round(width / spec.ffn.multiple_of)) * spec.ffn.multiple_of
    best = with_width(spec, width)
    value = count(best)
    rounded = with_width(spec, coarse)
    rounded_value = count(rounded)
    if abs(rounded_value - target) <= 0.1 * tolerance * target:
        best, value = rounded, rounded_value
    bound = "at an FFN width of 1" if width == 1 else f"at the best FFN width, {width}"
    return _judged(best, value, target, tolerance, bound)


def _judged(spec: Spec, value: int, target: float, tolerance: float, bound: str) -> Equalised:
    if within(value, target, tolerance):
        return Equalised(spec, value, True)
    off = f"{distance(value, target)}, tolerance {100 * tolerance:g} %"
    return Equalised(spec, value, False, f"{value:,} against {target:,.0f} ({off}): {bound}")


def within(value: int, target: float, tolerance: float) -> bool:
    """Whether `value` is no further than a share of `tolerance` from its target."""
    return abs(value / target - 1) <= tolerance


def distance(value: int, target: float) -> str:
    """Say how far a value is from its target: `+0.3 %`."""
    percent = round(100 * (value / target - 1), 1)
    return f"{percent or 0:+.1f} %"  # or 0: rounding may leave a minus before it


def _width(spec: Spec, target: float, count: Count) -> int:
    """Return the integer width at which `count` is closest to `target`: a bracket, then interpolation inside it."""
    known: dict[int, int] = {}

    def at(width: int) -> int:
        if width not in known:
            known[width] = count(with_width(spec, width))
        return known[width]

    low, high = 1, spec.ffn.hidden(spec.d_model)
    if at(low) >= target:
        return low
    while at(high) < target and high < MAX_WIDTH:
        low, high = high, 2 * high
    while high - low > 1:
        # Parameters are linear in the width, so the first guess is the answer and the next closes the bracket on it.
        share = (target - at(low)) / (at(high) - at(low)) if at(high) > at(low) else 0.5
        guess = min(high - 1, max(low + 1, low + int(share * (high - low))))
        if at(guess) < target:
            low = guess
            if at(low + 1) >= target:
                high = low + 1
        else:
            high = guess
    return min((low, high), key=lambda width: abs(at(width) - target))
