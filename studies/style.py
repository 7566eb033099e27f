"""One look for every picture: colours that say what a stack is, marks that say it again without colour.

Stacks between all attention and none of one family take a ramp from blue to red by their share of attention; other
families take hues of their own. Needs matplotlib (the extra `study`), drawn without pyplot, so without any display.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hybridzoo.studies.plan import Stack

INK, SOFT, FAINT, PAPER = "#1d2733", "#5c6b7a", "#dfe5ea", "#ffffff"

# Blue, through green and ochre, to red: each step is also darker or lighter than the last, for eyes that see no hue.
_RAMP = ("#1f4e8c", "#2b83a8", "#3fa58c", "#d8a03a", "#c5482f")
_HUES = ("#7a4fa3", "#4d7f2d", "#c2558f", "#8a5a2b", "#4a5568", "#0f8b8d")
_MARKS = ("s", "D", "^", "v", "P", "X", "h", "p", "*", "<", ">")


@dataclass(frozen=True)
class Look:
    """How one stack is drawn, in every picture of a report."""

    colour: str
    mark: str


def looks(stacks: Sequence[Stack]) -> dict[str, Look]:
    """Give every stack its colour and mark, by label."""
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


def legend_below(figure: Any, handles: Iterable[Any], columns: int = 4) -> None:
    """Put one legend for the whole figure below its axes, in as many of `columns` as its width holds."""
    handles = list(handles)
    for number in range(min(columns, max(1, len(handles))), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower left", ncols=number, handletextpad=0.5, columnspacing=1.6
        )
        if number == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
