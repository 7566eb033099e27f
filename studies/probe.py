"""Time a few steps of a trial, where and as it will run, and say how long the whole of it will take.

May import architectures and training. estimate.py decides which trials are probed and makes a study's total of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hybridzoo.architectures import Spec, account, build_model
from hybridzoo.mixers.schema import convert
from hybridzoo.studies.engines.base import Send
from hybridzoo.studies.stack import trained_part
from hybridzoo.studies.tasks import StudyTask
from hybridzoo.studies.trial import Job, Trial, task_of
from hybridzoo.training import Batch, DivergedError, TrainConfig, evaluating, train
from hybridzoo.training.graph import WARM as GRAPH_WARM

_STRATA = 4  # parts of the training, of which each gives one step: a curriculum changes what a step costs


@dataclass(frozen=True)
class Probe:
    """What was measured of one trial. `seconds` is the whole trial at this speed; `step` the mean step of it.

    `spread` is how far the timed steps lie apart: half the range, as a share of their mean. `without` names what is not
    in `seconds`: `evaluations` that could not be counted, the `compilation` that a probe leaves out. `took` is what the
    probe itself cost.
    """

    seconds: float
    step: float
    spread: float
    without: tuple[str, ...]
    took: float


@dataclass(frozen=True)
class ProbeJob:
    """A trial to probe, and the seconds after which its probe should come to an end."""

    job: Job
    limit: float


def run_probe(probe: ProbeJob, send: Send) -> Probe:
    """Time steps from all parts of a trial's training, count its evaluations, and extrapolate. Runs in a worker.

    Nothing is compiled for it, so on a GPU with torch.compile the compilation comes on top and steps may be faster.

    Raises: whatever building or training raises; `DivergedError` where not even one step is finite.
    """
    began = time.perf_counter()
    trial = probe.job.trial
    task = task_of(probe.job)
    config = convert(TrainConfig, trial.train, f"tasks.{trial.task}.train")
    spec = Spec.from_dict(trial.spec, f"stack '{trial.stack}'")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(trial.seed)
        model = build_model(spec)
        built = time.perf_counter() - began
        sample = _Sample(task, config)
        seconds = _timed_steps(model, sample, config, probe.limit)
        step, spread = _mean_and_spread(seconds, sample.warm)
        quick, full = _evaluations(model, task, spec, sample.last, config, probe.limit)
    on_the_way = (config.steps - 1) // config.eval_every if config.eval_every else 0
    on_the_way += on_the_way > 0  # the curve's last point, beside the score
    scoring = 0.0 if quick is None or full is None else on_the_way * quick + full
    total = built + config.steps * step + scoring
    missing = {"evaluations": full is None, "compilation": config.compiled()}
    without = tuple(name for name, is_missing in missing.items() if is_missing)
    return Probe(total, step, spread, without, time.perf_counter() - began)


class _Sample:
    """A task that gives the batches of steps from all parts of the training, after `warm` untimed ones."""

    def __init__(self, task: StudyTask, config: TrainConfig) -> None:
        self.task, self.vocab_size, self.metric, self.maximise = task, task.vocab_size, task.metric, task.maximise
        middles = [int((part + 0.5) * config.steps / _STRATA) for part in range(_STRATA)]
        generator = torch.Generator().manual_seed(config.seed)
        batches = [task.batch(step, config.batch_size, generator) for step in middles]
        of_shape = {batch.ids.shape: step for step, batch in zip(middles, batches, strict=True)}
        warm = middles[-1:]
        if config.device_type() == "cuda":
            # A GPU meets each shape before it is timed: what it prepares then, it prepares once a trial. Of a graph
            # that is the steps before its capture, and the one that captures it.
            warm = [*of_shape.values()] * (GRAPH_WARM + 1 if config.graph else 1)
        self.steps = [*warm, *(middles[:3] if len(of_shape) == 1 else middles)]
        self.warm = len(warm)
        self.last = batches[-1].ids

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        return self.task.batch(self.steps[step], batch_size, generator)

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        return {}


class _Enough(Exception):
    """The probe has used its time."""


def _timed_steps(model: nn.Module, sample: _Sample, config: TrainConfig, limit: float) -> list[float]:
    seconds: list[float] = []
    # On a GPU the first steps compile kernels and say nothing of the others; elsewhere one is better than none.
    least = sample.warm + 1 if config.resolve_device().type == "cuda" else 1
    start = last = time.perf_counter()

    def clock(_: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        if now - start > limit and len(seconds) >= least:
            raise _Enough

    short = replace(config, steps=len(sample.steps), eval_every=0, log_every=1, compile=False)
    try:
        train(model, sample, short, clock)
    except _Enough:
        pass
    except DivergedError:
        if not seconds:
            raise
    return seconds


def _mean_and_spread(seconds: Sequence[float], warm: int) -> tuple[float, float]:
    """Return the mean of the steps after the warm ones, and half their range as a share of it."""
    timed = seconds[warm:] or seconds[-1:]  # a step so slow that there was time for one only
    mean = sum(timed) / len(timed)
    return mean, (max(timed) - min(timed)) / 2 / mean


def _evaluations(
    model: nn.Module, task: StudyTask, spec: Spec, ids: Tensor, config: TrainConfig, limit: float
) -> tuple[float | None, float | None]:
    """Return the seconds of a quick evaluation and of the last one; None for a task that asks for more than logits,
    or whose sequences take longer than `limit` to draw."""
    counted: list[tuple[float, dict[int, int]] | None] = []
    for quick in (True, False):
        counting = _Counting(task.vocab_size, time.perf_counter() + limit)
        start = time.perf_counter()
        try:
            task.evaluate(counting, torch.device("cpu"), quick=quick)
        except Exception:
            counted.append(None)
            continue
        counted.append((time.perf_counter() - start, counting.tokens))  # drawing the sequences and scoring them
    lengths = {length for one in counted if one is not None for length in one[1]}
    if not lengths:
        return None, None
    flops = {length: account(spec, context=length).train_flops_per_token for length in lengths}
    with evaluating(model), config.autocast():
        rates = _seconds_per_flop(model, spec, ids.to(config.resolve_device()), max(lengths), limit / 4)

    def seconds(one: tuple[float, dict[int, int]] | None) -> float | None:
        if one is None:
            return None
        own, tokens = one
        return own + sum(_at(rates, length) * flops[length] * count for length, count in tokens.items())

    return seconds(counted[0]), seconds(counted[1])


def _seconds_per_flop(model: nn.Module, spec: Spec, ids: Tensor, longest: int, limit: float) -> dict[int, float]:
    """Time forward passes of `ids [B, T]`, then of one sequence four times as long each time, up to `longest` tokens or
    until a pass may take `limit` seconds: by length, the seconds a FLOP. A short pass is mostly overhead, and would
    make a long one of the same FLOPs out to be many times what it is."""
    rates: dict[int, float] = {}
    while True:
        for _ in range(2):  # the first also prepares what is used from then on
            start = time.perf_counter()
            model(ids).logits.sum().item()  # waits for the device
            forward = time.perf_counter() - start
        length = ids.shape[1]
        rates[length] = forward / (ids.numel() * account(spec, context=length).train_flops_per_token)
        following = min(4 * length, longest)
        cost = rates[length] * following * account(spec, context=following).train_flops_per_token
        if following <= length or cost > limit:
            return rates
        ids = ids[:1, :1].expand(1, following).contiguous()


def _at(rates: dict[int, float], length: int) -> float:
    """The rate of the longest pass that was timed and is no longer than `length`."""
    return rates[max((timed for timed in rates if timed <= length), default=min(rates))]


class _Counting(nn.Module):
    """Stands where a model would, computes nothing, and counts the tokens it is asked about by their length.

    It counts until `deadline`, on the clock of `time.perf_counter`.
    """

    def __init__(self, vocab_size: int, deadline: float = float("inf")) -> None:
        super().__init__()
        self.vocab_size, self.deadline = vocab_size, deadline
        self.tokens: dict[int, int] = {}

    def forward(self, ids: Tensor, **_: Any) -> Any:
        if time.perf_counter() > self.deadline:
            raise _Enough
        length = ids.shape[1]
        self.tokens[length] = self.tokens.get(length, 0) + ids.numel()
        return SimpleNamespace(logits=torch.zeros(1).expand(*ids.shape, self.vocab_size), loss=torch.zeros(()))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One, on the CPU: tasks look there for the device."""
        yield nn.Parameter(torch.zeros(1))


def kind_of(trial: Trial) -> dict[str, Any]:
    """Return what decides how long a trial takes: all but its seed, its learning rate and its labels."""
    train_words = {name: value for name, value in trial.train.items() if name not in ("seed", "lr")}
    return {"spec": trained_part(trial.spec), "task": trial.fingerprint, "train": train_words}
