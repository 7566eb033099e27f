"""What a dry run prints: every trial that would run, with its size, FLOPs and time, and the total.

May import everything, but nothing heavy until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from hybridzoo.cli.output import new_table, print_json, stdout

if TYPE_CHECKING:
    from hybridzoo.studies.estimate import TrialCost
    from hybridzoo.studies.runner import Preview


def show_preview(preview: Preview, as_json: bool) -> None:
    """Print a preview as a table with its total below, or as data."""
    if as_json:
        print_json(_data(preview))
        return
    from hybridzoo.studies.display import format_seconds

    console = stdout()
    estimate = preview.estimate
    there = f"{preview.reused} results are there already" if preview.reused else "no results are there yet"
    if estimate is None:
        console.print(f"nothing to run: {there}")
        return
    table = new_table()
    table.add_column("trial", overflow="fold")
    for heading in ("parameters", "training FLOPs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in estimate.costs:
        pilot = "pilot: " if cost.trial.key in preview.pilots else ""
        time = "unknown" if cost.seconds is None else f"{'' if cost.timed else '~'}{format_seconds(cost.seconds)}"
        table.add_row(
            escape(f"{pilot}{preview.titles[cost.trial.key]}"), f"{cost.parameters:,}", _flops(cost.flops), time
        )
    console.print(table)
    if any(not cost.timed for cost in estimate.costs):
        console.print("~: not timed itself, but scaled by FLOPs from what was", style="dim")
    if preview.pilots:
        console.print("After the pilots, each stack trains with its own best rate.", style="dim")
    console.print(f"in all {_flops(estimate.flops)} FLOPs; {estimate}", soft_wrap=True)
    console.print(there)


def _flops(count: int) -> str:
    return f"{count:.2e}"


def _data(preview: Preview) -> dict[str, Any]:
    estimate = preview.estimate
    return {
        "reused": preview.reused,
        "seconds": 0.0 if estimate is None else estimate.seconds,
        "error": 0.0 if estimate is None else estimate.error,
        "flops": 0 if estimate is None else estimate.flops,
        "at_a_time": None if estimate is None else estimate.width,
        "trials": [] if estimate is None else [_trial(cost, preview) for cost in estimate.costs],
    }


def _trial(cost: TrialCost, preview: Preview) -> dict[str, Any]:
    trial = cost.trial
    return {
        "stack": trial.stack,
        "task": trial.task,
        "budget": trial.budget,
        "seed": trial.seed,
        "lr": trial.train["lr"],
        "pilot": trial.key in preview.pilots,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "seconds": cost.seconds,
        "timed": cost.timed,
    }
