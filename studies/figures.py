"""The pictures of a report, each drawn from `Findings` alone. Needs matplotlib (the extra `study`).

Every seed is drawn, not only means; the same stack has the same look in all of them. report.py writes them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from hybridzoo.studies.canvas import (
    chance,
    entries,
    every_cell,
    head,
    named,
    new_figure,
    panels,
    point,
    scores,
    shape,
    spread,
    under,
    value_axis,
)
from hybridzoo.studies.figures_inside import gate_figure, placement_map
from hybridzoo.studies.figures_learning import learning_curves, level_curve
from hybridzoo.studies.figures_ratio import ratio_curve
from hybridzoo.studies.findings import Findings, on_frontier, weighs_memory
from hybridzoo.studies.solve import BUDGET_WORDS, UNITS
from hybridzoo.studies.style import INK, SOFT, Look, legend_below, looks
from hybridzoo.studies.verdicts import parts
from hybridzoo.training.units import size


def draw_all(findings: Findings) -> dict[str, Any]:
    """Return every picture that the findings allow, by the stem of its file's name.

    Of several budgets each has pictures of its own, whose stems begin with `BUDGET--`, and `between--TASK` sets the
    ratio curves of all beside each other; a stack looks the same in all of them.
    """
    drawn = looks(list({stack.label: stack for stack in findings.plan.stacks}.values()))
    each = parts(findings)
    if len(each) == 1:
        return _draw(findings, drawn)
    pictures: dict[str, Any] = {}
    for task in findings.plan.shown:
        panes = [(f"{task}, equal {BUDGET_WORDS[name]}", part, task) for name, part in each.items() if part.of(task)]
        if len(panes) > 1:
            pictures[f"between--{task}"] = ratio_curve(panes, drawn)
    for budget, part in each.items():
        pictures |= {f"{budget}--{stem}": figure for stem, figure in _draw(part, drawn).items()}
    return pictures


def _draw(findings: Findings, drawn: dict[str, Look]) -> dict[str, Any]:
    tasks = [task for task in findings.plan.shown if findings.of(task)]
    pictures: dict[str, Any] = {}
    if tasks:
        pictures["ratio"] = ratio_curve([(task, findings, task) for task in tasks], drawn)
        for task in tasks:
            if (placed := placement_map(findings, task)) is not None:
                pictures[f"placement-{task}"] = placed
        for task in tasks:
            if findings.shown(task).levels:
                pictures[f"levels-{task}"] = level_curve(findings, task, drawn)
        if all(weighs_memory(budget) for budget in findings.plan.budgets):
            pictures["frontier"] = frontier(findings, tasks, drawn)
        for task in tasks:
            if any(len(cell.curve(findings.shown(task).metric)[0]) > 1 for cell in findings.of(task)):
                pictures[f"learning-{task}"] = learning_curves(findings, task, drawn)
        for task in tasks:
            if (gates := gate_figure(findings, task, drawn)) is not None:
                pictures[f"gates-{task}"] = gates
    pictures["parameters"] = parameter_counts(findings, drawn)
    return pictures


def frontier(findings: Findings, tasks: Sequence[str], drawn: dict[str, Look]) -> Any:
    """Draw quality against what a sequence must keep at inference, and the frontier that no stack beats on both."""
    context = findings.plan.study["context"]
    figure, grid = panels(len(tasks), 3.7)
    _, across = shape(len(tasks))
    for place, (axes, task) in enumerate(zip(grid, tasks, strict=True)):
        shown, cells = findings.shown(task), findings.of(task)
        costs = {cell.stack.label: float(cell.stack.state_bytes) for cell in cells}
        octaves = [math.log2(cost) for cost in costs.values()]
        low, high = min(octaves), max(octaves)
        low, high = low - 0.1 * max(high - low, 2), high + 0.1 * max(high - low, 2)
        # The line goes through the marks: stacks that keep the same stand side by side, and keep their order.
        places = dict(zip(costs, (2.0**x for x in spread(octaves, range(len(cells)), high - low)), strict=True))
        best = on_frontier(cells, shown.maximise)
        xs, ys = [places[cell.stack.label] for cell in best], [cell.mean for cell in best]
        axes.set_xscale("log", base=2)
        axes.step([*xs, 2**high], [*ys, ys[-1]], where="post", color=INK, linewidth=1.1, alpha=0.65, zorder=2)
        for cell in reversed(cells):
            point(axes, places[cell.stack.label], cell.scores, drawn[cell.stack.label])
        axes.set_xlim(2**low, 2**high)
        _byte_ticks(axes, low, high, figure.get_figwidth() / across)
        head(axes, task, named(shown), across)
        if place + across >= len(tasks):
            under(axes, f"bytes a sequence keeps after {context:,} tokens", across)
        value_axis(axes, shown, scores(cells))
        chance(axes, shown)
    legend_below(figure, [*entries(every_cell(findings, tasks), drawn), _frontier_handle()])
    return figure


def _byte_ticks(axes: Any, low: float, high: float, inches: float) -> None:
    """Set ticks at powers of two of bytes, between 2**low and 2**high, as many as have room for their labels."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    room = max(2, int(72 * (inches - 1.2) / 50))
    powers = range(math.ceil(low), math.floor(high) + 1)
    stride = next(step for step in (1, 2, 4, 5, 10, 20, 40, 80) if len([p for p in powers if p % step == 0]) <= room)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers if power % stride == 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+ ", " ", size(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def _frontier_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, alpha=0.65, linewidth=1.1, label="frontier: none is better on both")


def parameter_counts(findings: Findings, drawn: dict[str, Look]) -> Any:
    """Draw what the budget holds of every stack, its parameters where there is none, and the band it is held in."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plan = findings.plan
    (budget,) = plan.budgets
    task, target = plan.met_on[budget], plan.targets.get(budget)
    stacks = list(reversed(plan.stacks))
    figure = new_figure(7.2, 0.36 * len(stacks) + 1.3)
    axes = figure.subplots()
    counts = [plan.held(stack) for stack in stacks]
    if target is not None:
        half = plan.study["hold"]["tolerance"] * target
        axes.axvspan(target - half, target + half, color="#e8edf2", zorder=0)
        axes.axvline(target, color=SOFT, linewidth=1, zorder=1)
        reach = max(1.6 * half, 1.15 * max(abs(one - target) for one in counts))
        axes.set_xlim(target - reach, target + reach)
    for row, (stack, held) in enumerate(zip(stacks, counts, strict=True)):
        look = drawn[stack.label]
        axes.plot(held, row, markersize=8, **look.words)
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
    what = "bytes that a sequence keeps" if budget == "inference_bytes" else f"{UNITS[budget or 'params']} on {task}"
    axes.set_xlabel(what + (" (band: the tolerance)" if target is not None else ""))
    return figure
