"""The pictures of a report, each drawn from `Findings` alone. Needs matplotlib (the extra `study`).

Every seed is drawn, not only means; the same stack has the same look in all of them. report.py writes them out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from hybridzoo.studies.findings import Cell, Findings, families, on_frontier
from hybridzoo.studies.style import INK, SOFT, Look, legend_below, looks
from hybridzoo.studies.tasks import Shown
from hybridzoo.training.units import size

LOW = 1 / 3  # where every percentage is below this, an axis up to 100 % would make them one flat band


def draw_all(findings: Findings) -> dict[str, Any]:
    """Return every picture that the findings allow, by the stem of its file's name."""
    drawn = looks(findings.plan.stacks)
    tasks = [task for task in findings.plan.shown if findings.of(task)]
    pictures: dict[str, Any] = {}
    if tasks:
        pictures["ratio"] = ratio_curve(findings, tasks, drawn)
        for task in tasks:
            if findings.shown(task).levels:
                pictures[f"levels-{task}"] = level_curve(findings, task, drawn)
        pictures["frontier"] = frontier(findings, tasks, drawn)
        for task in tasks:
            if any(len(cell.curve(findings.shown(task).metric)[0]) > 1 for cell in findings.of(task)):
                pictures[f"learning-{task}"] = learning_curves(findings, task, drawn)
    pictures["parameters"] = parameter_counts(findings, drawn)
    return pictures


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _panels(number: int, height: float = 4.0) -> tuple[Any, list[Any]]:
    figure = _figure(min(5.4 * number + 0.6, 11.4) if number > 1 else 7.2, height)
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _handles(cells: Sequence[Cell], drawn: dict[str, Look], line: bool = False) -> list[Any]:
    from matplotlib.lines import Line2D

    style = "-" if line else "none"
    return [
        Line2D([], [], color=look.colour, marker=look.mark, markersize=7, linestyle=style, label=cell.stack.label)
        for cell in cells
        for look in [drawn[cell.stack.label]]
    ]


def _every_cell(findings: Findings, tasks: Sequence[str]) -> list[Cell]:
    """One cell of each stack that has any, in the study's order: what a legend lists."""
    found = {cell.stack.label: cell for task in tasks for cell in findings.of(task)}
    return [found[stack.label] for stack in findings.plan.stacks if stack.label in found]


def _value_axis(axes: Any, shown: Shown, values: Iterable[float]) -> None:
    """Name and scale the axis of scores: percentages to 100 or, where all `values` are low, to a little above them."""
    from matplotlib.ticker import PercentFormatter

    better = "higher is better" if shown.maximise else "lower is better"
    axes.set_ylabel(f"{shown.label} ({better})")
    if shown.percent:
        highest = max([*values, shown.chance or 0.0])
        top = 1.0 if highest >= LOW or highest <= 0 else 1.1 * highest
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top == 1 else None))
        axes.set_ylim(-0.03 * top, 1.05 * top)


def _scores(cells: Sequence[Cell]) -> list[float]:
    return [score for cell in cells for score in cell.scores]


def _chance(axes: Any, shown: Shown) -> None:
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


def _point(axes: Any, x: float, cell: Cell, look: Look) -> None:
    """Draw a stack's mean, its seeds, and a bar that spans them."""
    axes.plot([x, x], [min(cell.scores), max(cell.scores)], color=look.colour, linewidth=1.6, alpha=0.55, zorder=3)
    axes.plot(
        [x] * len(cell.scores), cell.scores, linestyle="none", marker="_", markersize=7, color=look.colour, zorder=3
    )
    axes.plot(x, cell.mean, marker=look.mark, markersize=8.5, color=look.colour, markeredgecolor="white", zorder=4)


def ratio_curve(findings: Findings, tasks: Sequence[str], drawn: dict[str, Look]) -> Any:
    """Draw quality against the share of mixers that are softmax attention, one panel a task, one line a family."""
    from matplotlib.ticker import PercentFormatter

    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        shown, curves = findings.shown(task), families(findings.of(task))
        places = _dodged(curves, findings.of(task))
        for curve in curves.values():
            if len(curve) > 1:
                xs, ys = [places[cell.stack.label] for cell in curve], [cell.mean for cell in curve]
                axes.plot(xs, ys, color="#9aa7b4", linewidth=1.4, zorder=2)
        for cell in reversed(findings.of(task)):  # the study's first on top
            _point(axes, places[cell.stack.label], cell, drawn[cell.stack.label])
        axes.set_title(task)
        axes.set_xlabel("share of mixers that are softmax attention")
        axes.set_xlim(-0.06, 1.06)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _value_axis(axes, shown, _scores(findings.of(task)))
        _chance(axes, shown)
    legend_below(figure, _handles(_every_cell(findings, tasks), drawn))
    return figure


def _dodged(curves: dict[str, list[Cell]], cells: Sequence[Cell]) -> dict[str, float]:
    """Give each stack its place on the ratio axis; curves at one ratio stand side by side, the largest in place."""
    order: dict[str, int] = {}
    for place, curve in enumerate(sorted(curves.values(), key=len, reverse=True)):
        for cell in curve:
            order.setdefault(cell.stack.label, place)
    places: dict[str, float] = {}
    taken: dict[float, int] = {}
    for cell in sorted(cells, key=lambda cell: order.get(cell.stack.label, -1)):
        number = taken.get(cell.stack.attention, 0)
        taken[cell.stack.attention] = number + 1
        step = 0.022 * ((number + 1) // 2) * (1 if number % 2 else -1)
        places[cell.stack.label] = cell.stack.attention + step
    return places


def level_curve(findings: Findings, task: str, drawn: dict[str, Look]) -> Any:
    """Draw the score against the task's difficulty, one line a stack: what it holds before it gives way."""
    from matplotlib.ticker import FixedLocator, NullLocator

    shown = findings.shown(task)
    figure, (axes,) = _panels(1, 4.4)
    levels = [level for level, _ in shown.levels]
    for place, cell in reversed(list(enumerate(findings.of(task)))):  # lines at one height nest, the first innermost
        look = drawn[cell.stack.label]
        values = [cell.level(metric) for _, metric in shown.levels]
        means = [statistics.fmean(v) for v in values]
        axes.fill_between(
            levels, [min(v) for v in values], [max(v) for v in values], color=look.colour, alpha=0.13, linewidth=0
        )
        axes.plot(
            *(levels, means),
            color=look.colour,
            linewidth=1.5 + 0.2 * place,
            marker=look.mark,
            markersize=6.5,
            markeredgecolor="white",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(levels))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(level) for level in levels])
    axes.set_xlabel(shown.level_axis)
    axes.set_title(task)
    reached = [value for cell in findings.of(task) for _, metric in shown.levels for value in cell.level(metric)]
    _value_axis(axes, shown, reached)
    axes.set_ylabel("recall (higher is better)" if shown.percent else axes.get_ylabel())
    _chance(axes, shown)
    legend_below(figure, _handles(findings.of(task), drawn, line=True), columns=3)
    return figure


def frontier(findings: Findings, tasks: Sequence[str], drawn: dict[str, Look]) -> Any:
    """Draw quality against what a sequence must keep at inference, and the frontier that no stack beats on both."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    context = findings.plan.study["context"]
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        shown, cells = findings.shown(task), findings.of(task)
        costs = [float(cell.stack.state_bytes) for cell in cells]
        best = on_frontier(cells, shown.maximise)
        xs, ys = [float(cell.stack.state_bytes) for cell in best], [cell.mean for cell in best]
        axes.set_xscale("log", base=2)
        low, high = min(costs) / 1.8, max(costs) * 1.8
        axes.step([*xs, high], [*ys, ys[-1]], where="post", color=INK, linewidth=1.1, alpha=0.65, zorder=2)
        for cell, cost in reversed(list(zip(cells, costs, strict=True))):
            _point(axes, cost, cell, drawn[cell.stack.label])
        axes.set_xlim(low, high)
        axes.set_title(task)
        axes.set_xlabel(f"bytes a sequence keeps after {context:,} tokens")
        axes.xaxis.set_major_locator(LogLocator(base=4 if high / low < 2**14 else 16))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _value_axis(axes, shown, _scores(cells))
        _chance(axes, shown)
    legend_below(figure, [*_handles(_every_cell(findings, tasks), drawn), _frontier_handle()])
    return figure


def _frontier_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, alpha=0.65, linewidth=1.1, label="frontier: none is better on both")


def learning_curves(findings: Findings, task: str, drawn: dict[str, Look]) -> Any:
    """Draw the score over the training, one small panel a stack, every other stack's mean in grey behind it."""
    shown, cells = findings.shown(task), findings.of(task)
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure = _figure(2.75 * columns + 0.4, 2.25 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    curves = {cell.stack.label: cell.curve(shown.metric) for cell in cells}
    for axes, cell in zip(grid.flat, cells, strict=False):
        for steps, values in curves.values():
            axes.plot(steps, [statistics.fmean(v) for v in zip(*values, strict=False)], color="#d3dae1", linewidth=1)
        steps, values = curves[cell.stack.label]
        for one in values:
            axes.plot(steps[: len(one)], one, color=drawn[cell.stack.label].colour, linewidth=1.7)
        for step in shown.stages:
            axes.axvline(step, color=SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_title(cell.stack.label, fontsize=9)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(cells))
        axes.tick_params(axis="x", labelbottom=place + columns >= len(cells))  # the lowest that is seen in its column
    _value_axis(grid[0][0], shown, [value for _, values in curves.values() for one in values for value in one])
    if not shown.percent:
        # The first evaluations would squeeze what matters into the bottom.
        late = [value for steps, values in curves.values() for one in values for value in one[len(one) // 5 :]]
        margin = 0.06 * (max(late) - min(late) or 1)
        grid[0][0].set_ylim(min(late) - margin, max(late) + margin)
    for axes in grid[:, 0]:
        axes.set_ylabel("")
    figure.supylabel(f"{shown.label} ({'higher' if shown.maximise else 'lower'} is better)", fontsize=9.5, color=SOFT)
    figure.supxlabel(
        f"training step{' (dotted: the task becomes harder)' if shown.stages else ''}", fontsize=9.5, color=SOFT
    )
    return figure


def parameter_counts(findings: Findings, drawn: dict[str, Look]) -> Any:
    """Draw every stack's parameters on its first task, and the band that the study holds them in."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plan = findings.plan
    task = min(plan.shown, key=lambda name: plan.stacks[0].parameters[name])  # where the budget was met
    stacks = list(reversed(plan.stacks))
    figure = _figure(7.2, 0.36 * len(stacks) + 1.3)
    axes = figure.subplots()
    counts = [stack.parameters[task] for stack in stacks]
    if plan.target is not None and plan.study["hold"]:
        half = plan.study["hold"]["tolerance"] * plan.target
        axes.axvspan(plan.target - half, plan.target + half, color="#e8edf2", zorder=0)
        axes.axvline(plan.target, color=SOFT, linewidth=1, zorder=1)
        reach = max(1.6 * half, 1.15 * max(abs(one - plan.target) for one in counts))
        axes.set_xlim(plan.target - reach, plan.target + reach)
    for row, (stack, held) in enumerate(zip(stacks, counts, strict=True)):
        look = drawn[stack.label]
        axes.plot(held, row, marker=look.mark, markersize=8, color=look.colour, markeredgecolor="white")
        width = "no FFN" if stack.ffn_width is None else f"FFN {stack.ffn_width}"
        axes.annotate(
            f"{held:,}   {width}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=SOFT,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(stacks)), [stack.label for stack in stacks])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-0.6, len(stacks) - 0.4)
    axes.grid(axis="y", visible=False)
    # Ticks lie close together, so their labels are exact: rounded ones would say the same, or what is not so.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(f"parameters on {task}" + (" (band: the tolerance)" if plan.target is not None else ""))
    return figure
