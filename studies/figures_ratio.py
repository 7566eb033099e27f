"""The main picture of a report: quality over the share of softmax attention. Needs matplotlib.

May import nothing above studies. figures.py collects it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridzoo.studies.canvas import (
    chance,
    handles,
    head,
    named,
    new_figure,
    point,
    scores,
    shape,
    spread,
    under,
    value_axis,
    width_of,
)
from hybridzoo.studies.findings import Cell, Findings, families
from hybridzoo.studies.optimum import Optimum
from hybridzoo.studies.sentences import percent
from hybridzoo.studies.style import INK, SOFT, Look, legend_below
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.verdicts import optima

# Lines of placements, as their marks are filled.
_STYLES: dict[str, Any] = {
    "full": "-",
    "none": (0, (5, 2)),
    "left": (0, (1, 1)),
    "right": "-.",
    "bottom": (0, (3, 1, 1, 1)),
    "top": ":",
}
_ALONE = "#9aa7b4"  # the line of a curve whose stacks have colours of their own
_CROWDED = 0.2  # where ratios stand closer than this, the axis is stretched towards 0


def ratio_curve(panes: Sequence[tuple[str, Findings, str]], drawn: dict[str, Look]) -> Any:
    """Draw quality against the share of mixers that are softmax attention, with every interval and each optimum.

    `panes` are a title, the findings of one budget, and the task. Bars are the 95 % intervals of the means, as far as
    the score can be. Below each panel stands the fitted best ratio of every curve with its interval, or that it cannot
    be told. The ratios that were tried are the ticks.
    """
    found = [optima(part, task) for _, part, task in panes]
    lines = [_strip_lines(best) for best in found]
    rows = max(map(len, lines))
    strip = 0.15 * rows + 0.1 if rows else 0
    down, across = shape(len(panes))
    figure = new_figure(width_of(across), (3.7 + strip) * down)
    grid = figure.add_gridspec(down, across)
    axis = _Axis.of([cell.stack.attention for _, part, task in panes for cell in part.of(task)])
    upper: list[Any] = []
    for place, ((title, part, task), told) in enumerate(zip(panes, lines, strict=True)):
        inner = grid[divmod(place, across)].subgridspec(2 if rows else 1, 1, height_ratios=[3, strip] if rows else [1])
        axes = figure.add_subplot(inner[0])
        upper.append(axes)
        _ratio_panel(axes, part, task, drawn, axis)
        head(axes, title, named(part.shown(task)), across)
        lowest = axes
        if rows:
            lowest = figure.add_subplot(inner[1], sharex=axes)
            axes.tick_params(axis="x", labelbottom=False)
            _optimum_strip(lowest, told, rows, _curve_looks(part, task, drawn), axis)
        axis.mark(lowest, figure.get_figwidth() / across)
        if place + across >= len(panes):
            said = ", stretched near 0" if axis.near else ""
            under(lowest, f"share of mixers that are softmax attention{said}", across)
    if len({task for *_, task in panes}) == 1:  # the same task under several budgets: one scale
        ends = [axes.get_ylim() for axes in upper]
        for axes in upper:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    legend_below(figure, _legend(panes, drawn))
    return figure


@dataclass(frozen=True)
class _Axis:
    """Where ratios stand: evenly or, with a `near`, stretched towards 0 as log(1 + ratio / near)."""

    ratios: tuple[float, ...]
    near: float = 0.0

    @classmethod
    def of(cls, shares: Iterable[float]) -> _Axis:
        ratios = tuple(sorted(set(shares)))
        even = cls(ratios)
        if len(ratios) < 3 or even.narrowest >= _CROWDED:
            return even
        stretched = cls(ratios, near=next(share for share in ratios if share > 0))
        return max(even, stretched, key=lambda one: one.narrowest)

    def place(self, share: float) -> float:
        return math.log1p(share / self.near) / math.log1p(1 / self.near) if self.near else share

    @property
    def narrowest(self) -> float:
        return min(self.place(high) - self.place(low) for low, high in itertools.pairwise(self.ratios))

    @property
    def ends(self) -> tuple[float, float]:
        """Of the measured range; the whole one where there is one ratio alone."""
        low, high = self.place(self.ratios[0]), self.place(self.ratios[-1])
        return (low, high) if high > low else (0.0, 1.0)

    def mark(self, axes: Any, inches: float) -> None:
        """Set limits, and ticks at the ratios that were tried, as many as have room for their labels."""
        low, high = self.ends
        room = 40 / (72 * (inches - 1.2)) * (high - low)
        kept: list[float] = []
        for share in self.ratios[:-1]:
            if not kept or self.place(share) - self.place(kept[-1]) >= room:
                kept.append(share)
        last = self.ratios[-1]
        kept = [share for share in kept if self.place(last) - self.place(share) >= room] + [last]
        axes.set_xticks([self.place(share) for share in kept], [percent(share) for share in kept])
        axes.set_xlim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def _ratio_panel(axes: Any, findings: Findings, task: str, drawn: dict[str, Look], axis: _Axis) -> None:
    shown, cells, curves = findings.shown(task), findings.of(task), _curves(findings.of(task))
    places = _places(curves, cells, axis)
    for name, (colour, style) in _curve_looks(findings, task, drawn).items():
        xs = [places[cell.stack.label] for cell in curves[name]]
        axes.plot(xs, [cell.mean for cell in curves[name]], color=colour, linewidth=1.6, linestyle=style, zorder=2)
    seen = scores(cells)
    axes.set_ylim(*_limits(seen, [end for cell in cells for end in _interval(shown, cell) or ()]))
    for cell in reversed(cells):  # the study's first on top
        point(axes, places[cell.stack.label], cell.scores, drawn[cell.stack.label], _interval(shown, cell))
    value_axis(axes, shown, seen)
    chance(axes, shown)


def _limits(seen: Sequence[float], ends: Iterable[float]) -> tuple[float, float]:
    """An axis that shows every score, and intervals that reach not too far beyond them.

    Wide ones of few seeds must not press the means together: their bars leave the panel.
    """
    low, high = min(seen), max(seen)
    span = high - low or 0.1 * abs(high) or 1
    reached = [end for end in ends if low - span / 2 <= end <= high + span / 2]
    below = [low - 0.12 * span, *(end - 0.03 * span for end in reached)]
    above = [high + 0.12 * span, *(end + 0.03 * span for end in reached)]
    return min(below), max(above)


def _interval(shown: Shown, cell: Cell) -> tuple[float, float] | None:
    """The 95 % interval of the mean, as far as the score can be; None for one seed."""
    summary = cell.summary
    if summary.n < 2:
        return None
    return (max(0.0, summary.low), min(1.0, summary.high)) if shown.percent else (summary.low, summary.high)


def _curves(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The ratio curves that are lines: those of several ratios."""
    return {name: curve for name, curve in families(cells).items() if len({cell.stack.attention for cell in curve}) > 1}


def _curve_looks(findings: Findings, task: str, drawn: dict[str, Look]) -> dict[str, tuple[str, Any]]:
    """The colour and the line's style of each curve: those of its mixtures, since its ends are of other curves too."""
    looks = {}
    for name, curve in _curves(findings.of(task)).items():
        mixed = [drawn[cell.stack.label] for cell in curve if 0 < cell.stack.attention < 1]
        colour = mixed[0].colour if mixed and mixed[0].curve else _ALONE
        looks[name] = colour, _STYLES[mixed[0].fill if mixed else "full"]
    return looks


def _places(curves: dict[str, list[Cell]], cells: Sequence[Cell], axis: _Axis) -> dict[str, float]:
    """Give each stack its place on the axis; at one ratio curves stand side by side, and the rest right of them."""
    order: dict[str, int] = {}
    for number, curve in enumerate(curves.values()):
        for cell in curve:
            order.setdefault(cell.stack.label, number)
    low, high = axis.ends
    moved = spread(
        [axis.place(cell.stack.attention) for cell in cells],
        [order.get(cell.stack.label, len(order) + number) for number, cell in enumerate(cells)],
        high - low,
    )
    return {cell.stack.label: place for cell, place in zip(cells, moved, strict=True)}


def _strip_lines(best: dict[str, Optimum]) -> dict[str, Optimum | str]:
    """What stands in each line of the strip, by curve: an optimum, or why there is none; once what is true of all."""
    lines: dict[str, Optimum | str] = {}
    for name, found in best.items():
        said = "flat: cannot be told" if found.verdict == "flat" else f"no interval: {found.why}"
        lines[name] = found if found.verdict in ("inside", "edge") else said
    texts = {line for line in lines.values() if isinstance(line, str)}
    return {"": texts.pop()} if len(texts) == 1 and all(isinstance(one, str) for one in lines.values()) else lines


def _optimum_strip(
    axes: Any, lines: dict[str, Optimum | str], rows: int, looks: dict[str, tuple[str, Any]], axis: _Axis
) -> None:
    """One line a curve: its fitted best ratio and the 95 % interval, or why there is none."""
    middle = sum(axis.ends) / 2
    for row, (name, found) in enumerate(lines.items()):
        colour, style = looks.get(name, (INK, "-"))
        colour = INK if colour == _ALONE else colour
        if isinstance(found, str):
            axes.text(middle, row, found, color=colour, fontsize=7.5, ha="center", va="center")
            continue
        axes.plot([axis.place(found.low), axis.place(found.high)], [row, row], color=colour, lw=2.2, linestyle=style)
        axes.plot(
            axis.place(found.ratio), row, marker="|", markersize=8, markeredgewidth=2, color=colour, clip_on=False
        )
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("best\nratio" if rows > 1 else "best", rotation=0, ha="right", va="center", fontsize=8.5)
    axes.spines["left"].set_visible(False)


def _legend(panes: Sequence[tuple[str, Findings, str]], drawn: dict[str, Look]) -> list[Any]:
    """Every curve, and every stack that its curve does not name: ratios are on the axis, so marks need no entry."""
    from matplotlib.lines import Line2D

    looks = {name: look for _, part, task in panes for name, look in _curve_looks(part, task, drawn).items()}
    cells = {cell.stack.label: cell for _, part, task in panes for cell in part.of(task)}
    order = dict.fromkeys(stack.label for _, part, _ in panes for stack in part.plan.stacks)
    loose = [cells[label] for label in order if label in cells and not drawn[label].curve]
    placements = {look.placement: look for look in drawn.values() if look.placement}
    if len(placements) > 1:  # colours and styles multiply: each is said once
        colours = {look.curve: look.colour for look in drawn.values() if look.curve}
        return [
            *(Line2D([], [], color=colour, linewidth=2.5, label=name) for name, colour in colours.items()),
            *handles(loose, drawn),
            *(
                Line2D(
                    [], [], linestyle=_STYLES[look.fill], label=name, markersize=6, **Look(SOFT, "o", look.fill).words
                )
                for name, look in placements.items()
            ),
        ]
    lines = [
        Line2D(
            *([], []),
            color=colour,
            linewidth=2.5,
            linestyle=style,
            label=f"mixtures of {name} and attention" if colour == _ALONE else name,
        )
        for name, (colour, style) in looks.items()
    ]
    return [*lines, *handles(loose, drawn)]
