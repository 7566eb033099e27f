"""What a report says in words: findings drawn from the numbers, and what the numbers cannot show.

Every sentence is computed, none is taken from a paper; where stacks cannot be told apart the text says so. May import
nothing above studies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hybridzoo.studies.findings import Cell, Findings, families, on_frontier
from hybridzoo.studies.stats import difference, spread
from hybridzoo.studies.tasks import Shown
from hybridzoo.training.units import count, size

GUESSES = 1.5  # times the score of guessing: a mean below it says that next to nothing was learnt
SEEDS = 3  # from so many on, an interval is worth more than a look at the range


def score(shown: Shown, value: float) -> str:
    """Return a score for a sentence: `97.3 %` or `2.381`."""
    return f"{100 * value:.1f} %" if shown.percent else f"{value:.3f}"


def gap(shown: Shown, value: float) -> str:
    """Return the distance between two scores for a sentence: `62.8 points` (of a percentage), or `0.076`."""
    return f"{100 * value:.1f} points" if shown.percent else f"{value:.3f}"


def joined(words: Sequence[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def headline(findings: Findings, task: str) -> list[str]:
    """Return what was found on one task, a sentence each: the ranking, the ratio curves, and what cannot be told.

    Stacks are compared on the seeds that all of them have a result of.
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
    guessing = [cell.stack.label for cell in ranked if _near_guessing(shown, cell)]
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
    elif ties := _not_told_apart(ranked, shown.maximise):
        said.append(f"From the best, these seeds do not separate {joined([cell.stack.label for cell in ties])}.")
    for name, curve in families(ranked).items():
        said += _ratio(shown, name, curve)
    if len(ranked) > 1:
        said.append(_frontier(shown, ranked))
    if guessing:
        said.append(f"Under {GUESSES} times guessing ({guess}): {joined(guessing)}.")
    return said


def _incomplete(findings: Findings, task: str, compared: Sequence[Cell]) -> list[str]:
    """Name the stacks that lack seeds, and the seeds that are left to compare on."""
    seeds, cells = findings.plan.study["seeds"], findings.cells[task]
    counts = {
        stack.label: len(cells[stack.label].seeds) if stack.label in cells else 0 for stack in findings.plan.stacks
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


def _near_guessing(shown: Shown, cell: Cell) -> bool:
    return shown.chance is not None and shown.maximise and cell.mean < GUESSES * shown.chance


def _not_told_apart(ranked: Sequence[Cell], maximise: bool) -> list[Cell]:
    """The cells, all of the same seeds, whose paired difference from the best is within its own noise.

    From `SEEDS` seeds on, the 95 % interval of the difference holds 0. With fewer an interval says little, and the
    ranges of the seeds must overlap.
    """
    best, rest = ranked[0], ranked[1:]
    ties = []
    for cell in rest:
        if len(best.scores) >= SEEDS:
            apart = difference(best.scores, cell.scores)
            tied = apart.low <= 0 <= apart.high
        elif maximise:
            tied = max(cell.scores) >= min(best.scores)
        else:
            tied = min(cell.scores) <= max(best.scores)
        if tied:
            ties.append(cell)
    return ties


def _ratio(shown: Shown, name: str, curve: Sequence[Cell]) -> list[str]:
    """Say where along a ratio curve the score changes, or that it hardly does."""
    if len({cell.stack.attention for cell in curve}) < 3:
        return []
    sign = 1 if shown.maximise else -1
    means = [cell.mean for cell in curve]
    noise = max(spread(cell.scores) for cell in curve)
    whole = max(means) - min(means)
    ranked = sorted(curve, key=lambda cell: cell.mean, reverse=shown.maximise)
    if not _lone(curve) and len(_not_told_apart(ranked, shown.maximise)) == len(curve) - 1:
        return [
            f"Along the ratio of attention to {name} the means differ by {gap(shown, whole)}, and the seeds of one "
            f"stack by up to {gap(shown, noise)}: no ratio is told from the best, so flat, as far as this can tell."
        ]
    steps = [(sign * (b.mean - a.mean), a, b) for a, b in itertools.pairwise(curve)]
    jump, before, after = max(steps, key=lambda step: abs(step[0]))
    verb = "gains" if jump > 0 else "loses"
    return [
        _best_ratio(shown, name, curve),
        f"Along the ratio of attention to {name}, the largest change is from {_share(before)} to {_share(after)} "
        f"attention, which {verb} {gap(shown, abs(jump))} ({score(shown, before.mean)} to "
        f"{score(shown, after.mean)}) of the {gap(shown, whole)} between the best and the worst mixture.",
    ]


def _best_ratio(shown: Shown, name: str, curve: Sequence[Cell]) -> str:
    """Name the best measured ratio and those that its seeds do not tell from it: the interval of the optimum."""
    ranked = sorted(curve, key=lambda cell: cell.mean, reverse=shown.maximise)
    ties = sorted({cell.stack.attention for cell in _not_told_apart(ranked, shown.maximise)})
    ties = [share for share in ties if share != ranked[0].stack.attention]
    said = f"Of the mixtures of attention and {name}, that with {_share(ranked[0])} attention is {_best(ranked)}"
    if _lone(ranked):
        return f"{said}; one seed does not say whether by more than chance."
    if not ties and len(ranked[0].scores) < SEEDS:
        return f"{said}: no seed of another reaches one of its own."
    if not ties:
        return f"{said}: the 95 % interval of its difference from every other excludes zero."
    return f"{said}; the seeds do not separate it from {joined([f'{100 * share:.3g} %' for share in ties])}."


def _frontier(shown: Shown, compared: Sequence[Cell]) -> str:
    cells = on_frontier(compared, shown.maximise)
    named = joined([f"{cell.stack.label} ({size(cell.stack.state_bytes)})" for cell in cells])
    stand, them = ("stands", "it") if len(cells) == 1 else ("stand", "them")
    return f"Of quality against inference memory, {named} {stand} on the frontier: no mean beats {them} on both."


def _share(cell: Cell) -> str:
    return f"{100 * cell.stack.attention:.3g} %"


def training_notes(findings: Findings, task: str) -> list[str]:
    """Say which stacks were still learning when training stopped, so that they are not read as weak."""
    shown, cells = findings.shown(task), findings.of(task)
    if not cells:
        return []
    if any(len(cell.curve(shown.metric)[0]) < 2 for cell in cells):
        return [
            f"On {task} no learning curve was recorded (train.eval_every), so nothing here says whether training was "
            "long enough."
        ]
    cells = [cell for cell in cells if not _near_guessing(shown, cell)]  # what moves there is noise
    if not cells:
        return [f"On {task} no stack reaches {GUESSES} times guessing: whether a longer training would is not shown."]
    threshold = 0.02 if shown.percent else 0.01 * min(abs(cell.mean) for cell in cells)
    moving = [(cell, cell.gained(shown.metric, shown.maximise)) for cell in cells]
    still = [f"{cell.stack.label} (by {gap(shown, gain)})" for cell, gain in moving if gain > threshold]
    compared = "the last fifth of training against the fifth before it"
    if not still:
        return [f"On {task}, no stack improved by more than {gap(shown, threshold)}, {compared}."]
    return [
        f"On {task}, still improving, {compared}: {joined(still)}. Their scores are what this budget gives, not what "
        "they can reach."
    ]


def limits(findings: Findings) -> list[str]:
    """Say what the study does not show, from the facts of this run."""
    plan, study = findings.plan, findings.plan.study
    counts = [n for stack in plan.stacks for n in stack.parameters.values()]
    least, most = count(min(counts)), count(max(counts))
    scale = least if least == most else f"{least} to {most}"
    said = [
        f"Models here have {scale} parameters: whether an order of stacks found at this size holds at another is not "
        "shown."
    ]
    for task in plan.shown:
        tokens = [history.tokens for cell in findings.of(task) for history in cell.histories]
        if tokens:
            said.append(
                f"On {task} each trained on {count(max(tokens))} tokens; a longer training may order them otherwise."
            )
    seeds = len(study["seeds"])
    if seeds < 3:
        said.append(
            "One seed says nothing of chance: differences may be luck, and the table has no intervals."
            if seeds == 1
            else "Two seeds bound chance only loosely: small differences may be luck, and the intervals in the table "
            "are wide for that reason."
        )
    said.append(
        "All stacks trained with the same learning rate and schedule; each may have a better one of its own, and the "
        "comparison favours those for which this one happens to be right."
    )
    if plan.target is not None:
        said.append(
            "Parameters were made equal by the width of the FFN, so a stack with larger mixers has a smaller FFN. "
            "Equal training compute or equal inference memory would be other comparisons, with other answers."
        )
    said.append(
        f"Inference memory is counted, not measured: what one sequence must keep after {study['context']:,} tokens, "
        "keys and values and convolution tails in bfloat16, recurrent states in float32."
    )
    if any(shown.levels for shown in plan.shown.values()):
        said.append("Recall is measured on a synthetic task, whose cliff need not stand at the same place in text.")
    return said
