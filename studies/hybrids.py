"""Hybrids from two mixers: how many of a stack's layers have attention, where these stand, and whether alone.

`hybrid: {recurrent: c, attention: a, layers: 8, ratio: 1/4}` in a study's stack becomes `layers: (c*3 a)*2`. May import
architectures; study.py expands the hybrids of a study here, one for each value of the axes `ratio`, `placement`, `mix`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from hybridzoo.architectures.pattern import MAX_LAYERS, is_name
from hybridzoo.mixers.schema import SpecError

Placement: TypeAlias = Literal["even", "first", "last", "middle", "sandwiched", "clustered"]

AXES = ("ratio", "placement", "mix")  # of a hybrid; every other axis is a key of the spec
LISTED = 12  # up to so many layers, an error lists every ratio that there is


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """A stack of `layers` layers of two mixers, by their names in the spec.

    `ratio` is the share of layers that have attention. With `mix: inter` such a layer is attention alone; with `intra`
    both mixers run in it, side by side. `placement` is where these layers stand: `even`, each after as many recurrent
    ones; `first` or `last`, all at that end; `middle`, in one block; `sandwiched`, half at each end; `clustered`, in
    pairs, spread evenly.
    """

    recurrent: str
    attention: str
    layers: int
    ratio: str | float
    placement: Placement = "even"
    mix: Literal["inter", "intra"] = "inter"

    def __post_init__(self) -> None:
        for word in ("recurrent", "attention"):
            name = getattr(self, word)
            if not is_name(name):
                raise SpecError(f".{word}: expected the name of one mixer, such as c, got '{name}'")
        if self.recurrent == self.attention:
            raise SpecError(f".attention: a hybrid is of two mixers, and recurrent is '{self.attention}' too")
        if not 1 <= self.layers <= MAX_LAYERS:
            raise SpecError(f".layers: must be from 1 to {MAX_LAYERS:,}, got {self.layers}")
        _ = self.with_attention

    @property
    def with_attention(self) -> int:
        """The number of layers that have attention. `SpecError` for a ratio that gives no whole number."""
        try:
            share = Fraction(str(self.ratio))
        except (ValueError, ZeroDivisionError):
            raise SpecError(
                f".ratio: expected a share such as 1/4 or 0.25, got '{self.ratio}'; three recurrent layers to one of "
                "attention are 1/4"
            ) from None
        if not 0 <= share <= 1:
            raise SpecError(f".ratio: must be a share from 0 to 1, got {self.ratio}")
        count = share * self.layers
        if count.denominator != 1:
            below = int(count)
            near = " and ".join(str(Fraction(n, self.layers)) for n in (below, below + 1))
            every = ", ".join(str(Fraction(n, self.layers)) for n in range(self.layers + 1))
            known = f"; there are: {every}" if self.layers <= LISTED else ""
            raise SpecError(
                f".ratio: {self.ratio} of {self.layers} layers is no whole number; the nearest are {near}{known}"
            )
        return int(count)

    @property
    def alone(self) -> str:
        """The name of the one mixer that the stack is of, where the ratio leaves only one; else nothing."""
        if self.with_attention == 0:
            return self.recurrent
        return self.attention if self.with_attention == self.layers and self.mix == "inter" else ""

    @property
    def placed(self) -> str:
        """The placement, where there is a choice of places: not where all layers are alike."""
        return self.placement if 0 < self.with_attention < self.layers else ""

    @property
    def pattern(self) -> str:
        """The stack in the layer-pattern language."""
        both = self.attention if self.mix == "inter" else f"{self.recurrent}+{self.attention}"
        return written([both if has else self.recurrent for has in self.places])

    @property
    def places(self) -> list[bool]:
        """Whether each layer has attention, first to last."""
        n, k = self.layers, self.with_attention
        if self.placement == "first":
            return _blocks([0, n - k], [k, 0])
        if self.placement == "last":
            return _blocks([n - k], [k])
        if self.placement == "middle":
            before = (n - k) // 2
            return _blocks([before, n - k - before], [k, 0])
        if self.placement == "sandwiched":
            return _blocks([0, n - k], [k - k // 2, k // 2])
        size = 2 if self.placement == "clustered" else 1
        clusters = [min(size, k - taken) for taken in range(0, k, size)] or [0]
        ends = [(place + 1) * (n - k) // len(clusters) for place in range(len(clusters))]
        return _blocks([end - start for start, end in itertools.pairwise([0, *ends])], clusters)


def _blocks(without: Sequence[int], having: Sequence[int]) -> list[bool]:
    """Layers as blocks: `without[i]` that have no attention, then `having[i]` that do."""
    return [has for a, b in zip(without, having, strict=True) for has in [False] * a + [True] * b]


def written(layers: Sequence[str]) -> str:
    """Write layers as a pattern, the shortest repeat first: `(c*3 a)*2`."""
    period = next(p for p in range(1, len(layers) + 1) if list(layers) == list(layers[:p]) * (len(layers) // p))
    repeats = len(layers) // period
    if period == 1:
        return _repeated(layers[0], repeats)
    items = [_repeated(name, len(list(run))) for name, run in itertools.groupby(layers[:period])]
    inner = " ".join(items)
    return inner if repeats == 1 else f"({inner})*{repeats}"


def _repeated(layer: str, times: int) -> str:
    if times == 1:
        return layer
    return f"({layer})*{times}" if "+" in layer else f"{layer}*{times}"
