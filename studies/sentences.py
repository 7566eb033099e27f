"""What a report says in words: findings drawn from the numbers, and what the numbers cannot show.

Every sentence is computed, none is taken from a paper; where stacks cannot be told apart the text says so. May import
nothing above studies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hybridzoo.studies.comparisons import SEEDS
from hybridzoo.studies.findings import Cell, Findings, families, on_frontier, weighs_memory
from hybridzoo.studies.optimum import Optimum
from hybridzoo.studies.solve import BUDGET_WORDS
from hybridzoo.studies.stats import late_windows, spread
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.verdicts import (
    GUESSES,
    Order,
    Ranking,
    budget_orders,
    hybrid_orders,
    learnt,
    level_optima,
    mixer_pairs,
    near_guessing,
    optima,
    optimum_of,
    parts,
    ranking,
)
from hybridzoo.training.units import size


def score(shown: Shown, value: float) -> str:
    """Return a score for a sentence: `97.3 %` or `2.381`."""
    return f"{100 * value:.1f} %" if shown.percent else f"{value:.3f}"


def gap(shown: Shown, value: float) -> str:
    """Return the distance between two scores for a sentence: `62.8 points` (of a percentage), or `0.076`."""
    return f"{100 * value:.1f} points" if shown.percent else f"{value:.3f}"


def joined(words: Sequence[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def headline(findings: Findings, task: str, ratios: bool = True) -> list[str]:
    """Return what was found on one task, a sentence each: the ranking, the ratio curves, and what cannot be told.

    Stacks are compared on the seeds that all of them have a result of. Without `ratios` nothing is said of the curves:
    `curve_rows` has them as a table.
    """
    shown = findings.shown(task)
    if not findings.of(task):
        return [f"On {task} no trial has finished."]
    ranked = sorted(findings.comparable(task), key=lambda cell: cell.mean, reverse=shown.maximise)
    said = _incomplete(findings, task, ranked)
    if not ranked:
        return said
    best, worst = ranked[0], ranked[-1]
    guess = score(shown, shown.chance or 0)
    guessing = [cell.stack.label for cell in ranked if near_guessing(shown, cell)]
    if len(guessing) == len(ranked):
        return [
            *said,
            f"On {task} ({shown.label}) no stack reaches {GUESSES} times guessing ({guess}): too little was learnt to "
            "compare.",
        ]
    said.append(
        f"On {task} ({shown.label}), {best.stack.label} is {_best(ranked)}, {_with_seeds(shown, best)}"
        + (f"; {worst.stack.label} is last, {_with_seeds(shown, worst)}." if len(ranked) > 1 else ".")
    )
    if _lone(ranked):
        said.append("With one seed nothing says how far chance moves a score, so no order of stacks is established.")
    elif ties := ranking(ranked, shown.maximise).ties:
        said.append(_not_told(ranked, ties))
    for name, curve in families(ranked).items() if ratios else ():
        said += _ratio(shown, name, curve)
    said += [order_sentence(order) for order in hybrid_orders(findings, task)]
    if len(ranked) > 1 and weighs_memory(best.stack.budget):
        said.append(_frontier(shown, ranked))
    if guessing:
        said.append(f"Under {GUESSES} times guessing ({guess}): {joined(guessing)}.")
    return said


def _not_told(ranked: Sequence[Cell], ties: Sequence[Cell]) -> str:
    """Name the stacks that the seeds do not tell from the best, or the others where these are fewer."""
    tied = [cell.stack.label for cell in ties]
    apart = [cell.stack.label for cell in ranked[1:] if cell.stack.label not in tied]
    if not apart and len(tied) > 1:
        return "From the best, these seeds separate none of the others."
    if len(apart) < len(tied) - 1:
        return f"From the best, these seeds separate {joined(apart)}, and none of the others."
    return f"From the best, these seeds do not separate {joined(tied)}."


def _incomplete(findings: Findings, task: str, compared: Sequence[Cell]) -> list[str]:
    """Name the stacks that lack seeds, and the seeds that are left to compare on."""
    seeds = findings.plan.study["seeds"]
    counts = {
        stack.label: len(cell.seeds) if (cell := findings.cell(task, stack)) is not None else 0
        for stack in findings.plan.stacks
    }
    short = [f"{label} ({n} of {len(seeds)} seeds)" for label, n in counts.items() if n < len(seeds)]
    if not short:
        return []
    if not compared:
        return [f"On {task} no seed has a result of every stack, so stacks are not compared: {joined(short)}."]
    shared = compared[0].seeds
    named = f"seed{'' if len(shared) == 1 else 's'} {joined([str(seed) for seed in shared])}"
    return [
        f"On {task} results are missing of {joined(short)}; what follows is of {named} alone, which every stack with "
        "results has."
    ]


def _lone(cells: Sequence[Cell]) -> bool:
    """Whether stacks are to be compared on one seed."""
    return len(cells) > 1 and len(cells[0].scores) == 1


def _best(cells: Sequence[Cell]) -> str:
    return "best" if len(cells[0].scores) == 1 else "best on average"


def _with_seeds(shown: Shown, cell: Cell) -> str:
    if len(cell.scores) == 1:
        return f"{score(shown, cell.mean)} (one seed)"
    return f"{score(shown, cell.mean)} (seeds {', '.join(score(shown, value) for value in cell.scores)})"


def _ratio(shown: Shown, name: str, curve: Sequence[Cell]) -> list[str]:
    """Say where along a ratio curve the score changes, or that it hardly does, and where it is best."""
    if len({cell.stack.attention for cell in curve}) < 3:
        return []
    means = [cell.mean for cell in curve]
    noise = max(spread(cell.scores) for cell in curve)
    whole = max(means) - min(means)
    ranked = ranking(curve, shown.maximise)
    if not _lone(curve) and len(ranked.ties) == len(curve) - 1:
        return [
            f"Along the ratio of attention to {name} the means differ by {gap(shown, whole)}, and the seeds of one "
            f"stack by up to {gap(shown, noise)}: no ratio is told from the best, so flat, as far as this can tell."
        ]
    said = [_best_ratio(shown, name, ranked), _fitted(optimum_of(curve, shown.maximise))]
    if _several(curve):
        return said
    jump, before, after = _largest(shown, curve)
    verb = "gains" if jump > 0 else "loses"
    return [
        *said,
        f"Along the ratio of attention to {name}, the largest change is from {_share(before)} to {_share(after)} "
        f"attention, which {verb} {gap(shown, abs(jump))} ({score(shown, before.mean)} to "
        f"{score(shown, after.mean)}) of the {gap(shown, whole)} between the best and the worst mixture.",
    ]


def _best_ratio(shown: Shown, name: str, ranked: Ranking) -> str:
    """Name the best measured ratio and those that its seeds do not tell from it."""
    best = ranked.cells[0]
    ties = _tied(ranked)
    which = f"{_share(best)} attention" + (f" ({best.stack.label})" if _several(ranked.cells) else "")
    said = f"Of the mixtures of attention and {name}, that with {which} is {_best(ranked.cells)}"
    if _lone(ranked.cells):
        return f"{said}; one seed does not say whether by more than chance."
    if not ties and len(best.scores) < SEEDS:
        return f"{said}: no seed of another reaches one of its own."
    if not ties:
        return f"{said}: its difference from every other is significant (paired t, 5 % after Holm)."
    return f"{said}; the seeds do not separate it from {joined(ties)}."


def _several(curve: Sequence[Cell]) -> bool:
    """Whether stacks of a curve share a ratio, and so differ in something else too."""
    return len({cell.stack.attention for cell in curve}) < len(curve)


def _tied(ranked: Ranking) -> list[str]:
    """The stacks that are not told from the best, by their ratio, or by name where that is not all that differs."""
    ties = sorted(ranked.ties, key=lambda cell: cell.stack.attention)
    if _several(ranked.cells):
        return [f"{cell.stack.label} ({percent(cell.stack.attention)})" for cell in ties]
    return [percent(cell.stack.attention) for cell in ties]


def _fitted(fitted: Optimum) -> str:
    """The fitted optimum with its interval, or why there is none."""
    if fitted.verdict == "unknown":
        return f"No best ratio is fitted: {fitted.why}."
    if fitted.verdict == "flat":
        return f"Where the best ratio lies cannot be told: {fitted.why}."
    within = _within(fitted)
    if fitted.verdict == "inside":
        return f"Fitted, the best ratio is {percent(fitted.ratio)} attention; 95 % interval: {within}."
    beyond = "" if fitted.measured in (0, 1) else ", and may lie beyond it: other ratios were not tried"
    return (
        f"The best ratio is at the edge of the range, {percent(fitted.measured)} attention{beyond}; 95 % interval: "
        f"{within}."
    )


def percent(share: float) -> str:
    """Return a share for a sentence: `12.5 %`."""
    return f"{100 * share:.3g} %"


def between(findings: Findings, task: str) -> list[str]:
    """Say how far each two budgets order the same stacks alike."""
    each = {name: part for name, part in parts(findings).items() if learnt(part, task)}
    return [order_sentence(order) for order in budget_orders(each, task)]


def between_rows(findings: Findings, task: str) -> list[list[str]]:
    """Return where each budget puts the best ratio of every curve: the curve, then a text for each budget."""
    found = [optima(part, task) for part in parts(findings).values()]
    curves = dict.fromkeys(curve for one in found for curve in one)
    return [[curve, *(place_of(one[curve]) if curve in one else "–" for one in found)] for curve in curves]


def place_of(found: Optimum) -> str:
    """Return where a curve is best as part of a sentence: `near 25 % (12.5 % to 40 %)`."""
    if found.verdict == "unknown":
        return f"at a ratio that is not fitted ({found.why})"
    if found.verdict == "flat":
        return "at no ratio that can be told (flat)"
    at = f"near {percent(found.ratio)}" if found.verdict == "inside" else f"at the edge, {percent(found.measured)}"
    return f"{at} ({_within(found)})"


def _within(found: Optimum) -> str:
    same = percent(found.low) == percent(found.high)
    return f"{percent(found.low)} alone" if same else f"{percent(found.low)} to {percent(found.high)}"


CURVES = ("attention beside", "best ratio (95 % interval)", "best measured", "not told from it", "largest change")


def curve_rows(findings: Findings, task: str) -> list[list[str]]:
    """Return the ratio curves of a task as rows of texts under `CURVES`; of cells of the same seeds."""
    shown = findings.shown(task)
    cells = findings.comparable(task) if learnt(findings, task) else []
    rows = []
    for name, curve in families(cells).items():
        if len({cell.stack.attention for cell in curve}) < 3:
            continue
        ranked = ranking(curve, shown.maximise)
        best = ranked.cells[0]
        tied = joined(_tied(ranked)) if len(best.scores) > 1 else "one seed tells none"
        moved = "–"
        if not _several(curve):
            change, before, after = _largest(shown, curve)
            ends = f"{percent(before.stack.attention)} to {percent(after.stack.attention)}"
            moved = f"{ends}: {'+' if after.mean >= before.mean else '−'}{gap(shown, abs(change))}"
        measured = f"{percent(best.stack.attention)}: {score(shown, best.mean)}"
        rows.append([name, place_of(optimum_of(curve, shown.maximise)), measured, tied or "none", moved])
    return rows


def level_rows(findings: Findings, task: str) -> list[list[str]]:
    """Return where every curve is best at each difficulty of `Shown.levels`: the curve, then a text for each.

    None where so few seeds bound no optimum.
    """
    if max((len(cell.seeds) for cell in findings.comparable(task)), default=0) < SEEDS:
        return []
    found = level_optima(findings, task)
    curves = dict.fromkeys(curve for one in found.values() for curve in one)
    levels = [found.get(level, {}) for level, _ in findings.shown(task).levels]
    return [[curve, *(place_of(one[curve]) if curve in one else "–" for one in levels)] for curve in curves]


PAIRS = ("mixer", "against", "at attention", "difference", "95 % interval", "told apart")


def pair_rows(findings: Findings, task: str) -> list[list[str]]:
    """Return every two mixers of a task as rows of texts under `PAIRS`; a difference above 0 favours the first."""
    shown = findings.shown(task)
    scale, places, unit = (100, 1, " points") if shown.percent else (1, 3, "")
    scale *= 1 if shown.maximise else -1
    rows = []
    for pair in mixer_pairs(findings, task):
        mean, *ends = (scale * value + 0.0 for value in (pair.apart.mean, pair.apart.low, pair.apart.high))  # no -0
        low, high = (f"{end:+.{places}f}" for end in sorted(ends))
        shares = joined([percent(share) for share in pair.shares])
        told = f"{'no' if pair.tied else 'yes'} (p {pair.adjusted:.2g} after Holm)"
        rows.append([pair.first, pair.second, shares, f"{mean:+.{places}f}{unit}", f"{low} to {high}", told])
    return rows


def _largest(shown: Shown, curve: Sequence[Cell]) -> tuple[float, Cell, Cell]:
    """The largest change between neighbours of a curve, above 0 where it is for the better."""
    sign = 1 if shown.maximise else -1
    return max(((sign * (b.mean - a.mean), a, b) for a, b in itertools.pairwise(curve)), key=lambda step: abs(step[0]))


def order_sentence(order: Order) -> str:
    """Say how far two settings order stacks alike, how well that is known, and what chance would give."""
    found = order.correlation
    first, second = (_setting(name) for name in (order.first, order.second))
    said = f"The order of {found.n} stacks {first} against that {second}: "
    if math.isnan(found.tau):
        return f"{said}all means of one are equal, so there is none to compare."
    known = (
        "one seed bounds nothing" if math.isnan(found.low) else f"the seeds leave {found.low:.2f} to {found.high:.2f}"
    )
    return f"{said}Kendall's tau {found.tau:.2f} ({known}); {_chance(found.p)} of all orders are as like or unlike."


def _chance(p: float) -> str:
    return percent(p) if p >= 0.001 else "less than 0.1 %"


def _setting(name: str) -> str:
    return f"at equal {BUDGET_WORDS[name]}" if name in BUDGET_WORDS else f"with {name}"


def _frontier(shown: Shown, compared: Sequence[Cell]) -> str:
    cells = on_frontier(compared, shown.maximise)
    named = joined([f"{cell.stack.label} ({size(cell.stack.state_bytes)})" for cell in cells])
    stand, them = ("stands", "it") if len(cells) == 1 else ("stand", "them")
    return f"Of quality against inference memory, {named} {stand} on the frontier: no mean beats {them} on both."


def _share(cell: Cell) -> str:
    return percent(cell.stack.attention)


def training_notes(findings: Findings, task: str) -> list[str]:
    """Say which stacks gained late in training, so that they are not read as weak."""
    shown, cells = findings.shown(task), findings.of(task)
    if not cells:
        return []
    if any(len(cell.curve(shown.metric)[0]) < 2 for cell in cells):
        return [
            f"On {task} there is no learning curve (train.eval_every gives one), so nothing here says whether training "
            "was long enough."
        ]
    cells = [cell for cell in cells if not near_guessing(shown, cell)]  # what moves there is noise
    if not cells:
        return [f"On {task} no stack reaches {GUESSES} times guessing: whether a longer training would is not shown."]
    threshold = 0.02 if shown.percent else 0.01 * min(abs(cell.mean) for cell in cells)
    moving = [(cell.stack.label, cell.gained(shown.metric, shown.maximise)) for cell in cells]
    still = [(label, gain) for label, gain in moving if gain > threshold]
    steps = cells[0].curve(shown.metric)[0]
    before, later = ([str(steps[i]) for i in points] for points in late_windows(steps))
    compared = f"from step{'s' * (len(before) > 1)} {joined(before)} to {joined(later)}"
    if not still:
        return [f"On {task} no stack gained more than {gap(shown, threshold)} {compared}."]
    named = joined([f"{label} ({gap(shown, gain)})" for label, gain in still])
    if len(still) == len(findings.of(task)) and len(still) > 4:
        gains = [gain for _, gain in still]
        named = f"all of them ({gap(shown, min(gains))} to {gap(shown, max(gains))})"
    return [
        f"On {task} more than {gap(shown, threshold)} were gained {compared} by {named}. Their scores are what this "
        "budget gives, not what they can reach."
    ]
