"""What the pictures of a report share: figures and panels, axes of scores, legends, a stack's mark. Needs matplotlib.

May import nothing above studies. figures.py and its siblings draw on these.
"""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from hybridzoo.studies.findings import Cell, Findings
from hybridzoo.studies.style import SOFT, Look
from hybridzoo.studies.tasks import Shown

LOW = 1 / 3  # where every percentage is below this, an axis up to 100 % would make them one flat band
WIDEST = 10.8  # inches: at 150 dots each as wide as a page shows them on a dense screen
MANY = 12  # stacks: of more a legend says what colours and marks stand for, and one panel does not hold all


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches, laid out so that nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def shape(number: int, columns: int = 3) -> tuple[int, int]:
    """Return rows and columns for so many panels, at most so many `columns` wide and as even as can be."""
    down = -(-number // min(number, columns))
    return down, -(-number // down)


def width_of(across: int) -> float:
    """Return how many inches wide a figure of so many panels side by side is."""
    return min(5.4 * across, WIDEST) if across > 1 else 7.2


def panels(number: int, height: float = 4.0, columns: int = 3) -> tuple[Any, list[Any]]:
    """Return a figure of `number` axes, at most so many `columns` wide, and those axes."""
    down, across = shape(number, columns)
    figure = new_figure(width_of(across), height * down)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[number:]:
        spare.set_visible(False)
    return figure, axes[:number]


def head(axes: Any, title: str, said: str, across: int) -> None:
    """Put a title above one of `across` panels, and what its axis of scores says below it: as many lines as it takes.

    Upright beside the axis a long text would leave the picture, and nobody reads it there.
    """
    points = 72 * (axes.figure.get_figwidth() / across - 1.2)  # 1.2: labels of ticks, and `guessing`
    lines = textwrap.wrap(said, max(16, int(points / 5.0)))  # a letter of DejaVu Sans is 0.58 em wide on average
    axes.set_title("\n".join(textwrap.wrap(title, max(16, int(points / 7.0)))), pad=7 + 11 * len(lines))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8.6,
        color=SOFT,
        annotation_clip=False,
    )


def above(figure: Any, text: str) -> None:
    """Put a title above a whole figure, in as many lines as it takes."""
    lines = textwrap.wrap(text, max(16, int(72 * figure.get_figwidth() / 7.2)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def under(axes: Any, text: str, across: int) -> None:
    """Name the axis of one of `across` panels, in as many lines as it takes."""
    points = 72 * (axes.figure.get_figwidth() / across - 0.8)
    axes.set_xlabel("\n".join(textwrap.wrap(text, max(16, int(points / 5.4)))))


def named(shown: Shown) -> str:
    """Return what an axis of scores is of, and which of its ends is the better one."""
    return f"{shown.label} ({better(shown)})"


def better(shown: Shown) -> str:
    """Return which end of an axis of scores is the better one."""
    return f"{'higher' if shown.maximise else 'lower'} is better"


def spread(places: Sequence[float], order: Sequence[int], span: float) -> list[float]:
    """Move what stands at one place, or nearly, side by side; return the new places, which keep the order.

    What stands at one place comes in `order` from left to right. Marks stand a mark's width apart, or closer where
    some would otherwise be moved by more than a twentieth of the axis's `span`.
    """
    by_place = sorted(range(len(places)), key=lambda one: (places[one], order[one]))
    wanted = [places[one] for one in by_place]
    for apart in (0.024, 0.02, 0.016, 0.012, 0.008):
        found = _apart(wanted, apart * span)
        if max(abs(new - old) for new, old in zip(found, wanted, strict=True)) <= 0.05 * span:
            break
    moved = dict(zip(by_place, found, strict=True))
    return [moved[one] for one in range(len(places))]


def _apart(wanted: Sequence[float], apart: float) -> list[float]:
    """The places nearest to `wanted`, which ascend, that are so far `apart`: an isotonic regression, by pooling."""
    blocks: list[list[float]] = []
    for number, place in enumerate(wanted):
        blocks.append([place - number * apart])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    means = [statistics.fmean(block) for block in blocks for _ in block]
    return [mean + number * apart for number, mean in enumerate(means)]


def grouped(cells: Sequence[Cell], drawn: dict[str, Look]) -> dict[str, list[Cell]]:
    """Return the stacks of each colour that stands for several, by what it stands for; under `` the others."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(drawn[cell.stack.label].curve, []).append(cell)
    return {name: groups[name] for name in sorted(groups, key=lambda name: not name)}


def handles(cells: Sequence[Cell], drawn: dict[str, Look], line: bool = False) -> list[Any]:
    """Return a legend's entries for the stacks of `cells`."""
    from matplotlib.lines import Line2D

    style = "-" if line else "none"
    return [
        Line2D([], [], markersize=7, linestyle=style, label=cell.stack.label, **drawn[cell.stack.label].words)
        for cell in cells
    ]


def entries(cells: Sequence[Cell], drawn: dict[str, Look], line: bool = False, colours: bool = True) -> list[Any]:
    """Return a legend's entries: the stacks, or of very many what their colours, marks and fills stand for.

    `colours` is for where panels do not say already what the colours are.
    """
    from matplotlib.lines import Line2D

    seen = [(cell, drawn[cell.stack.label]) for cell in cells]
    curves = {look.curve: look.colour for _, look in seen if look.curve}
    if len(cells) <= MANY or not curves:
        return handles(cells, drawn, line)
    loose = [cell for cell, look in seen if not look.curve]
    marks = {cell.stack.attention: look.mark for cell, look in seen if look.curve}
    fills = {look.placement: look.fill for _, look in seen if look.placement}
    grey: dict[str, Any] = {"linestyle": "none", "markersize": 6.5}
    return [
        *(Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in curves.items() if colours),
        *handles(loose, drawn, line),
        *(
            Line2D([], [], label=f"{100 * share:.3g} %", **grey, **Look(SOFT, mark).words)
            for share, mark in sorted(marks.items())
        ),
        *(Line2D([], [], label=place, **grey, **Look(SOFT, "o", fill).words) for place, fill in fills.items()),
    ]


def every_cell(findings: Findings, tasks: Sequence[str]) -> list[Cell]:
    """One cell of each stack that has any, in the study's order: what a legend lists."""
    found = {cell.stack.label: cell for task in tasks for cell in findings.of(task)}
    order = dict.fromkeys(stack.label for stack in findings.plan.stacks)
    return [found[label] for label in order if label in found]


def value_axis(axes: Any, shown: Shown, values: Iterable[float]) -> None:
    """Scale the axis of scores: percentages to 100 or, where all `values` are low, to a little above them."""
    from matplotlib.ticker import PercentFormatter

    if shown.percent:
        highest = max([*values, shown.chance or 0.0])
        top = 1.0 if highest >= LOW or highest <= 0 else 1.1 * highest
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top == 1 else None))
        axes.set_ylim(-0.03 * top, 1.05 * top)


def scores(cells: Sequence[Cell]) -> list[float]:
    """Every score of every seed."""
    return [score for cell in cells for score in cell.scores]


def chance(axes: Any, shown: Shown) -> None:
    """Draw the score of guessing, where the task has one."""
    if shown.chance is None:
        return
    axes.axhline(shown.chance, color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(
        "guessing",
        (1, shown.chance),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),  # right of the axes, where no mark can be
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        fontsize=8,
        color=SOFT,
    )


def point(
    axes: Any, x: float, values: Sequence[float], look: Look, interval: tuple[float, float] | None = None
) -> None:
    """Draw the mean of `values`, one of each seed and a dot each, and a bar: their `interval`, or else their range."""
    bar = interval or (min(values), max(values))
    if bar[1] > bar[0]:
        caps = {"marker": "_", "markersize": 5} if interval else {}
        axes.plot([x, x], bar, color=look.colour, linewidth=1.2, alpha=0.6, zorder=3, **caps)
    dots = {"markersize": 2.8, "color": look.colour, "markeredgewidth": 0}
    axes.plot([x] * len(values), values, linestyle="none", marker="o", zorder=3.5, **dots)
    axes.plot(x, statistics.fmean(values), markersize=7, zorder=4, **look.words)


def image_of(figure: Any, kind: str) -> bytes:
    """Return a figure as a file of that kind, `png` or `svg`: the same figure gives the same file.

    A picture keeps 256 colours, more than lines and letters have: a third of the size, and nothing that can be seen.
    """
    content = io.BytesIO()
    if kind == "svg":
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})  # no date, no version inside
        return content.getvalue()
    from PIL import Image

    figure.savefig(content, format="png")
    small = io.BytesIO()
    with Image.open(content) as picture:
        reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        reduced.save(small, "PNG", optimize=True, dpi=picture.info["dpi"])
    return small.getvalue()
