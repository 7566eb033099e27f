"""Curves over training and over difficulty: was a stack trained to its limit, and what does it hold? Needs matplotlib.

May import nothing above studies. figures.py collects the pictures.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from hybridzoo.studies.canvas import (
    MANY,
    WIDEST,
    above,
    better,
    chance,
    entries,
    grouped,
    head,
    named,
    new_figure,
    panels,
    point,
    shape,
    under,
    value_axis,
)
from hybridzoo.studies.findings import Cell, Findings
from hybridzoo.studies.style import SOFT, Look, legend_below
from hybridzoo.studies.tasks import Shown

_BEHIND = "#d3dae1"  # the other stacks


def learning_curves(findings: Findings, task: str, drawn: dict[str, Look]) -> Any:
    """Draw the score over the training, one small panel a stack, every other stack's mean in grey behind it."""
    shown, cells = findings.shown(task), findings.of(task)
    columns = min(4, len(cells))
    lines = _rows(cells, drawn, columns)
    figure = new_figure(min(WIDEST, 2.7 * columns + 0.4), 2.0 * len(lines) + 0.7)
    grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
    curves = {cell.stack.label: cell.curve(shown.metric) for cell in cells}
    means = [(steps, [statistics.fmean(v) for v in zip(*values, strict=False)]) for steps, values in curves.values()]
    for row, line in enumerate(lines):
        for column, axes in enumerate(grid[row]):
            axes.set_visible(column < len(line))
            # The lowest that is seen in its column has the labels.
            axes.tick_params(axis="x", labelbottom=all(column >= len(below) for below in lines[row + 1 :]))
        for axes, cell in zip(grid[row], line, strict=False):
            for steps, mean in means:
                axes.plot(steps[: len(mean)], mean, color=_BEHIND, linewidth=1)
            steps, values = curves[cell.stack.label]
            for one in values:
                axes.plot(steps[: len(one)], one, color=drawn[cell.stack.label].colour, linewidth=1.5)
            for step in shown.stages:
                axes.axvline(step, color=SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
            axes.set_title(cell.stack.label, fontsize=9)
    every = [one for _, values in curves.values() for one in values]
    value_axis(grid[0][0], shown, [value for one in every for value in one])
    if not shown.percent:
        # The first evaluations would squeeze what matters into the bottom: the start leaves the picture.
        late = [value for one in every for value in one[len(one) // 2 :]]
        margin = 0.08 * (max(late) - min(late) or 0.1 * abs(max(late)) or 1)
        grid[0][0].set_ylim(min(late) - margin, max(late) + margin)
    above(figure, f"{task}: {named(shown)}")
    figure.supxlabel(
        f"training step{' (dotted: the task becomes harder)' if shown.stages else ''}", fontsize=9.5, color=SOFT
    )
    return figure


def _rows(cells: Sequence[Cell], drawn: dict[str, Look], columns: int) -> list[list[Cell]]:
    """The stacks of each row of panels: of very many each colour begins a row, the others come last."""
    groups = grouped(cells, drawn)
    whole = list(groups.values()) if len(cells) > MANY and len(groups) > 1 else [list(cells)]
    return [group[start : start + columns] for group in whole for start in range(0, len(group), columns)]


def level_curve(findings: Findings, task: str, drawn: dict[str, Look]) -> Any:
    """Draw the score against the task's difficulty, one line a stack: what it holds before it gives way.

    Very many stacks have one panel for each colour, with the others' means in grey behind and all attention in each.
    """
    shown, cells = findings.shown(task), findings.of(task)
    groups = grouped(cells, drawn)
    if len(cells) <= MANY or len(groups) < 2:
        figure, (axes,) = panels(1, 4.0)
        _level_lines(axes, shown, cells, drawn)
        _level_axes(axes, shown, cells)
        head(axes, task, _scored(shown), 1)
        under(axes, shown.level_axis, 1)
    else:
        whole = [cell for cell in groups.get("", []) if cell.stack.attention == 1]
        others = [cell for cell in groups.pop("", []) if cell not in whole]
        shares = {name: [*group, *whole] for name, group in groups.items()} | ({"others": others} if others else {})
        figure, grid = panels(len(shares), 2.7)
        _, across = shape(len(shares))
        for place, (axes, (name, group)) in enumerate(zip(grid, shares.items(), strict=True)):
            for cell in cells:
                axes.plot(_levels(shown), _level_means(shown, cell), color=_BEHIND, linewidth=1, zorder=1)
            _level_lines(axes, shown, group, drawn)
            _level_axes(axes, shown, cells)
            axes.set_title(name, fontsize=9.5)
            axes.tick_params(axis="x", labelbottom=place + across >= len(shares))
            if place + across >= len(shares):
                under(axes, shown.level_axis, across)
        above(figure, f"{task}: {_scored(shown)}")
    legend_below(figure, entries(cells, drawn, line=True, colours=len(figure.axes) == 1))
    return figure


def _scored(shown: Shown) -> str:
    """What the scores at all difficulties are of: a label says which one ranks the stacks."""
    return f"score at each difficulty ({better(shown)})" if shown.percent else named(shown)


def _levels(shown: Shown) -> list[float]:
    levels = [level for level, _ in shown.levels]
    return [math.log2(level) for level in levels] if min(levels) > 0 else [float(level) for level in levels]


def _level_means(shown: Shown, cell: Cell) -> list[float]:
    return [statistics.fmean(cell.level(metric)) for _, metric in shown.levels]


def _level_lines(axes: Any, shown: Shown, cells: Sequence[Cell], drawn: dict[str, Look]) -> None:
    """The lines of some stacks, set side by side at every level, so that those of one height are all seen."""
    xs = _levels(shown)
    room = min((abs(a - b) for a, b in itertools.pairwise(xs)), default=1.0)
    for place, cell in reversed(list(enumerate(cells))):
        look = drawn[cell.stack.label]
        moved = [x + (place - (len(cells) - 1) / 2) * min(0.3 / len(cells), 0.06) * room for x in xs]
        axes.plot(moved, _level_means(shown, cell), color=look.colour, linewidth=1.3, zorder=2)
        for x, (_, metric) in zip(moved, shown.levels, strict=True):
            point(axes, x, cell.level(metric), look)


def _level_axes(axes: Any, shown: Shown, cells: Sequence[Cell]) -> None:
    axes.set_xticks(_levels(shown), [str(level) for level, _ in shown.levels])
    value_axis(axes, shown, [value for cell in cells for _, metric in shown.levels for value in cell.level(metric)])
    chance(axes, shown)
