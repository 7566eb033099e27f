"""`hybridzoo study`: run a study, write its report, list what is shipped. May import everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridzoo.cli import listing, names
from hybridzoo.cli.output import FAILED, INTERRUPTED, command, fail, note, print_json, stdout, working

if TYPE_CHECKING:
    from hybridzoo.studies import Run

app = typer.Typer(no_args_is_help=True, help="Compare stacks: run a study, write its report, list what is shipped.")

EPILOG = """[bold]Examples[/]

hybridzoo study run quickstart

hybridzoo study run quickstart --out runs/one-seed "seeds=[0]"

hybridzoo study run my-study.yaml --processes 4

A study that was stopped goes on when the same command is given again."""

SHOWN = 3  # different errors that a message repeats


@app.command("run", epilog=EPILOG)
@command
def run_command(
    study: names.StudyName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the study, such as seeds=[0].", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results. Default: runs/NAME.")] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-p", help="Trials at a time. Default: one a core, or one on a GPU.", min=0),
    ] = None,
    imports: names.Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary of the run as data.")] = False,
) -> None:
    """Train every stack of a study, going on from what is already there, and write the report."""
    with working("loading the study"):
        from hybridzoo.cli.runs import holds_model
        from hybridzoo.studies import load_study, run_study, write_report
        from hybridzoo.studies.display import format_seconds
        from hybridzoo.studies.runner import BusyError, Stopped

        own = names.import_own(imports)
        loaded = load_study(study, overrides or [])
    folder = out or Path("runs") / loaded.name
    if holds_model(folder):
        raise fail(f"{folder} holds a trained model; give the study a folder of its own with --out")
    try:
        run = run_study(loaded, folder, processes=processes, imports=own)
    except Stopped:
        raise typer.Exit(INTERRUPTED) from None  # the display has said how far it came and how to go on
    except BusyError as error:
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
                "excluded": dict(run.excluded),
                "seconds": run.seconds,
            }
        )
    else:
        console = stdout()
        reused = f", {run.reused} more were there already" if run.reused else ""
        if run.finished or run.reused:
            trials = "1 trial" if run.finished == 1 else f"{run.finished} trials"
            console.print(f"{trials} in {format_seconds(run.seconds)}{reused}")
        if report is not None:
            console.print(f"report: [bold]{report}[/]", soft_wrap=True)
    if run.failed:
        raise fail(_failures(run, "no report was written" if report is None else "the report shows them"), FAILED)


def _failures(run: Run, report: str) -> str:
    """Say how many trials failed, each different error once, and where all of them are recorded."""
    from hybridzoo.studies.runner import TRIALS

    errors = list(dict.fromkeys(error for _, error in run.failed))
    more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    listed = "\n".join(f"  {line}" for line in [*errors[:SHOWN], *more])
    count = len(run.failed)
    return (
        f"{count} {'trial' if count == 1 else 'trials'} failed:\n{listed}\n"
        f"{report}, and {run.folder / TRIALS} holds each one's error; the same command tries them again"
    )


@app.command("report")
@command
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study's run.", show_default=False)],
) -> None:
    """Write the report of a run again, from the results that are there; also while it is still running."""
    with working("drawing the report"):
        from hybridzoo.studies import read_findings, write_report

        report = write_report(folder)
        findings = read_findings(folder)
    for number, what in (
        (len(findings.faults), "damaged and not used; the next run of the study replaces them"),
        (len(findings.failed), "failed; the next run of the study tries them again"),
        (len(findings.missing) - len(findings.faults), "without a result yet"),
    ):
        if number:
            note(f"{number} of {len(findings.plan.trials)} trials {what}")
    stdout().print(str(report), soft_wrap=True)


@app.command("list")
@command
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """List the shipped studies."""
    listing.list_studies(as_json)
