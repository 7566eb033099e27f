"""The `hybridzoo` command: what its subcommands are called and where they live.

May import everything. Each subcommand's module loads torch and the zoo inside its function, so help and completion are
quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hybridzoo import __version__
from hybridzoo.cli import listing, sample, show, study, theory, train

app = typer.Typer(
    name="hybridzoo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog="Start with [bold]hybridzoo list[/], or train and compare: [bold]hybridzoo study run quickstart[/]. "
    "A failed run exits with 1, a mistake in what was asked with 2, an interrupted run with 130; "
    "HYBRIDZOO_TRACEBACK=1 shows where an error rose.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hybridzoo {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Build, count, train and compare hybrid language models."""


app.command("list", epilog=listing.EPILOG)(listing.list_command)
app.command("show", epilog=show.EPILOG)(show.show_command)
study.app.command("theory", epilog=theory.EPILOG)(theory.theory_command)
app.add_typer(study.app, name="study")
app.command("train", epilog=train.EPILOG)(train.train_command)
app.command("generate", epilog=sample.EPILOG)(sample.generate_command)
