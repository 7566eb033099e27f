"""The page that sets two studies side by side: differences with their intervals, what only one has, what else differs.

May import nothing above studies. compare.py does the comparing. Needs matplotlib (the extra `study`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hybridzoo.architectures.whole_file import write_text
from hybridzoo.studies.canvas import image_of, new_figure
from hybridzoo.studies.compare import Pair, SideBySide, pair_table
from hybridzoo.studies.markup import bullets, document, figure, links, listed, section, table_of
from hybridzoo.studies.sentences import gap, place_of, score
from hybridzoo.studies.solve import BUDGET_WORDS
from hybridzoo.studies.style import INK, SOFT, styled
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.verdicts import optima, parts

_COLOURS = {"better": "#0072b2", "worse": "#d55e00", "tied": SOFT, "untested": SOFT}


def write_comparison(side: SideBySide, path: str | os.PathLike[str]) -> Path:
    """Write the comparison as one HTML page that needs nothing beside it, and return its path.

    Raises: `ModuleNotFoundError` without matplotlib (the extra `study`).
    """
    tables = {"pairs": pair_table(side)}
    first, second = side.names
    groups = grouped(side)
    with styled():
        pictures = {key: image_of(_forest(side, pairs), "png") for key, pairs in groups.items()}
    found = []
    for (budget, task), pairs in groups.items():
        title = f"{task}, equal {BUDGET_WORDS[budget]}" if budget else task
        caption = (
            "Score in the second study less that in the first, seed by seed, with the 95 % interval; right of the "
            f"line {second} is higher. Hollow marks have no interval: their seeds do not pair, or there is one."
        )
        found.append(
            f"<h3>{escape(title)}</h3>\n{bullets(summary(side, pairs))}"
            + figure(f"difference {task}", pictures[budget, task], caption, links(tables, "pairs"))
            + _numbers(side, pairs)
        )
    only = "".join(
        f"<h3>Only in {escape(name)}</h3>\n{bullets(things)}"
        for name, things in zip((f"the first, {first}", f"the second, {second}"), side.only, strict=True)
        if things
    )
    body = [
        f"<header>\n<h1>{escape(first)} and {escape(second)}</h1>\n"
        f'<p class="facts">{len(side.pairs)} stacks and tasks are in both. Differences are second - first.</p>\n'
        "</header>",
        section("Read this first", bullets(side.notes)),
        section("Differences", "\n".join(found) or "<p>No stack of a task is in both studies.</p>"),
        section("Best ratios", _ratios(side)),
        section("What only one has", only),
        section("Settings that differ", table_of(["key", first, second], side.changed) if side.changed else ""),
        section("Tables", listed(tables)),
    ]
    target = Path(path)
    write_text(target, document(f"{first} and {second}: hybridzoo studies", body))
    return target


def grouped(side: SideBySide) -> dict[tuple[str, str], list[Pair]]:
    """The pairs of each budget and task, in order."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in side.pairs:
        groups.setdefault((pair.budget, pair.task), []).append(pair)
    return groups


def summary(side: SideBySide, pairs: Sequence[Pair]) -> list[str]:
    """Say of one task how many stacks the seeds tell apart, and in which direction."""
    shown = side.findings[0].shown(pairs[0].task)
    better = [pair for pair in pairs if outcome(shown, pair) == "better"]
    worse = [pair for pair in pairs if outcome(shown, pair) == "worse"]
    tested = [pair for pair in pairs if pair.verdict != "untested"]
    if not tested:
        return ["Fewer than three seeds pair, so nothing is tested: differences may be chance."]
    named = [f"{len(group)} {word}" for group, word in ((better, "better"), (worse, "worse")) if group]
    told = " and ".join(named) if named else "none different"
    several = f"Of {len(tested)} stacks with three paired seeds or more, {told} in {side.names[1]}"
    return [f"{several} (paired t, 5 % after Holm)."]


def outcome(shown: Shown, pair: Pair) -> str:
    """`better`, `worse`, `tied` or `untested`: the second study against the first."""
    if pair.verdict in ("tied", "untested"):
        return pair.verdict
    return "better" if (pair.verdict == "higher") == shown.maximise else "worse"


def interval(shown: Shown, pair: Pair) -> str:
    """The difference and its interval, for people: `+1.2 points (0.3 to 2.1)`."""
    sign = "+" if pair.change >= 0 else "−"
    said = f"{sign}{gap(shown, abs(pair.change))}"
    if pair.apart is None or pair.apart.n < 2:
        return said
    scale = 100 if shown.percent else 1
    low, high = (
        f"{scale * end:+.{1 if shown.percent else 3}f}".replace("-", "−") for end in (pair.apart.low, pair.apart.high)
    )
    return f"{said} ({low} to {high})"


def _numbers(side: SideBySide, pairs: Sequence[Pair]) -> str:
    shown = side.findings[0].shown(pairs[0].task)
    heads = [
        "stack",
        f"{side.names[0]}: {shown.label}",
        side.names[1],
        "difference (95 %)",
        "seeds that pair",
        "told apart",
    ]
    return table_of(heads, [row(shown, pair) for pair in pairs])


def row(shown: Shown, pair: Pair) -> list[str]:
    """One pair as texts: its stack, both scores, the difference, the seeds, the outcome."""
    label, other = pair.first.stack.label, pair.second.stack.label
    return [
        *(label if label == other else f"{label} / {other}", score(shown, pair.first.mean)),
        *(score(shown, pair.second.mean), interval(shown, pair)),
        *(str(pair.apart.n if pair.apart is not None else 0), outcome(shown, pair)),
    ]


def _ratios(side: SideBySide) -> str:
    """The fitted best ratios of both studies, curve by curve."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for place, findings in enumerate(side.findings):
        for budget, part in parts(findings).items():
            for task in part.plan.shown:
                for curve, one in optima(part, task).items():
                    found.setdefault((budget, task, curve), ["–", "–"])[place] = place_of(one)
    rows = [[BUDGET_WORDS.get(budget, "–"), task, curve, *both] for (budget, task, curve), both in found.items()]
    return table_of(["equal", "task", "curve", *(f"best ratio in {name}" for name in side.names)], rows) if rows else ""


def _forest(side: SideBySide, pairs: Sequence[Pair]) -> Any:
    """Draw every difference with its interval, a line a stack, the study's order from the top."""
    shown = side.findings[0].shown(pairs[0].task)
    drawn = new_figure(7.6, 0.32 * len(pairs) + 1.0)
    axes = drawn.subplots()
    scale = 100 if shown.percent else 1
    for place, pair in enumerate(pairs):
        colour = _COLOURS[outcome(shown, pair)]
        bounded = pair.apart is not None and pair.apart.n > 1
        if pair.apart is not None and bounded:
            axes.plot([scale * pair.apart.low, scale * pair.apart.high], [place, place], color=colour, linewidth=2)
        face = colour if bounded else "white"
        axes.plot(scale * pair.change, place, "o", color=colour, markersize=6.5, markerfacecolor=face)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(pairs)), [pair.first.stack.label for pair in pairs])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    unit = "points" if shown.percent else shown.label
    better = "right is better" if shown.maximise else "left is better"
    axes.set_xlabel(
        f"difference in {shown.label}, {unit} ({better})" if shown.percent else f"difference in {unit} ({better})"
    )
    return drawn
