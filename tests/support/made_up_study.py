"""A large study made up from a formula: several mixers, ratios, placements, budgets and gates, without any training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

from hybridzoo.studies.plan import Plan
from hybridzoo.studies.stack import Kind, Stack
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.trial import Trial, result_of
from hybridzoo.training import Evaluation, History

TASKS = {
    "recall": Shown(
        metric="accuracy", label="recall of 32 pairs", maximise=True, percent=True, chance=1 / 32, about="Recall."
    ),
    "text": Shown(metric="bits_per_byte", label="bits a byte", maximise=False, about="Text."),
}
RATIOS = (0.0, 0.125, 0.25, 0.5, 1.0)
FAMILIES = ("carve", "gdn2", "mamba2")
GATES = {
    "carve": ("decay", "content", "erase", "correct"),
    "gdn2": ("decay", "correct", "write"),
    "mamba2": ("decay", "write"),
}


def cliff(task: str, family: str, ratio: float, place: str, budget: str) -> float:
    """Recall jumps as soon as there is attention; text is best near a quarter of it."""
    rank = FAMILIES.index(family) if family in FAMILIES else 0
    late = 0.04 * ("first", "even", "last").index(place) if place else 0.0
    if task == "recall":
        return (0.55 - 0.1 * rank if ratio == 0 else 0.985 - 0.004 * rank - late) - (0.02 if budget else 0)
    return 2.4 + 0.03 * rank + 0.3 * (ratio - (0.5 if budget == "inference_bytes" else 0.25)) ** 2 + late


def made_up(
    score: Callable[[str, str, float, str, str], float] = cliff,
    *,
    families: tuple[str, ...] = FAMILIES,
    ratios: tuple[float, ...] = RATIOS,
    places: tuple[str, ...] = ("",),
    budgets: tuple[str, ...] = ("",),
    seeds: tuple[int, ...] = (0, 1, 2),
    noise: float = 0.006,
    name: str = "made-up grid",
) -> tuple[Plan, list[dict[str, Any]]]:
    """Return a plan of every combination, and one finished result for each trial. `score` takes task, family, ratio,
    placement and budget."""
    draw = random.Random(5)
    stacks = [
        _stack(family, ratio, place, budget, number)
        for budget in budgets
        for number, (family, ratio, place) in enumerate(_combinations(families, ratios, places))
    ]
    trials, results = [], []
    for seed, (task, shown), stack in itertools.product(seeds, TASKS.items(), stacks):
        trial = Trial(
            stack=stack.label,
            task=task,
            seed=seed,
            spec=stack.specs[task],
            task_entry={"type": task},
            fingerprint={"task": task},
            train={"steps": 100, "seed": seed},
            parameters=stack.parameters[task],
            code="c",
            budget=stack.budget,
        )
        value = score(task, stack.family, stack.attention, stack.placement, stack.budget) + draw.gauss(0, noise)
        value = min(1.0, max(0.0, value)) if shown.percent else value
        history = History(device="cpu", tokens=100_000, seconds=5.0)
        for step in range(10, 101, 10):
            history.steps.append(step)
            history.loss.append(1.0)
            history.lr.append(1e-2)
            history.grad_norm.append(1.0)
            far = 0.6 ** (step / 10) * (step < 100)
            start = 0.03 if shown.percent else 6.0
            history.evaluations.append(Evaluation(step, {shown.metric: value + far * (start - value)}))
        trials.append(trial)
        results.append(
            result_of(
                trial,
                status="finished",
                metrics=history.metrics,
                history=history.to_dict(),
                seconds=6.0,
                environment={"torch": "2.x", "device": "cpu"},
                gates=_gates(stack, draw),
            )
        )
    plan = Plan(
        study={
            "name": name,
            "about": "Numbers made up to test reports.",
            "spec": {"d_model": 64},
            "stacks": {},
            "tasks": {},
            "seeds": list(seeds),
            "hold": {"tolerance": 0.01} if budgets != ("",) else None,
            "context": 4096,
        },
        budgets=budgets,
        targets={budget: 150_000 for budget in budgets if budget},
        lengths={"recall": 96, "text": 256},
        stacks=tuple(stacks),
        excluded=(),
        shown=TASKS,
        trials=tuple(trials),
    )
    return plan, results


def _combinations(
    families: tuple[str, ...], ratios: tuple[float, ...], places: tuple[str, ...]
) -> list[tuple[str, float, str]]:
    found = []
    for family, ratio in itertools.product(families, ratios):
        if 0 < ratio < 1:
            found += [(family, ratio, place) for place in places]
        elif ratio == 0:
            found.append((family, ratio, ""))
    return found + ([("attention", 1.0, "")] if 1.0 in ratios else [])


def _stack(family: str, ratio: float, place: str, budget: str, number: int) -> Stack:
    label = "attention" if ratio == 1 else " ".join(filter(None, [family, f"{ratio:.3g}" if ratio else "alone", place]))
    cache = 2**20 // (2 if budget == "inference_bytes" else 1)
    return Stack(
        label=label,
        budget=budget,
        solved="met by the width of the FFN" if budget else "",
        placement=place,
        pattern=f"{family} {ratio:g} {place}",
        family=family,
        attention=ratio,
        kind=Kind(
            recurrent={} if ratio == 1 else {f"{family}.n_heads": 4},
            attention={} if ratio == 0 else {"attention.n_heads": 4},
            rest={"d_model": 64},
            parallel=False,
        ),
        ffn_width=100 + number,
        specs={name: {"layers": "a", "mixers": {"a": {"stack": label, "budget": budget}}} for name in TASKS},
        parameters={"recall": 149_000 + 20 * number, "text": 159_000 + 20 * number},
        train_flops={"recall": 150_000 + 10 * number, "text": 160_000 + 10 * number},
        decode_flops={"recall": 300_000, "text": 320_000},
        state_bytes=int(4 * ratio * cache + 4 * (1 - ratio) * 2**13 * (1 + number % 3)),
        kv_bytes=int(4 * ratio * cache),
    )


def _gates(stack: Stack, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for layer in range(8):
        if stack.attention and (layer + 1) % round(1 / stack.attention) == 0:
            continue
        for gate in GATES.get(stack.family, ()):
            middle = {"decay": 0.9 + 0.012 * layer, "erase": 0.01, "content": 0.1, "correct": 0.6, "write": 0.4}[gate]
            middle += draw.gauss(0, 0.002)
            spread = {"decay": 0.01, "erase": 0.002, "content": 0.3}.get(gate, 0.15)
            levels = {"q05": -2, "q25": -1, "median": 0, "q75": 1, "q95": 2}
            values = {name: middle + place * spread / 2 for name, place in levels.items()}
            rows.append({"layer": layer, "mixer": stack.family, "gate": gate, "mean": middle, **values})
    return rows
