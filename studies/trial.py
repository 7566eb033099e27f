"""One trial: one stack trained on one task from one seed, described by plain data, run anywhere, and kept as a file.

A trial's key is a hash of all that decides its result, so a result is reused exactly where it would come out again. May
import architectures and training; plan.py makes trials, runner.py hands them to workers.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hybridzoo.architectures import Spec, build_model
from hybridzoo.mixers.schema import convert
from hybridzoo.studies.code import changed_modules, zoo_digest
from hybridzoo.studies.engines.base import Send, describe
from hybridzoo.studies.environment import environment
from hybridzoo.studies.gates import gate_statistics
from hybridzoo.studies.results import SHORT_KEY, canonical, content_key
from hybridzoo.studies.stack import trained_part
from hybridzoo.studies.tasks import Shown, StudyTask, build_task
from hybridzoo.training import DivergedError, Evaluation, History, TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Plain data throughout: it pickles, it is JSON, and it says everything that a worker needs.

    `stack` and `task` are the study's labels; `spec` is a resolved spec with the task's vocabulary; `task_entry` builds
    the task, `fingerprint` is what decides its data; `train` is a whole `TrainConfig`, resolved and with its seed;
    `code` is the hash of the code that trains and scores (code.py). `budget` is what the stack was made equal in: where
    it comes to one spec under several budgets, their trials have one key, and one result.
    """

    stack: str
    task: str
    seed: int
    spec: dict[str, Any]
    task_entry: dict[str, Any]
    fingerprint: dict[str, Any]
    train: dict[str, Any]
    parameters: int
    code: str
    budget: str = ""

    @property
    def key(self) -> str:
        """The hash of the model, the task's data, the training, the seed and the code: labels and budget are not in it,
        nor how a spec is written, nor which of several GPUs it is."""
        decides = {
            "spec": trained_part(self.spec),
            "task": self.fingerprint,
            "train": _on_any_device(self.train),
            "seed": self.seed,
            "code": self.code,
        }
        return content_key(decides)

    @property
    def file_name(self) -> str:
        """A name for people to read, made unique by the key at its end, by which alone it is found again."""
        return f"{slug(self.stack)}--{slug(self.task)}--seed{self.seed}--{self.key[:SHORT_KEY]}.json"

    @property
    def title(self) -> str:
        """What a person needs to tell it from others of its budget and learning rate: see `Plan.titles`."""
        return f"{self.stack} · {self.task} · seed {self.seed}"


def data_mark(fingerprint: Mapping[str, Any]) -> str:
    """Return a short hash of what decides a task's data: where two are equal, seeds draw the same batches."""
    return content_key(fingerprint)[:SHORT_KEY]


def _on_any_device(train: Mapping[str, Any]) -> dict[str, Any]:
    """The training words without the number of a GPU."""
    return {name: value.partition(":")[0] if name == "device" else value for name, value in train.items()}


def slug(text: str) -> str:
    """Return `text` as part of a file name: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"


@dataclass(frozen=True)
class Job:
    """A trial, the user's modules that a worker imports first, and the hashes of the code that it was planned with.

    `zoo` is of the zoo's own code, `own` of the user's modules (from `own_digests`); empty ones are not compared.
    Plain data without a path: a worker writes nothing, it may stand on another machine.
    """

    trial: Trial
    imports: tuple[str, ...] = ()
    zoo: str = ""
    own: Mapping[str, str] = field(default_factory=dict)


class OtherCodeError(RuntimeError):
    """A worker's code or data is not what the trial was planned with, so its result would be another trial's."""


class NoScoreError(RuntimeError):
    """A task that does not give the score by which it is to be shown."""


def run_job(job: Job, send: Send) -> dict[str, Any]:
    """Run a trial and return its result; `send` gets the training's `Progress`. Runs in a worker.

    Raises: `OtherCodeError` where the zoo or the task's data differ here from those of the plan; `DivergedError` for a
    score that is not a finite number, and `NoScoreError` for one that is missing; what training raises.
    """
    started = time.perf_counter()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this worker's last trial needed, others may need: they share the GPU
    trial = job.trial
    task = task_of(job)
    config = convert(TrainConfig, trial.train, f"tasks.{trial.task}.train")
    if config.compiled():
        torch.compiler.reset()  # torch gives up on a function that it compiled often, as a worker does, model by model
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(trial.seed)
        model = build_model(Spec.from_dict(trial.spec, f"stack '{trial.stack}'"))
        history = train(model, task, config, send)
        check_scores(history, task.shown, config.steps)
        gates, gates_error = _gates(model, task, config)
    return result_of(
        trial,
        status="finished",
        metrics=history.metrics,
        history=history.to_dict(),
        gates=gates,
        gates_error=gates_error,
        seconds=time.perf_counter() - started,
        environment=environment(history.device),
    )


def check_scores(history: History, shown: Shown, steps: int) -> None:
    """Refuse scores that could be neither kept nor shown: any that is not finite, and last ones without what is shown.

    Raises: `DivergedError` or `NoScoreError`, which name the score and the step.
    """
    for evaluation in (*history.evaluations, Evaluation(steps, history.quick_at_end)):
        for name, value in evaluation.metrics.items():
            if not math.isfinite(value):
                said = f"step {evaluation.step} of {steps}: the score '{name}' is {value}, not a finite number"
                raise DivergedError(said, evaluation.step)
    for name in (shown.metric, *(metric for _, metric in shown.levels)):
        if name not in history.metrics:
            given = ", ".join(history.metrics) or "none"
            raise NoScoreError(f"step {steps} of {steps}: the task is shown by the score '{name}', but gives: {given}")


def _gates(model: nn.Module, task: StudyTask, config: TrainConfig) -> tuple[list[dict[str, Any]], str]:
    """The gates of the trained model, or what went wrong: a description must not cost the trial its result."""
    device = config.resolve_device()
    try:
        gates = gate_statistics(model, task, device, config.in_bf16())
        canonical(gates)  # what is no JSON, such as NaN, could not be kept
        return gates, ""
    except Exception as error:
        return [], describe(error)


def task_of(job: Job) -> StudyTask:
    """Build a job's task where the job runs, and see that it is the one that was planned.

    Workers start later than the plan and may stand elsewhere: code that was edited meanwhile, or another machine's
    texts, would give a result under a key that is not its own.
    """
    trial = job.trial
    changed = changed_modules(job.own, job.imports)
    if job.zoo and job.zoo != zoo_digest():
        raise OtherCodeError(
            "the code of hybridzoo is not the same here as where the study was planned: it was changed meanwhile, or "
            "this machine has another version; run the study again once all are the same"
        )
    if changed:
        raise OtherCodeError(
            f"{', '.join(changed)}: not the same code here as where the study was planned: it was changed meanwhile, "
            "or this machine has another version; run the study again once all are the same"
        )
    task = build_task(trial.task_entry, f"tasks.{trial.task}")
    here = json.loads(json.dumps(task.fingerprint()))
    if differ := [
        name for name in sorted({*here, *trial.fingerprint}) if here.get(name) != trial.fingerprint.get(name)
    ]:
        raise OtherCodeError(
            f"tasks.{trial.task}: its data are not the same here as where the study was planned ({', '.join(differ)})"
        )
    return task


def failure_of(trial: Trial, error: str, traceback: str, seconds: float) -> dict[str, Any]:
    """Return the record of a trial that failed, and why."""
    return result_of(trial, status="failed", error=error, traceback=traceback, seconds=seconds)


def result_of(trial: Trial, *, status: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """Return a whole result record of `trial`, empty where `fields` says nothing."""
    texts = dict.fromkeys(("error", "traceback", "gates_error"), "")
    empty: Mapping[str, Any] = {"metrics": {}, "history": {}, "environment": {}, "gates": [], **texts}
    return {
        "key": trial.key,
        "stack": trial.stack,
        "task": trial.task,
        "seed": trial.seed,
        "status": status,
        "parameters": trial.parameters,
        "seconds": seconds,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "trial": dataclasses.asdict(dataclasses.replace(trial, budget="")),  # it may be of several
        **empty,
        **fields,
    }
