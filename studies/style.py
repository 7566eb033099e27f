"""One look for every picture: colours that say what a stack is, marks that say it again without colour.

Stacks between all attention and none of one family take a ramp from blue to red by their share of attention; where
there are several families, each has a colour and each share a mark. Needs matplotlib (the extra `study`), drawn without
pyplot, so without any display.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hybridzoo.studies.stack import Stack
from hybridzoo.studies.study import yaml_word

INK, SOFT, FAINT, PAPER = "#1d2733", "#5c6b7a", "#dfe5ea", "#ffffff"

# Blue, through green and ochre, to red: each step is also darker or lighter than the last, for eyes that see no hue.
_RAMP = ("#1f4e8c", "#2b83a8", "#3fa58c", "#d8a03a", "#c5482f")
_HUES = ("#7a4fa3", "#4d7f2d", "#c2558f", "#8a5a2b", "#4a5568", "#0f8b8d")
_MARKS = ("s", "D", "^", "v", "P", "X", "h", "p", "*", "<", ">")
# Okabe and Ito's colours, for eyes of every kind, without yellow and black; and two more of other lightness.
_CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#5d4a1f")
_FILLS = ("full", "none", "left", "right", "bottom", "top")


@dataclass(frozen=True)
class Look:
    """How one stack is drawn, in every picture of a report.

    `fill` is matplotlib's fill style: which part of the mark has the colour. `curve` and `placement` are what colour
    and fill stand for, where they stand for several stacks.
    """

    colour: str
    mark: str
    fill: str = "full"
    curve: str = ""
    placement: str = ""

    @property
    def words(self) -> dict[str, Any]:
        """How matplotlib is told to draw the mark."""
        edge = "white" if self.fill == "full" else self.colour
        face = {"markeredgecolor": edge, "markerfacecoloralt": "white"}
        return {"color": self.colour, "marker": self.mark, "fillstyle": self.fill, **face}


def looks(stacks: Sequence[Stack]) -> dict[str, Look]:
    """Give every stack its colour and mark, by label.

    Where a study mixes several recurrent mixers with attention, or one in several ways, each such mixture has a colour,
    each ratio a mark, and each placement a fill of it. With one mixture, colours run along its ratio.
    """
    mixtures: dict[str, Stack] = {}
    for stack in stacks:
        if 0 < stack.attention < 1:
            mixtures.setdefault(_mixture(stack), stack)
    curves = dict(zip(mixtures, _named(list(mixtures.values())), strict=True))
    placements = {stack.placement for stack in stacks if 0 < stack.attention < 1}
    return _by_curve(stacks, curves) if len(curves) > 1 or len(placements) > 1 else _by_ratio(stacks)


def _mixture(stack: Stack) -> str:
    kind = stack.kind
    return json.dumps([kind.recurrent, kind.attention, kind.rest, kind.parallel], sort_keys=True, default=str)


def _named(mixtures: Sequence[Stack]) -> list[str]:
    """The family of each, and of several of one family the words in which they differ."""
    names: list[str] = []
    for stack in mixtures:
        alike = [_words(other) for other in mixtures if other.family == stack.family]
        words = dict.fromkeys(
            f"{name.rpartition('.')[2]}={yaml_word(value)}"
            for name, value in _words(stack).items()
            if any(other.get(name, value) != value for other in alike)
        )
        name = f"{stack.family} ({', '.join(words)})" if words else stack.family
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return names


def _words(stack: Stack) -> dict[str, Any]:
    kind = stack.kind
    return {**kind.rest, **kind.recurrent, **kind.attention, "parallel": kind.parallel}


def _by_curve(stacks: Sequence[Stack], curves: dict[str, str]) -> dict[str, Look]:
    colours = {key: _CURVES[place % len(_CURVES)] for place, key in enumerate(curves)}
    marks = dict(zip(sorted({s.attention for s in stacks}), ("o", *_MARKS), strict=False))
    alone = {  # a recurrent mixer by itself has the colour of the first curve that it ends
        json.dumps([s.kind.recurrent, s.kind.rest], sort_keys=True, default=str): _mixture(s)
        for s in reversed(stacks)
        if 0 < s.attention < 1
    }
    fills = dict(zip(dict.fromkeys(s.placement for s in stacks if 0 < s.attention < 1), _FILLS, strict=False))
    others = itertools.product(("#4a5568", *_HUES), ("o", *_MARKS), ("full",))
    result: dict[str, Look] = {}
    taken: set[tuple[str, str, str]] = set()
    for stack in stacks:
        own = json.dumps([stack.kind.recurrent, stack.kind.rest], sort_keys=True, default=str)
        key = _mixture(stack) if 0 < stack.attention < 1 else alone.get(own, "") if stack.attention == 0 else ""
        placement = stack.placement if 0 < stack.attention < 1 else ""
        look = (colours.get(key, INK), marks.get(stack.attention, "o"), fills.get(placement, "full"))
        if (not key and stack.attention < 1) or look in taken:
            key, placement, look = "", "", next(one for one in others if one not in taken)
        taken.add(look)
        result[stack.label] = Look(*look, curve=curves.get(key, ""), placement=placement if len(fills) > 1 else "")
    return result


def _by_ratio(stacks: Sequence[Stack]) -> dict[str, Look]:
    mixed: dict[str, int] = {}
    for stack in stacks:
        if stack.attention < 1:
            mixed[stack.family] = mixed.get(stack.family, 0) + 1
    main = max(mixed, key=lambda family: mixed[family], default="")
    result: dict[str, Look] = {}
    hues: dict[str, int] = {}
    for stack in stacks:
        on_ramp = stack.family == main or stack.attention == 1
        if on_ramp and not any(look.colour == _ramp(1 - stack.attention) for look in result.values()):
            result[stack.label] = Look(_ramp(1 - stack.attention), "o")
        else:
            number = len(hues)
            hues[stack.label] = number
            result[stack.label] = Look(_HUES[number % len(_HUES)], _MARKS[number % len(_MARKS)])
    return result


def _ramp(place: float) -> str:
    """Return the colour at `place` in [0, 1] along the ramp."""
    position = place * (len(_RAMP) - 1)
    left = min(int(position), len(_RAMP) - 2)
    share = position - left
    pairs = zip(_channels(_RAMP[left]), _channels(_RAMP[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same shapes on every machine
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#aab4be",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "hybridzoo",  # the same figure gives the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """Within, figures are drawn in the report's style; the caller's own matplotlib settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def legend_below(figure: Any, handles: Iterable[Any], columns: int = 8) -> None:
    """Put one legend for the whole figure below its axes, in as many of `columns` as its width holds.

    The figure grows by the legend's height, so that many entries take nothing from the axes.
    """
    handles = list(handles)
    for number in range(min(columns, max(1, len(handles))), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower left", ncols=number, handletextpad=0.5, columnspacing=1.6
        )
        extent = legend.get_window_extent()
        if number == 1 or extent.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)
            return
        legend.remove()
