"""`hybridzoo study`: run a study, write its report, list what is shipped. May import everything."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hybridzoo.cli import listing, names
from hybridzoo.cli.comparison import show_comparison
from hybridzoo.cli.output import FAILED, INTERRUPTED, command, fail, note, print_json, stdout, working
from hybridzoo.cli.preview import show_preview

if TYPE_CHECKING:
    from hybridzoo.studies import Run
    from hybridzoo.studies.engines import EngineName

app = typer.Typer(no_args_is_help=True, help="Compare stacks: run a study, write its report, list what is shipped.")

EPILOG = """[bold]Examples[/]

hybridzoo study run quickstart

hybridzoo study run quickstart --out runs/one-seed "seeds=[0]"

hybridzoo study run my-study.yaml --dry-run

hybridzoo study run my-study.yaml --engine ray --gpu-share 0.25

A study that was stopped goes on when the same command is given again."""

SHOWN = 3  # different errors that a message repeats


class EngineChoice(StrEnum):
    """Where trials run, as `make_engine` names it."""

    HERE = "here"
    PROCESSES = "processes"
    RAY = "ray"


@app.command("run", epilog=EPILOG)
@command
def run_command(
    study: names.StudyName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the study, such as seeds=[0].", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results. Default: runs/NAME.")] = None,
    engine: Annotated[
        EngineChoice | None,
        typer.Option(
            "--engine",
            "-e",
            help="Where trials run: this process, worker processes (the default), or Ray at RAY_ADDRESS or here.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            "-p",
            help="Trials at a time. Default: one a core, or one on each GPU; on Ray, as many as fit. 0: this process.",
            min=0,
        ),
    ] = None,
    gpu_share: Annotated[
        float | None,
        typer.Option(
            "--gpu-share",
            help="Part of a GPU that a trial takes: 0.25 runs four on each. Default: 1.",
            min=0.0,
            max=1.0,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List every trial with its size, FLOPs and estimated time, and train none."),
    ] = False,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary of the run as data.")] = False,
) -> None:
    """Train every stack of a study, going on from what is already there, and write the report."""
    with working("loading the study"):
        from hybridzoo.cli.runs import holds_model
        from hybridzoo.studies import Execution, load_study, run_study, write_report
        from hybridzoo.studies.display import format_count, format_seconds
        from hybridzoo.studies.engines import EngineError
        from hybridzoo.studies.runner import BusyError, Stopped, preview_study

        own = names.import_own(imports)
        loaded = load_study(study, overrides or [])
    folder = out or Path("runs") / loaded.name
    if holds_model(folder):
        raise fail(f"{folder} holds a trained model; give the study a folder of its own with --out")
    named = cast("EngineName | None", engine and engine.value)
    execution = Execution(engine=named, processes=processes, gpu_share=gpu_share, imports=own)
    try:
        if dry_run:
            show_preview(preview_study(loaded, folder, execution), as_json)
            return
        run = run_study(loaded, folder, execution)
    except Stopped:
        raise typer.Exit(INTERRUPTED) from None  # the display has said how far it came and how to go on
    except (BusyError, EngineError) as error:
        raise fail(str(error)) from None
    report = None
    if run.finished + run.reused:
        with working("drawing the report"):
            report = write_report(folder)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "report": None if report is None else str(report),
                "finished": run.finished,
                "reused": run.reused,
                "failed": dict(run.failed),
                "excluded": [dict(zip(("budget", "stack", "why"), one, strict=True)) for one in run.excluded],
                "seconds": run.seconds,
                "estimated": run.estimated,
            }
        )
    else:
        console = stdout()
        reused = f", {run.reused} more were there already" if run.reused else ""
        if run.finished or run.reused:
            expected = "" if run.estimated is None else f" (estimated, with planning: {format_seconds(run.estimated)})"
            console.print(f"{format_count(run.finished, 'trial')} in {format_seconds(run.seconds)}{expected}{reused}")
        if report is not None:
            console.print(f"report: [bold]{report}[/]", soft_wrap=True)
    if run.failed:
        raise fail(_failures(run, "no report was written" if report is None else "the report shows them"), FAILED)


def _failures(run: Run, report: str) -> str:
    """Say how many trials failed, each different error once, and where all of them are recorded."""
    from hybridzoo.studies.display import format_count
    from hybridzoo.studies.runner import TRIALS
    from hybridzoo.studies.tuning import diverged

    errors = list(dict.fromkeys(error for _, error in run.failed))
    more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    listed = "\n".join(f"  {line}" for line in [*errors[:SHOWN], *more])
    again = "tries them again"
    if any(diverged(error) for error in errors):
        again += ", but for pilots that diverged, which would do so again"
    return (
        f"{format_count(len(run.failed), 'trial')} failed:\n{listed}\n"
        f"{report}, and {run.folder / TRIALS} holds each one's error; the same command {again}"
    )


@app.command("report")
@command
def report_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder of a run, or of a study that was kept.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the report. Default: DIR, if it holds a run.", show_default=False),
    ] = None,
    imports: names.Imports = None,
) -> None:
    """Write the report of a run again, from the results that are there; also while it is still running."""
    with working("drawing the report"):
        from hybridzoo.studies import read_findings, write_report
        from hybridzoo.studies.report import holds_study

        names.import_own(imports)
        if out is not None and holds_study(out):
            raise fail(f"{out}: holds a study, whose report would be replaced; give --out a folder of its own")
        findings = read_findings(folder)
        report = write_report(out or folder, findings)
    for number, what in (
        (len(findings.faults), "damaged and not used; the next run of the study replaces them"),
        (len(findings.failed), "failed; the next run of the study tries them again"),
        (len(findings.missing) - len(findings.faults), "without a result yet"),
    ):
        if number:
            note(f"{number} of {len(findings.plan.trials)} trials {what}")
    stdout().print(str(report), soft_wrap=True)


@app.command("compare")
@command
def compare_command(
    first: Annotated[
        Path,
        typer.Argument(metavar="A", help="The folder of a run, or of a study that was kept.", show_default=False),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The folder of another.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write. Default: A-and-B.html beside A.", show_default=False),
    ] = None,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data, and write no page.")] = False,
) -> None:
    """Set two studies side by side: how far the stacks that both have differ, and what else does."""
    with working("comparing"):
        from hybridzoo.studies import compare_studies, write_comparison

        names.import_own(imports)
        side = compare_studies(first, second)
    if as_json:
        print_json(side.to_dict())
        return
    show_comparison(side)
    target = out or first.parent / f"{first.name}-and-{second.name}.html"
    with working("drawing the page"):
        page = write_comparison(side, target)
    stdout().print(f"page: [bold]{page}[/]", soft_wrap=True)


@app.command("list")
@command
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """List the shipped studies."""
    listing.list_studies(as_json)
