"""What a study cannot show, said from the facts of its run: its size, its seeds, its rates, where its curves are flat.

May import nothing above studies. page.py puts it at the end of a report; sentences.py says what was found.
"""

from __future__ import annotations

from hybridzoo.studies.findings import Findings
from hybridzoo.studies.reach import idle_stacks, some
from hybridzoo.studies.sentences import joined, percent
from hybridzoo.studies.solve import BUDGET_WORDS
from hybridzoo.studies.verdicts import optima, parts
from hybridzoo.training.units import count

_HELD = {
    "params": "Parameters were made equal by the width of the FFN, so a stack with larger mixers has a smaller FFN.",
    "train_flops": "Training FLOPs were made equal by the width of the FFN, so stacks differ in their parameters. "
    "They are counted, not timed.",
    "inference_bytes": "Inference memory was made equal by windows, KV heads and value head sizes, so a stack may have "
    "others than it was declared with; the table of stacks says which.",
}


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
    shares = sorted({stack.attention for stack in plan.stacks})
    if len(shares) > 2:
        said.append(f"Ratios tried: {joined([percent(share) for share in shares])}; what lies between is interpolated.")
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
    said += [f"What a content gate does is not shown {idle}." for idle in idle_stacks(plan.stacks, plan.longest)]
    said += _rates(findings)
    for budget, part in parts(findings).items():
        for task in part.plan.shown:
            said += _of_curves(part, task, budget if len(plan.budgets) > 1 else "")
    said += [_HELD[budget] for budget in plan.targets]
    others = [BUDGET_WORDS[budget] for budget in BUDGET_WORDS if budget not in plan.targets]
    if plan.targets and others:
        said.append(
            f"Equal {joined(others)} would be {'another comparison' if len(others) == 1 else 'other comparisons'}, "
            f"with {'another answer' if len(others) == 1 else 'other answers'}."
        )
    said.append(
        f"Inference memory is counted, not measured: what one sequence must keep after {study['context']:,} tokens, "
        "keys and values and convolution tails in bfloat16, recurrent states in float32."
    )
    if any(shown.levels and shown.percent for shown in plan.shown.values()):
        said.append("Recall is measured on a synthetic task, whose cliff need not stand at the same place in text.")
    return said


def _rates(findings: Findings) -> list[str]:
    """What learning rates leave open: one for all, or a grid whose edge some stacks chose."""
    tuned = findings.tuned
    if not tuned and findings.plan.study.get("tune"):
        return ["Each stack has a learning rate of its own, chosen by pilots; these rates are not here."]
    if not tuned:
        return [
            "All stacks trained with the same learning rate and schedule; each may have a better one of its own, and "
            "the comparison favours those for which this one happens to be right."
        ]
    grid = sorted({float(rate) for row in tuned for rate in row["scores"]})
    said = [
        f"Each stack trained on each task with the best of {len(grid)} learning rates, {grid[0]:g} to {grid[-1]:g}, "
        "chosen by pilots; the rest of the schedule is shared."
    ]
    edges = list(dict.fromkeys(f"{row['stack']} on {row['task']} ({row['lr']:g})" for row in tuned if row["edge"]))
    if len(grid) < 3:
        said.append("A grid of so few rates is all edges: for every stack a better rate may lie beyond it.")
    elif edges:
        said.append(
            f"Of {len(tuned)} choices {len(edges)} lie at the edge of that grid, so a better rate may lie beyond it: "
            f"{joined(some(edges))}."
        )
    return said


def _of_curves(findings: Findings, task: str, budget: str) -> list[str]:
    """Which curves leave the best ratio open: flat ones, and those best at an end where more could be tried."""
    found = optima(findings, task)
    where = f"On {task}" + (f", at equal {BUDGET_WORDS[budget]}" if budget else "")
    said = []
    flat = [name for name, one in found.items() if one.verdict == "flat"]
    if flat:
        said.append(f"{where}, which ratio of attention is best is not shown for {joined(flat)}: it is flat.")
    edge = [name for name, one in found.items() if one.verdict == "edge" and one.measured not in (0, 1)]
    if edge:
        said.append(f"{where}, the best ratio for {joined(edge)} is the last that was tried: beyond it is not shown.")
    unbounded = [name for name, one in found.items() if one.verdict == "unknown"]
    if unbounded:
        said.append(f"{where}, no best ratio is given for {joined(unbounded)}: {found[unbounded[0]].why}.")
    return said
