"""The training loop: the same code on a CPU and a GPU, deterministic from its seed, and honest when it diverges.

May import architectures and below, though any module with `model(ids, labels=...) -> .loss` and `model(ids) -> .logits`
trains. config.py says how, task.py on what, history.py what comes back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridzoo.training.checkpoint import Checkpoint, CheckpointError, Kept, StopSignals, stop_signals
from hybridzoo.training.config import TrainConfig
from hybridzoo.training.graph import Graphs
from hybridzoo.training.history import Evaluation, History
from hybridzoo.training.optimiser import build_optimiser, learning_rate, set_learning_rate
from hybridzoo.training.task import Task


class DivergedError(RuntimeError):
    """The loss or the gradient stopped being a finite number; `step` (from 1) is the first where it did."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.message = message
        self.step = step

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it. `metrics` are the last there are; `evaluated` says if of this step."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    metrics: dict[str, float]
    evaluated: bool


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    on_progress: Callable[[Progress], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train `model` on `task` and return its history; the model is moved to the config's device and changed in place.

    The batches depend on `config.seed` alone, so two models see the same data. The initial weights are the caller's
    (seed torch before building). `on_progress` is called every `log_every` steps and after every evaluation.

    With a `checkpoint` the run goes on from what it kept, to the same end as one that was never stopped, and SIGINT or
    SIGTERM ends it after the step at work, kept, with `KeyboardInterrupt`; a second one ends it at once.

    Raises: `DivergedError` naming the first step whose loss or gradient norm is not finite, before its update could
    reach a checkpoint.
    """
    return _Run(model, task, config, on_progress, checkpoint).run()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, `model` is in evaluation mode and no graph is recorded; its mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """All that a step reads of its model: compiled, what else a model returns is neither made nor differentiated."""
    loss: Tensor = model(ids, labels=labels).loss
    return loss


class _Run:
    """One call of `train`: the pieces that every step needs, and the numbers since the last point."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        on_progress: Callable[[Progress], None] | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.device = config.resolve_device()
        self.task, self.config, self.on_progress, self.checkpoint = task, config, on_progress, checkpoint
        self.model = model.to(self.device)
        on_gpu = self.device.type == "cuda"
        compiled = config.compiled()
        # Only the training step is compiled: evaluation meets many lengths, each of which would compile anew.
        self.loss = torch.compile(_loss) if compiled else _loss
        self.warm = not compiled
        graphed = config.graph and on_gpu
        self.optimiser = build_optimiser(self.model, config, capturable=graphed)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.graphs = Graphs(self.device) if graphed else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history = History(device=str(self.device))
        self.pending: list[Tensor] = []  # [loss, gradient norm] of each step not yet written, still on the device
        self.tokens = 0
        self.started = self.began = 0.0
        self.before = 0.0  # seconds that the run took until it was stopped

    def run(self) -> History:
        # Streams, graphs and kernels are of the current GPU, which need not be the one that was asked for.
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        listening = contextlib.nullcontext(StopSignals()) if self.checkpoint is None else stop_signals()
        with on_device, listening as stop:
            return self._train(stop)

    def _train(self, stop: StopSignals) -> History:
        """Take the steps that are left; with a checkpoint, until `stop` says so."""
        checkpoint, first = self.checkpoint, 0
        self.model.train()
        self.started = self.began = time.perf_counter()
        if checkpoint is not None and checkpoint.kept is not None:
            first, self.before = checkpoint.step, checkpoint.seconds
            self._go_on_from(checkpoint.kept)
            checkpoint.kept = None  # as large as the model, three times
            stop.at_once = True
            self._after(first)
        for step in range(first, self.config.steps):
            stop.at_once = False
            self._step(step)
            done = step + 1
            if not self.warm:  # the first step holds the compilation: time from after it
                self._restart_clock()
                self.warm = True
            if checkpoint is not None:
                self._pause(done, checkpoint, stop)
            self._after(done)
        return self.history

    def _pause(self, done: int, checkpoint: Checkpoint, stop: StopSignals) -> None:
        """Keep the run where that is due, and end it where it was told to stop.

        Before what the step is followed by, which is done again where the run goes on. The last evaluation is the
        longest: what told us to stop may not wait for it.
        """
        last = done == self.config.steps
        if stop() or last or checkpoint.due:
            self._keep(done, checkpoint, must=stop())
        if stop():
            raise KeyboardInterrupt
        stop.at_once = last and checkpoint.step == done

    def _after(self, done: int) -> None:
        """Write the point and take the scores that are due after so many steps."""
        config = self.config
        evaluate = done == config.steps or (config.eval_every > 0 and done % config.eval_every == 0)
        if done % config.log_every == 0 or evaluate:
            rate = learning_rate(done - 1, config)
            self._write_point(done, rate)
            if evaluate:
                self._evaluate(done)
            self._report(done, rate)

    def _keep(self, done: int, checkpoint: Checkpoint, must: bool) -> None:
        """Write all that the steps to come depend on, unless a step's update was not finite.

        Where it cannot be written the run goes on with a warning, unless it `must`.
        """
        pending = torch.stack(self.pending).cpu() if self.pending else torch.empty(0, 2)  # waits for the device
        self._count()
        self._check_finite(done, pending)
        kept = Kept(
            step=done,
            model=self.model.state_dict(),
            optimiser=self.optimiser.state_dict()["state"],
            generator=self.generator.get_state(),
            pending=pending,
            history=self.history.to_dict(),
            seconds=self.before + time.perf_counter() - self.began,
        )
        try:
            checkpoint.write(kept)
        except CheckpointError as error:
            if must:
                raise
            warnings.warn(f"{error}; the training goes on", stacklevel=2)
        self.started = time.perf_counter()

    def _go_on_from(self, kept: Kept) -> None:
        self.model.load_state_dict(kept.model)
        groups = self.optimiser.state_dict()["param_groups"]  # what they say is of the config
        self.optimiser.load_state_dict({"state": kept.optimiser, "param_groups": groups})
        self.generator.set_state(kept.generator)
        self.pending = list(kept.pending.to(self.device))
        self.history = dataclasses.replace(History.from_dict(kept.history), device=str(self.device))

    def _step(self, step: int) -> None:
        batch = self.task.batch(step, self.config.batch_size, self.generator)
        ids = batch.ids.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        set_learning_rate(self.optimiser, learning_rate(step, self.config))
        # No wait for the device here: a bad step is found when its point is written, at most log_every steps later.
        graphs, update = self.graphs, self._update
        self.pending.append(update(ids, labels) if graphs is None else graphs.run(update, ids, labels))
        self.tokens += ids.numel()

    def _update(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Take one step of the optimiser; return the loss and the gradient's norm, [2] on the device."""
        with self.config.autocast():
            loss = self.loss(self.model, ids, labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return torch.stack([loss.detach().float(), norm.detach().float()])

    def _restart_clock(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.started, self.tokens = time.perf_counter(), 0

    def _count(self) -> None:
        """Add the time and the tokens since the last count to the history."""
        self.history.seconds += time.perf_counter() - self.started
        self.history.tokens += self.tokens
        self.started, self.tokens = time.perf_counter(), 0

    def _write_point(self, done: int, rate: float) -> None:
        numbers = torch.stack(self.pending).cpu()  # waits for the device
        self._count()
        self.pending.clear()
        self._check_finite(done, numbers)
        means = numbers.double().mean(0).tolist()
        history = self.history
        history.steps.append(done)
        history.loss.append(means[0])
        history.grad_norm.append(means[1])
        history.lr.append(rate)

    def _check_finite(self, done: int, numbers: Tensor) -> None:
        """Refuse a loss or gradient norm, `numbers [n, 2]` of the n steps up to `done`, that is not finite."""
        for step, row in enumerate(numbers.tolist(), done - len(numbers) + 1):
            for what, value in zip(("the loss", "the norm of the gradient"), row, strict=True):
                if not abs(value) < float("inf"):  # also for NaN
                    rate = learning_rate(step - 1, self.config)
                    raise DivergedError(
                        f"step {step} of {self.config.steps}: {what} is {value} (learning rate {rate:.3g}, clip "
                        f"{self.config.clip:g}); a lower lr or a longer warmup usually helps",
                        step,
                    )

    def _evaluate(self, done: int) -> None:
        last, history = done == self.config.steps, self.history
        history.evaluations.append(Evaluation(done, self._scores(quick=not last)))
        if last and len(history.evaluations) > 1:  # so that the curve ends on the data that it began on
            history.quick_at_end = self._scores(quick=True)
        self.started = time.perf_counter()

    def _scores(self, quick: bool) -> dict[str, float]:
        with evaluating(self.model), self.config.autocast():
            metrics = self.task.evaluate(self.model, self.device, quick=quick)
        return {name: float(value) for name, value in metrics.items()}

    def _report(self, done: int, rate: float) -> None:
        if self.on_progress is None:
            return
        history = self.history
        progress = Progress(
            step=done,
            steps=self.config.steps,
            loss=history.loss[-1],
            grad_norm=history.grad_norm[-1],
            lr=rate,
            tokens_per_second=history.tokens_per_second,
            metrics=history.metrics,
            evaluated=bool(history.evaluations) and history.evaluations[-1].step == done,
        )
        self.on_progress(progress)
        self.started = time.perf_counter()
