"""Pictures of what varies inside a stack: where its attention stands, and what its gates do. Needs matplotlib.

May import nothing above studies. figures.py collects them.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from hybridzoo.studies.canvas import MANY, WIDEST, above, entries, grouped, named, new_figure, shape
from hybridzoo.studies.findings import Cell, Findings
from hybridzoo.studies.sentences import gap, percent, score
from hybridzoo.studies.style import INK, SOFT, Look, legend_below
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.verdicts import grids, ranking

# Gates in the order in which the recurrence applies them; the title of each, and whether its axis is logarithmic.
_PANELS = {
    "decay": ("decay: half-life, tokens", True),
    "erase": ("erase: share cleared a token", True),
    "content": ("content: added to the erase logit", False),
    "correct": ("correct: strength of the delta rule", False),
    "write": ("write: strength", False),
}
_LONGEST = 1e6  # tokens: a decay of 1 has no half-life
_LEAST = 1e-6
_COLUMNS = 8  # panels side by side that can still be read


def placement_map(findings: Findings, task: str) -> Any | None:
    """Draw the score by ratio and placement of attention, a map a recurrent mixer; None where either is not varied."""
    from matplotlib.patches import Patch, Rectangle

    maps = grids(findings, task)
    if not maps:
        return None
    shown = findings.shown(task)
    cells = [cell for grid in maps.values() for cell in grid.values()]
    means = [cell.mean for cell in cells]
    low, high = min(means), max(means)
    rows = list(dict.fromkeys(place for grid in maps.values() for place, _ in grid))
    columns = sorted({share for grid in maps.values() for _, share in grid})
    across = min(len(maps), max(1, int(WIDEST / (1.15 * len(columns) + 1.4))))
    down = -(-len(maps) // across)
    figure = new_figure(min(WIDEST, across * (1.15 * len(columns) + 1.2) + 1.6), down * (0.62 * len(rows) + 1.1) + 0.5)
    axes_of = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    image = None
    framed: list[str] = []
    for axes, (name, grid) in zip(axes_of, maps.items(), strict=False):
        values = [
            [grid[place, share].mean if (place, share) in grid else math.nan for share in columns] for place in rows
        ]
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high if high > low else low + 1e-9, aspect="auto")
        ranked = ranking(list(grid.values()), shown.maximise)
        tied = {cell.stack.label for cell in ranked.ties}
        for y, place in enumerate(rows):
            for x, share in enumerate(columns):
                cell = grid.get((place, share))
                if cell is None:
                    axes.text(x, y, "–", ha="center", va="center", color=SOFT)
                    continue
                dark = high <= low or (cell.mean - low) / (high - low) < 0.55
                colour = "white" if dark else INK
                axes.text(x, y, _said(shown, cell), ha="center", va="center", fontsize=8.5, color=colour)
                best = cell.stack.label == ranked.cells[0].stack.label
                if best or cell.stack.label in tied:
                    said = _BEST if best else _TIED
                    axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **_frame(said)))
                    framed.append(said)
        axes.set_xticks(range(len(columns)), [percent(share) for share in columns])
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=False)
        axes.set_title(name)
        axes.set_xlabel("share of mixers that are softmax attention")
    for axes in axes_of[len(maps) :]:
        axes.set_visible(False)
    above(figure, f"{task}: {named(shown)}")
    if image is not None and high > low:
        bar = figure.colorbar(image, ax=axes_of[: len(maps)], fraction=0.04, pad=0.02)
        bar.ax.yaxis.set_major_formatter(lambda value, _: score(shown, value))
        bar.outline.set_visible(False)
    legend_below(figure, [Patch(label=said, **_frame(said)) for said in (_BEST, _TIED) if said in framed])
    return figure


_BEST, _TIED = "best cell of a map", "not told from it by these seeds"


def _frame(said: str) -> dict[str, Any]:
    """How matplotlib is told to draw a frame of a map, around a cell and in the key."""
    return {"fill": False, "edgecolor": "#d1495b", "linewidth": 2, "linestyle": "-" if said == _BEST else (0, (2, 2))}


def _said(shown: Shown, cell: Cell) -> str:
    summary = cell.summary
    if summary.n == 1:
        return score(shown, cell.mean)
    return f"{score(shown, cell.mean)}\n± {gap(shown, (summary.high - summary.low) / 2)}"


def gate_figure(findings: Findings, task: str, drawn: dict[str, Look]) -> Any | None:
    """Draw what every gate does, layer by layer: medians over the batch, and the middle half; None without gates.

    A panel a gate, with all stacks; of very many stacks a row a gate, with a panel for each of their colours.
    """
    cells = [cell for cell in findings.of(task) if any(cell.gates)]
    found = {row["gate"] for cell in cells for rows in cell.gates for row in rows}
    wanted = [gate for gate in _PANELS if gate in found]
    if not wanted:
        return None
    layers = 1 + max(row["layer"] for cell in cells for rows in cell.gates for row in rows)
    groups = grouped(cells, drawn)
    crowded = len(cells) > MANY and 1 < len(groups) <= _COLUMNS
    if crowded:
        figure = new_figure(WIDEST, 1.75 * len(wanted) + 0.6)
        grid = figure.subplots(len(wanted), len(groups), squeeze=False, sharey="row", sharex=True)
        for column, (name, group) in zip(grid.T, groups.items(), strict=True):
            column[0].set_title(textwrap.fill(name or "others", 24), fontsize=9)
            column[-1].set_xlabel("layer, from 0")
            for axes, gate in zip(column, wanted, strict=True):
                _gate_panel(axes, gate, group, drawn, layers, 15)
        for row, gate in zip(grid, wanted, strict=True):
            _gate_axis(row[0], gate)
            row[0].set_ylabel(textwrap.fill(_PANELS[gate][0], 20), fontsize=8.6)
    else:
        down, across = shape(len(wanted))
        figure = new_figure(min(WIDEST, 3.7 * across + 0.6), 2.7 * down + 0.3)
        spare = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, gate in zip(spare, wanted, strict=False):
            _gate_panel(axes, gate, cells, drawn, layers, 40)
            _gate_axis(axes, gate)
            axes.set_title(_PANELS[gate][0], fontsize=9.5)
            axes.set_xlabel("layer, from 0")
        for axes in spare[len(wanted) :]:
            axes.set_visible(False)
    above(figure, task)
    legend_below(figure, entries(cells, drawn, line=True, colours=not crowded))
    return figure


def _gate_panel(axes: Any, gate: str, cells: Sequence[Cell], drawn: dict[str, Look], layers: int, letters: int) -> None:
    """One gate of some stacks, side by side in every layer, and what is to be said of those that have none."""
    for place, cell in enumerate(cells):
        aside = (place - (len(cells) - 1) / 2) * min(0.5 / len(cells), 0.12)
        _gate_line(axes, cell, gate, drawn[cell.stack.label], aside)
    axes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
    axes.set_xlim(-0.5, layers - 0.5)
    tied = [cell for cell in cells if ties(cell)]
    if gate == "write" and tied:
        said = "tied gates are shown under correct" if axes.lines else "tied: one gate, shown under correct"
        _say(axes, textwrap.fill(said, letters))
    elif not axes.lines:
        _say(axes, "has none")


def _say(axes: Any, text: str) -> None:
    """Write into an empty panel, or at the foot of one that is not."""
    high, stands = (0.03, "bottom") if axes.lines else (0.5, "center")
    axes.text(0.5, high, text, transform=axes.transAxes, fontsize=7.8, color=SOFT, ha="center", va=stands)


def ties(cell: Cell) -> bool:
    """Whether a mixer of a stack has one gate for its correction and its write: its values stand under the former."""
    words = cell.stack.kind.recurrent
    return any(
        value == "tied" and name.endswith(".correct") and words.get(f"{name.removesuffix('correct')}write") == "scalar"
        for name, value in words.items()
    )


def _gate_axis(axes: Any, gate: str) -> None:
    """Scale the axis of one gate."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if _PANELS[gate][1]:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        subs = (1, 1.5, 2, 3, 5, 7) if decades < 1.5 else (1, 3) if decades < 3 else (1,)  # about eight that fit
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif gate == "content":
        axes.axhline(0, color=SOFT, linewidth=0.8)
    else:
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])


def _gate_line(axes: Any, cell: Cell, gate: str, look: Look, aside: float) -> None:
    """One stack's line in one gate's panel: a mark a layer, means over seeds and over mixers side by side."""
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for rows in cell.gates:
        for row in rows:
            if row["gate"] == gate:
                by_layer.setdefault(row["layer"], []).append(row)
    xs = [layer + aside for layer in sorted(by_layer)]
    if not xs:
        return
    ends = [_ends(gate, by_layer[layer]) for layer in sorted(by_layer)]
    axes.vlines(
        xs, [low for low, _, _ in ends], [high for _, _, high in ends], color=look.colour, alpha=0.45, linewidth=2.4
    )
    axes.plot(xs, [middle for _, middle, _ in ends], linewidth=1, markersize=5, **look.words)


def _ends(gate: str, rows: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    values = [statistics.fmean(row[name] for row in rows) for name in ("q25", "median", "q75")]
    if gate == "decay":
        values = [half_life(value) for value in values]
    elif gate == "erase":
        values = [max(value, _LEAST) for value in values]
    return values[0], values[1], values[2]


def half_life(kept: float) -> float:
    """Tokens after which half is left where each keeps the share `kept`; at most a million."""
    if kept >= 1:
        return _LONGEST
    return min(_LONGEST, math.log(0.5) / math.log(max(kept, 1e-30)))
