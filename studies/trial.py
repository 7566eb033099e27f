"""One trial: one stack trained on one task from one seed, described by plain data, run anywhere, and kept as a file.

A trial's key is a hash of all that decides its result, so a result is reused exactly where it would come out again. May
import architectures and training; plan.py makes trials, runner.py hands them to workers.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridzoo.architectures import Spec, build_model
from hybridzoo.mixers.schema import convert
from hybridzoo.mixers.user_code import import_user_code
from hybridzoo.studies.environment import environment
from hybridzoo.studies.pool import Send
from hybridzoo.studies.results import content_key, write_result
from hybridzoo.studies.tasks import build_task
from hybridzoo.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Plain data throughout: it pickles, it is JSON, and it says everything that a worker needs.

    `stack` and `task` are the study's labels; `spec` is a resolved spec with the task's vocabulary; `task_entry` builds
    the task, `fingerprint` is what decides its data; `train` is a whole `TrainConfig`, seed included; `code` is the
    hash of the code that trains and scores (code.py).
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

    @property
    def key(self) -> str:
        """The hash of the model, the task's data, the training, the seed and the code; labels do not count."""
        spec = {name: value for name, value in self.spec.items() if name != "name"}
        decides = {"spec": spec, "task": self.fingerprint, "train": self.train, "seed": self.seed, "code": self.code}
        return content_key(decides)

    @property
    def file_name(self) -> str:
        """A name for people to read, made unique by the key; nothing is ever read back from it."""
        return f"{slug(self.stack)}--{slug(self.task)}--seed{self.seed}--{self.key[:12]}.json"

    @property
    def title(self) -> str:
        return f"{self.stack} · {self.task} · seed {self.seed}"


def slug(text: str) -> str:
    """Return `text` as part of a file name: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"


@dataclass(frozen=True)
class Job:
    """A trial, where its result goes, and the user's modules that a worker imports first."""

    trial: Trial
    path: Path
    imports: tuple[str, ...] = ()


def run_job(job: Job, send: Send) -> dict[str, Any]:
    """Run a trial, write its result, and return it; `send` gets the training's `Progress`. Runs in a worker."""
    started = time.perf_counter()
    trial = job.trial
    for name in job.imports:
        import_user_code(name)
    task = build_task(trial.task_entry, f"tasks.{trial.task}")
    config = convert(TrainConfig, trial.train, f"tasks.{trial.task}.train")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(trial.seed)
        model = build_model(Spec.from_dict(trial.spec, f"stack '{trial.stack}'"))
        history = train(model, task, config, send)
    result = result_of(
        trial,
        status="finished",
        metrics=history.metrics,
        history=history.to_dict(),
        seconds=time.perf_counter() - started,
        environment=environment(history.device),
    )
    write_result(job.path, result)
    return result


def write_failure(job: Job, error: str, traceback: str, seconds: float) -> dict[str, Any]:
    """Record that a trial failed and why, and return the record."""
    result = result_of(job.trial, status="failed", error=error, traceback=traceback, seconds=seconds)
    write_result(job.path, result)
    return result


def result_of(trial: Trial, *, status: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """Return a whole result record of `trial`, empty where `fields` says nothing."""
    empty: Mapping[str, Any] = {"metrics": {}, "history": {}, "error": "", "traceback": "", "environment": {}}
    return {
        "key": trial.key,
        "stack": trial.stack,
        "task": trial.task,
        "seed": trial.seed,
        "status": status,
        "parameters": trial.parameters,
        "seconds": seconds,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "trial": dataclasses.asdict(trial),
        **empty,
        **fields,
    }
