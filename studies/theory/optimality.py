"""Hybrid optimality: whether four published perplexities single out 3:1, and what a study measured beside them.

The paper prints one run a ratio and no spread. Its own abstract (version 1) calls 0.18 a 4.5-sigma effect, which puts
one run's standard deviation at 0.04; read as that of a difference of two runs, at 0.028, with the same verdict. How
sure the optimum is follows from that, by redrawing the four numbers.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hybridzoo.studies.findings import Cell, families
from hybridzoo.studies.stats import difference, t_quantile
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, PAPER, Line, Panel, Result, Settings, Statement

PUBLISHED = {"1:1": 15.94, "2:1": 15.82, "3:1": 15.71, "4:1": 15.78}  # recurrent to attention: WikiText perplexity
BEST = "3:1"
EFFECT, SIGMAS = 0.18, 4.5  # the abstract's own
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)


class Gap(NamedTuple):
    """How far a ratio is behind 3:1, and the noise that would hide it."""

    ratio: str
    attention: float
    perplexity: float
    behind: float
    sigmas: float
    largest_spread_one_run: float
    largest_spread_three_seeds: float
    best_in_redraws: float


class Measured(NamedTuple):
    """One ratio of a study: its scores over seeds, and the paired difference to the family's best mean."""

    budget: str
    task: str
    family: str
    stack: str
    attention: float
    seeds: int
    mean: float
    behind_best: float
    low_together: float | None
    high_together: float | None


def share(ratio: str) -> float:
    """Return the share of attention in `recurrent:attention`."""
    recurrent, attention = (int(part) for part in ratio.split(":"))
    return attention / (recurrent + attention)


def largest_spread(gap: float, seeds: int) -> float:
    """Return the standard deviation of a run at which `gap` between two means of `seeds` runs is just seen at 95 %.

    With one run a ratio the spread must be known from elsewhere (normal); with more it is estimated from the runs
    themselves (Student's t of the unpaired difference, equal spreads).
    """
    if seeds == 1:
        return gap / (NORMAL_95 * math.sqrt(2))
    return gap / (t_quantile(0.975, 2 * seeds - 2) * math.sqrt(2 / seeds))


def seeds_needed(gap: float, spread: float) -> int:
    """Return how many seeds a ratio let `gap` be seen at 95 % in half of all studies, for runs that spread so."""
    for seeds in range(2, 10_000):
        if largest_spread(gap, seeds) >= spread:
            return seeds
    return 10_000


def redraw(spread: float, draws: int, seed: int) -> dict[str, float]:
    """Return how often each ratio is best when the published numbers are true means, measured once with `spread`."""
    draw = random.Random(seed)
    wins = dict.fromkeys(PUBLISHED, 0)
    for _ in range(draws):
        seen = {ratio: draw.gauss(value, spread) for ratio, value in PUBLISHED.items()}
        wins[min(seen, key=lambda ratio: seen[ratio])] += 1
    return {ratio: count / draws for ratio, count in wins.items()}


def probe(settings: Settings) -> Result:
    """Say what the published differences can carry, and set a study's ratio curves beside them."""
    spread = EFFECT / SIGMAS
    wins = redraw(spread, settings.pick(500, 20_000), settings.seed)
    best = PUBLISHED[BEST]
    gaps = [
        Gap(
            *(ratio, share(ratio), value, value - best, (value - best) / (spread * math.sqrt(2))),
            *(largest_spread(value - best, 1), largest_spread(value - best, 3), wins[ratio]),
        )
        for ratio, value in PUBLISHED.items()
    ]
    rivals = [gap for gap in gaps if gap.ratio != BEST]
    bar = statistics.NormalDist().inv_cdf(1 - 0.025 / len(rivals))  # three comparisons, Bonferroni
    unseen = [gap.ratio for gap in rivals if gap.sigmas < bar]
    closest = min(rivals, key=lambda gap: gap.behind)
    published = Statement(
        "3:1 is the best of 1:1, 2:1, 3:1 and 4:1.",
        OPEN if unseen else HOLDS,
        f"{closest.ratio} is {closest.behind:.2f} behind; one run's spread would have to be below "
        f"{closest.largest_spread_one_run:.3f}, and the paper's own {EFFECT} at {SIGMAS} sigma says {spread:.3f}; not "
        f"told from 3:1 at 95 % over three comparisons: {', '.join(unseen) or 'none'}",
    )
    measured = read_study(settings.study) if settings.study is not None else []
    statements = (published, *_measured_statements(measured, settings.study))
    tables = {"published": Table("The published ratios and what would hide them", Gap._fields, tuple(gaps))}
    if measured:
        tables["measured"] = Table(f"Ratios of {settings.study}", Measured._fields, tuple(measured))
    return Result(
        name="optimality",
        title="Hybrid optimality",
        claim="Three recurrent layers to one of attention is the best ratio: perplexity "
        + ", ".join(f"{ratio} {value}" for ratio, value in PUBLISHED.items())
        + ".",
        source=f"{PAPER}, hybrid optimality",
        statements=statements,
        finding=(
            f"From one run a ratio, with the spread that the paper's own significance implies, 3:1 comes out best in "
            f"{wins[BEST]:.0%} of redraws and {closest.ratio} in {wins[closest.ratio]:.0%}. To see the "
            f"{closest.behind:.2f} between them takes about {seeds_needed(closest.behind, spread)} seeds a ratio."
        ),
        tables=tables,
        shown=tuple(tables),
        panels=(_published_panel(spread), *_measured_panels(measured)),
        facts={"implied_spread": spread, "seeds_needed": seeds_needed(closest.behind, spread)},
    )


def read_study(folder: Path) -> list[Measured]:
    """Read the ratio curves of a study's run: every family with at least two ratios, by budget and task.

    Raises: `SpecError` where the folder holds no run.
    """
    from hybridzoo.studies.report import read_findings

    findings = read_findings(folder)
    rows: list[Measured] = []
    for budget in findings.plan.budgets:
        held = findings.at(budget)
        for task, shown in held.plan.shown.items():
            for family, cells in families(held.comparable(task)).items():
                if len({cell.stack.attention for cell in cells}) > 1:
                    rows += compare(task, family, cells, shown.maximise)
    return rows


def compare(task: str, family: str, cells: Sequence[Cell], maximise: bool) -> list[Measured]:
    """Return a curve's ratios, each with its paired difference to the curve's best mean; positive is behind.

    The intervals of one curve hold together with 95 % (Bonferroni).
    """
    best = (max if maximise else min)(cells, key=lambda cell: cell.mean)
    sign = -1 if maximise else 1
    confidence = 1 - 0.05 / max(1, len(cells) - 1)
    rows = []
    for cell in cells:
        gap = difference([sign * x for x in cell.scores], [sign * x for x in best.scores], confidence)
        low, high = (None, None) if gap.n < 2 else (gap.low, gap.high)
        stack = cell.stack
        named = (stack.budget, task, family, stack.label, stack.attention)
        rows.append(Measured(*named, gap.n, cell.mean, gap.mean, low, high))
    return rows


def _measured_statements(rows: Sequence[Measured], study: Path | None) -> list[Statement]:
    text = "A study's own best ratio is 3:1, a quarter of attention."
    if study is None:
        return [
            Statement(text, OPEN, "no study was given: --study DIR, with ratios on both sides of 1/4 and several seeds")
        ]
    if not rows:
        return [Statement(text, OPEN, f"{study} has no family with results at two ratios or more")]
    return [
        _judge([row for row in rows if row[:3] == curve])
        for curve in dict.fromkeys(row[:3] for row in rows)  # budget, task, family
    ]


def _judge(rows: Sequence[Measured]) -> Statement:
    """Judge one curve: a quarter must be best and told from all other ratios, or all its stacks from the best."""
    best = min(rows, key=lambda row: row.behind_best)
    text = f"A quarter of attention is best: {', '.join(filter(None, rows[0][:3]))}."
    quarter = [row for row in rows if math.isclose(row.attention, share(BEST))]
    if not quarter:
        ratios = ", ".join(f"{row.attention:.3g}" for row in rows)
        return Statement(text, OPEN, f"the study has no stack with a quarter of attention (it has {ratios})")
    told = [row for row in rows if row.low_together is not None and row is not best and row.low_together > 0]
    said = f"best mean at {best.attention:.3g} ({best.stack}, {best.mean:.4g}, {best.seeds} seeds)"
    near = [row for row in rows if row is not best and row not in told]
    several = len({row.attention for row in rows}) < len(rows)  # which then differ in something else as well
    if near:
        names = [f"{row.attention:.3g}{f' ({row.stack})' if several else ''}" for row in near]
        said += f"; not told from it: {', '.join(names)}"
    if all(row in told for row in quarter):
        return Statement(text, FAILS, said)
    return Statement(text, HOLDS if best in quarter and all(row in quarter for row in near) else OPEN, said)


def _published_panel(spread: float) -> Panel:
    x = tuple(share(ratio) for ratio in PUBLISHED)
    y = tuple(PUBLISHED.values())
    half, band = NORMAL_95 * spread, "95 % of one run, by the paper's own sigma"
    return Panel(
        "As published",
        "share of layers that are attention",
        "perplexity (lower is better)",
        (
            Line("published, one run each", x, y),
            Line(band, x, tuple(value - half for value in y), "dashes"),
            Line(band, x, tuple(value + half for value in y), "dashes"),
        ),
        marks=((share(BEST), BEST),),
    )


def _measured_panels(rows: Sequence[Measured]) -> list[Panel]:
    panels = []
    for budget, task in dict.fromkeys((row.budget, row.task) for row in rows):
        here = [row for row in rows if (row.budget, row.task) == (budget, task)]
        lines = []
        for family in dict.fromkeys(row.family for row in here):
            mine = [row for row in here if row.family == family]
            lines.append(Line(family, tuple(r.attention for r in mine), tuple(r.mean for r in mine)))
        title = f"Measured: {task}{f', equal {budget}' if budget else ''}"
        marks = ((share(BEST), BEST),)
        panels.append(Panel(title, "share of layers that are attention", "score", tuple(lines), marks=marks))
    return panels
