"""`hybridzoo train`: the studies' trainer on one spec; leaves a folder for `generate`. May import everything."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hybridzoo.cli import names
from hybridzoo.cli.output import INTERRUPTED, command, fail, note, print_json, stderr, stdout, working

if TYPE_CHECKING:
    from hybridzoo.architectures import HybridLM, Spec
    from hybridzoo.studies.tasks import StudyTask
    from hybridzoo.training import Checkpoint, History, TrainConfig
    from hybridzoo.training import Progress as Step

EPILOG = """[bold]Examples[/]

hybridzoo train carve-hybrid-tiny --steps 50 --batch-size 4 task.length=128

hybridzoo train carve-hybrid-tiny "layers=(c*7 a)" train.lr=3e-3 task.length=512

hybridzoo train my-stack.yaml --task mqar task.pairs=16

A run that was stopped goes on when the same command is given again."""

UNFINISHED = "unfinished.pt"  # in the folder, until the run is done
PLAIN_EVERY = 5.0  # seconds between lines where there is no terminal


def complete_task(incomplete: str) -> list[str]:
    """Registered tasks; this one needs the tasks themselves."""
    from hybridzoo.studies.tasks import list_tasks

    return [name for name in list_tasks() if name.startswith(incomplete)]


@command
def train_command(
    spec: names.SpecName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the spec; [bold]task.[/]KEY=VALUE to the task, [bold]train.[/]KEY=VALUE to the training.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", "-t", help="What to train on.", autocompletion=complete_task)
    ] = "bytes",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; train.steps. Default 1000.", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a step; train.batch_size. Default 16.", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; train.lr. Default 0.001.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and batches; train.seed. Default 0.", min=0)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; train.device. Default: a GPU where there is one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the result. Default: runs/SPEC-TASK.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves into that folder as it trains, for TensorBoard.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(help="Minutes between two savings of a run that is under way.", min=0.0)
    ] = 5.0,
    imports: names.Imports = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a result in that folder, or a stopped run of another kind."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as data.")] = False,
) -> None:
    """Train one spec on one task, and save its weights with the resolved spec.

    A run that was stopped (Ctrl-C, SIGTERM, a crash) goes on from where it was last saved.
    """
    from hybridzoo.cli.runs import RECORD, is_run, require_safetensors

    require_safetensors()
    if tensorboard:
        from hybridzoo.training.curves import require_tensorboard

        require_tensorboard()
    with working("loading torch and the spec"):
        from hybridzoo.mixers.schema import SpecError
        from hybridzoo.studies.plan import too_long, trained_length
        from hybridzoo.studies.runner import PLAN
        from hybridzoo.studies.study import may_name_a_folder
        from hybridzoo.studies.tasks import build_task
        from hybridzoo.studies.trial import slug

        names.import_own(imports)
        sorted_words = _sort(overrides or [])
        options = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "device": device}
        config = _config(sorted_words["train"], options)
        task_words = {"type": task, **sorted_words["task"]}
        built = build_task(task_words, "task")
        resolved = _spec(spec, sorted_words["spec"], built)
        length = trained_length(built, config)
        if said := too_long(max(built.longest, length), resolved.max_context):
            raise SpecError(f"task: {said} of {resolved.name}")
    stem = resolved.name if may_name_a_folder(resolved.name) else slug(resolved.name)
    folder = out or Path("runs") / f"{stem}-{task}"
    if (folder / PLAN).exists():
        raise fail(f"{folder} holds a study's run ({PLAN}); give another --out")
    unfinished = folder / UNFINISHED
    complete = is_run(folder) and (folder / RECORD).exists()
    if complete and unfinished.exists() and unfinished.stat().st_mtime < (folder / RECORD).stat().st_mtime:
        unfinished.unlink()  # of this very result: the process ended before it could
    if complete and not overwrite:
        raise fail(f"{folder} holds a trained model already; give another --out, or --overwrite")
    config.resolve_device()  # what is not there is found now, and so is a folder that cannot be
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(folder, resolved, built, task_words, config, length)
    with _held(folder):
        checkpoint = _checkpoint(run, 60 * save_every, overwrite)
        record = _trained(run, checkpoint, tensorboard)
    if as_json:
        print_json({"folder": str(folder), **record})
        return
    console = stdout()
    console.print(f"[bold green]{_score(built, record['metrics'])}[/] on held-out data, in {record['seconds']:.0f} s")
    console.print(f"weights, spec and record ({RECORD}) are in [bold]{folder}[/]", soft_wrap=True)
    if resolved.vocab_size == 256 and task == "bytes":
        console.print(f'next: [bold]hybridzoo generate {folder} --prompt "def "[/]', soft_wrap=True)


@dataclass(frozen=True)
class _Run:
    """What is trained, and the folder for it; `words` are the task's, as given, `length` its sequences' in training."""

    folder: Path
    spec: Spec
    task: StudyTask
    words: dict[str, Any]
    config: TrainConfig
    length: int


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    from hybridzoo.training.lock import BusyError, only_one

    try:
        with only_one(folder, "training"):
            yield
    except BusyError as error:
        raise fail(str(error)) from None


def _checkpoint(run: _Run, every: float, overwrite: bool) -> Checkpoint:
    """What the folder kept of this run; of another one it is an error or, to be overwritten, gone."""
    from hybridzoo.training import Checkpoint, CheckpointError

    path, settings = run.folder / UNFINISHED, {"spec": run.spec.to_dict(), "task": run.task.fingerprint()}
    try:
        return Checkpoint(path, run.config, settings, every)
    except CheckpointError as error:
        if not overwrite:
            raise fail(f"{error}; give another --out, or --overwrite to start anew") from None
    path.unlink()
    return Checkpoint(path, run.config, settings, every)


def _trained(run: _Run, checkpoint: Checkpoint, tensorboard: bool) -> dict[str, Any]:
    """Train, save the result in the folder, and return its record."""
    import torch

    from hybridzoo.architectures import build_model
    from hybridzoo.cli.runs import save_run
    from hybridzoo.training.units import count

    spec, config = run.spec, run.config
    torch.manual_seed(config.seed)
    with working("building the model"):
        model = build_model(spec)
    parameters = sum(p.numel() for p in model.parameters())
    note(f"{spec.name}: {len(spec.layers)} layers, {count(parameters)} parameters; {run.task.shown.about}")
    _note_idle_gates(spec, run.length)
    if checkpoint.step:
        note(f"going on after step {checkpoint.step:,} of {config.steps:,}, as {checkpoint.path} has it")
    started = time.perf_counter() - checkpoint.seconds
    history = _train(model, run, checkpoint, tensorboard)
    record = {
        "spec": spec.name,
        "task": run.words,
        "train": dataclasses.asdict(config),
        "parameters": parameters,
        "metrics": history.metrics,
        "seconds": time.perf_counter() - started,
        "history": history.to_dict(),
    }
    save_run(run.folder, model, spec, record)
    checkpoint.remove()
    return record


def _sort(overrides: list[str]) -> dict[str, Any]:
    """Tell overrides of the spec (kept as text) from those of the task and the training (parsed)."""
    from hybridzoo.architectures.loader import parse_override
    from hybridzoo.mixers.schema import SpecError

    words: dict[str, Any] = {"spec": [], "task": {}, "train": {}}
    for text in overrides:
        place = text.partition(".")[0]
        if place not in ("task", "train") or "=" in place:
            words["spec"].append(text)
            continue
        path, value = parse_override(text)
        if len(path) != 2:
            raise SpecError(f"override '{text}': expected {place}.KEY=VALUE")
        words[place][path[1]] = value
    return words


def _config(words: dict[str, Any], options: dict[str, Any]) -> TrainConfig:
    from hybridzoo.mixers.schema import SpecError, convert
    from hybridzoo.training import TrainConfig

    for name, value in options.items():
        if value is not None and name in words:
            raise SpecError(f"train.{name}: given twice, here and as --{name.replace('_', '-')}")
    given = {**words, **{name: value for name, value in options.items() if value is not None}}
    config = convert(TrainConfig, given, "train")
    if "eval_every" not in given:  # ten points of the curve, so that a stalled run is seen early
        config = dataclasses.replace(config, eval_every=max(1, config.steps // 10))
    if "log_every" not in given and config.resolve_device().type == "cpu":  # no device to wait for: show every step
        config = dataclasses.replace(config, log_every=1)
    return config


def _spec(name: str, overrides: list[str], task: StudyTask) -> Spec:
    """Load the spec; its vocabulary becomes the task's, unless the user set one."""
    from hybridzoo.architectures import load_spec
    from hybridzoo.mixers.schema import SpecError

    spec = load_spec(name, overrides)
    if any(text.partition("=")[0].strip() == "vocab_size" for text in overrides):
        if spec.vocab_size < task.vocab_size:
            raise SpecError(f"vocab_size: {spec.vocab_size} is below the task's {task.vocab_size}")
        return spec
    if spec.vocab_size != task.vocab_size:
        note(
            f"vocab_size: {spec.vocab_size:,} of {spec.name} becomes {task.vocab_size:,}, the tokens of the task; "
            f"vocab_size={spec.vocab_size} among the overrides keeps it"
        )
    return dataclasses.replace(spec, vocab_size=task.vocab_size)


def _note_idle_gates(spec: Spec, length: int) -> None:
    from hybridzoo.architectures import idle_content_gates

    for label, chunk in idle_content_gates(spec, length).items():
        note(
            f"{label}: its content gate never acts here, so that it is a token gate: sequences of {length:,} tokens "
            f"have no second content chunk of {chunk:,}; give a longer task.length, or a smaller content_chunk"
        )


def _train(model: HybridLM, run: _Run, checkpoint: Checkpoint, tensorboard: bool) -> History:
    """Train and show how it goes; an interruption says from where the run can go on."""
    from hybridzoo.training import CheckpointError, train
    from hybridzoo.training.curves import Curves

    first = checkpoint.step

    def heard(step: Step) -> None:
        show(step)
        if write is not None:
            write(step)

    curves = Curves(run.folder, first) if tensorboard else nullcontext()
    try:
        with _display(run.config.steps, first, run.task) as show, curves as write:
            return train(model, run.task, run.config, heard, checkpoint)
    except CheckpointError as error:
        raise fail(f"stopped, and what came after step {checkpoint.step:,} is lost: {error}") from None
    except KeyboardInterrupt:
        if not checkpoint.step:
            raise fail("interrupted before anything was saved", INTERRUPTED) from None
        done = f"interrupted; saved after step {checkpoint.step:,} of {run.config.steps:,}"
        raise fail(f"{done}, and the same command goes on from there", INTERRUPTED) from None


def _score(task: StudyTask, metrics: dict[str, float]) -> str:
    from hybridzoo.studies.display import format_score

    return format_score(task.shown, metrics[task.metric])


@contextmanager
def _display(steps: int, first: int, task: StudyTask) -> Iterator[Callable[[Step], None]]:
    """Yield what hears of every step after the `first`: a bar on a terminal, a line now and then elsewhere."""
    console = stderr()
    if not console.is_terminal:
        started = last = time.monotonic()

        def line(step: Step) -> None:
            nonlocal last
            now = time.monotonic()
            taken = step.step - first
            if taken == 1 or step.step == step.steps or now - last > PLAIN_EVERY:
                last = now
                # The first step also prepares the rest, so it says little of them.
                left = _left((now - started) / taken * (step.steps - step.step)) if taken > 1 else ""
                console.print(f"step {step.step}/{step.steps}: {_detail(task, step)}{left}", soft_wrap=True)

        yield line
        return
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("training"), *columns, TextColumn("{task.fields[detail]}"), console=console) as bars:
        bar = bars.add_task("", total=steps, completed=first, detail="starting")
        yield lambda step: bars.update(bar, completed=step.step, detail=_detail(task, step))


def _left(seconds: float) -> str:
    from hybridzoo.studies.display import format_seconds

    return f", about {format_seconds(seconds)} left" if seconds else ""


def _detail(task: StudyTask, step: Step) -> str:
    from hybridzoo.training.units import count

    scored = f", held-out {_score(task, step.metrics)}" if task.metric in step.metrics else ""
    return f"loss {step.loss:.3f} nats{scored}, {count(step.tokens_per_second)} tokens/s"
