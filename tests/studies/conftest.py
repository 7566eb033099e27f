"""A study's plan and results made up from a few numbers, and one that was run: what tests of reports and runs read."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from small_study import SMALL, run, scores

from hybridzoo.studies.plan import Plan
from hybridzoo.studies.stack import Kind, Stack
from hybridzoo.studies.tasks import Shown
from hybridzoo.studies.trial import Trial, result_of
from hybridzoo.training import Evaluation, History

RECALL = Shown(
    metric="accuracy",
    label="recall of 32 pairs",
    maximise=True,
    percent=True,
    chance=1 / 32,
    about="Recall.",
    level_axis="key-value pairs in the sequence",
    levels=((4, "accuracy@4"), (8, "accuracy@8"), (16, "accuracy@16"), (32, "accuracy")),
    stages=(40, 80, 120),
)
TEXT = Shown(metric="bits_per_byte", label="bits a byte", maximise=False, about="Text.")

# label, family, attention share, recall, bits a byte
ROWS = [
    ("attention", "attention", 1.0, 0.997, 2.60),
    ("3/4 attention", "carve", 0.75, 0.996, 2.52),
    ("1/2 attention", "carve", 0.5, 0.998, 2.47),
    ("1/4 attention", "carve", 0.25, 0.995, 2.44),
    ("carve", "carve", 0.0, 0.48, 2.41),
    ("carve[erase=token]", "carve[erase=token]", 0.0, 0.47, 2.42),
    ("gdn2", "gdn2", 0.0, 0.35, 2.38),
]


def make_history(final: float, shown: Shown, draw: random.Random) -> History:
    history = History(device="cpu", tokens=230_000, seconds=11.0)
    start = shown.chance if shown.chance is not None else 6.0
    for step in range(10, 151, 10):
        done = 1 / (1 + math.exp(-(step - 90) / 12)) if shown.percent else 1 - math.exp(-step / 25)
        value = start + (final - start) * done + draw.gauss(0, 0.005)
        if step == 150:
            value = final
        metrics = {shown.metric: value}
        if step == 150:
            metrics |= {m: min(1.0, final * 32 / n) for n, m in shown.levels if m != shown.metric}
        history.steps.append(step)
        history.loss.append(3 - 2 * done)
        history.lr.append(1e-2)
        history.grad_norm.append(1.0)
        history.evaluations.append(Evaluation(step, metrics))
    return history


@pytest.fixture
def make_results() -> Callable[..., tuple[Plan, list[dict[str, Any]]]]:
    return build


@pytest.fixture
def make_kind() -> Callable[..., Kind]:
    return kind_of


def kind_of(family: str, attention: float, **rest: Any) -> Kind:
    return Kind(
        recurrent={} if attention == 1 else {f"{family}.n_heads": 4},
        attention={} if attention == 0 else {"attention.n_heads": 4},
        rest={"d_model": 64, **rest},
        parallel=False,
    )


def build(rows=ROWS, seeds=(0, 1), noise=0.01, excluded=(), hold=True) -> tuple[Plan, list[dict[str, Any]]]:
    """Return a plan over `rows`, held to equal parameters or to nothing, and one finished result for each trial."""
    budget = "params" if hold else ""
    shown = {"recall": RECALL, "text": TEXT}
    stacks, trials, results = [], [], []
    draw = random.Random(0)
    for i, (label, family, attention, *_) in enumerate(rows):
        stacks.append(
            Stack(
                label=label,
                budget=budget,
                pattern="a*4",
                family=family,
                attention=attention,
                kind=kind_of(family, attention),
                ffn_width=100 + i,
                specs={name: {"layers": "a", "mixers": {"a": {"row": i}}} for name in shown},
                parameters={"recall": 149_000 + 300 * i, "text": 159_000 + 300 * i},
                train_flops={"recall": 900_000, "text": 960_000},
                decode_flops={"recall": 300_000, "text": 320_000},
                state_bytes=int(4 * attention * 2**20 + 4 * (1 - attention) * 2**11) + 64 * i,
                kv_bytes=int(4 * attention * 2**20),
            )
        )
    for seed in seeds:
        for task, column in (("recall", 3), ("text", 4)):
            for stack, row in zip(stacks, rows, strict=True):
                trial = Trial(
                    stack=stack.label,
                    task=task,
                    seed=seed,
                    spec=stack.specs[task],
                    task_entry={"type": "mqar" if task == "recall" else "bytes"},
                    fingerprint={"task": task},
                    train={"steps": 150, "seed": seed},
                    parameters=stack.parameters[task],
                    code="",
                    budget=budget,
                )
                final = row[column] + draw.uniform(-noise, noise)
                history = make_history(min(final, 1.0) if task == "recall" else final, shown[task], draw)
                trials.append(trial)
                results.append(
                    result_of(
                        trial,
                        status="finished",
                        metrics=history.metrics,
                        history={**history.to_dict()},
                        seconds=11.5,
                        environment={"torch": "2.x", "device": "cpu", "threads": 1},
                    )
                )
    study = {
        "name": "made-up",
        "about": "Numbers made up to test reports.",
        "spec": {"d_model": 64},
        "stacks": {stack.label: {} for stack in stacks},
        "tasks": {},
        "seeds": list(seeds),
        "hold": {"params": "largest", "tolerance": 0.02} if hold else None,
        "context": 4096,
    }
    plan = Plan(
        study=study,
        budgets=(budget,),
        targets={budget: 150_000} if hold else {},
        lengths={"recall": 96, "text": 256},
        stacks=tuple(stacks),
        excluded=tuple((budget, *one) for one in excluded),
        shown=shown,
        trials=tuple(trials),
    )
    return plan, results


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done, _ = run(SMALL, folder)
    assert (done.finished, done.reused, done.failed) == (4, 0, ())
    return folder


@pytest.fixture
def finished(undisturbed):
    """What an undisturbed run gives."""
    return scores(undisturbed)


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A copy of the undisturbed run, for something to happen to."""
    return shutil.copytree(undisturbed, tmp_path / "run")
