"""Make stacks equal in parameters by the width of their channel mixers, and say which cannot be.

May import architectures. A stack that cannot reach the budget is reported, never bent: nothing but the FFN width moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hybridzoo.architectures import Spec, account

Count = Callable[[Spec], float]

MAX_WIDTH = 2**24  # a width past any use: a budget that needs it is a typing error


@dataclass(frozen=True)
class Equalised:
    """A spec brought to a budget: `value` is what it came to, `why` says what is wrong if it is not `reached`."""

    spec: Spec
    value: float
    reached: bool
    why: str = ""


def parameters(spec: Spec) -> float:
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


def _judged(spec: Spec, value: float, target: float, tolerance: float, bound: str) -> Equalised:
    off = value / target - 1
    if abs(off) <= tolerance:
        return Equalised(spec, value, True)
    return Equalised(
        spec,
        value,
        False,
        f"{value:,.0f} against {target:,.0f} ({100 * off:+.1f} %, tolerance {100 * tolerance:g} %): {bound}",
    )


def _width(spec: Spec, target: float, count: Count) -> int:
    """Return the integer width at which `count` is closest to `target`: a bracket, then interpolation inside it."""
    known: dict[int, float] = {}

    def at(width: int) -> float:
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
