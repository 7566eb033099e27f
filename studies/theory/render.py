"""What probes found, for people: a terminal's text, and a folder of `theory.json`, CSV tables and PNG pictures.

The one renderer of all probes: they hand over plain data. Pictures need matplotlib (the extra `study`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from hybridzoo.architectures.whole_file import write_bytes, write_text
from hybridzoo.studies.canvas import image_of
from hybridzoo.studies.environment import environment
from hybridzoo.studies.results import write_json
from hybridzoo.studies.style import INK, SOFT, legend_below, styled
from hybridzoo.studies.tables import Table, Value
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, UNSEEN, Panel, Result, Settings, Verdict

THEORY = "theory.json"
COLOURS: dict[Verdict, str] = {HOLDS: "green", FAILS: "red", UNSEEN: "red", OPEN: "yellow"}
ROWS = 24  # of a table, on a terminal; the file has all
_HUES = ("#1f4e8c", "#c5482f", "#3fa58c", "#d8a03a", "#7a4fa3", "#4a5568", "#c2558f", "#2b83a8", "#8a5a2b", "#4d7f2d",
         "#111111", "#b39b00", "#8f8f8f", "#00a3e0")  # fmt: skip


def show(console: Console, result: Result) -> None:
    """Print one probe: the claim, every statement with its verdict and its numbers, the tables, the finding."""
    console.print()
    console.rule(f"[bold]{escape(result.title)}[/]  [dim]{result.name}[/]", align="left", style="dim")
    console.print(f"[dim]claimed:[/] {escape(result.claim)} [dim]({escape(result.source)})[/]")
    for statement in result.statements:
        console.print()
        console.print(f"  {_word(statement.verdict)}: {escape(statement.text)}")
        console.print(f"    [dim]measured:[/] {escape(statement.measured)}")
    for stem in result.shown:
        console.print()
        _print_table(console, result.tables[stem])
    console.print()
    console.print(f"[bold]found:[/] {escape(result.finding)} [dim]({result.seconds:.1f} s)[/]")


def show_summary(console: Console, results: Sequence[Result]) -> None:
    """Print one line a probe: its name and the verdict on what was claimed."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("probe", "what was claimed", "verdict", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for result in results:
        table.add_row(result.name, escape(result.claim), _word(result.verdict), f"{result.seconds:.1f}")
    console.print()
    console.print(table)


def _word(verdict: Verdict) -> str:
    return f"[bold {COLOURS[verdict]}]{verdict}[/]"


def _print_table(console: Console, table: Table) -> None:
    shown = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=escape(table.about), title_justify="left"
    )
    for i, name in enumerate(table.columns):
        numbers = all(not isinstance(row[i], str) for row in table.rows)
        shown.add_column(escape(name.replace("_", " ")), justify="right" if numbers else "left")
    for row in table.rows[:ROWS]:
        shown.add_row(*(escape(format_value(value)) for value in row))
    console.print(shown)
    if len(table.rows) > ROWS:
        console.print(f"[dim]and {len(table.rows) - ROWS} more rows in the file[/]")


def format_value(value: Value) -> str:
    """Return a value as a terminal's table shows it: four digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value) or value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"


def write_results(folder: str | os.PathLike[str], results: Sequence[Result], settings: Settings) -> Path:
    """Write `theory.json`, `PROBE-TABLE.csv` and `PROBE.png` into `folder`; return the path of `theory.json`.

    Files of the same names are replaced, those of probes that did not run are left, and `theory.json` says which ran.

    Raises: `ModuleNotFoundError` without matplotlib, before anything is written.
    """
    root = Path(folder)
    with styled():
        pictures = {result.name: image_of(draw(result), "png") for result in results if result.panels}
    for result in results:
        for stem, table in result.tables.items():
            write_text(root / f"{result.name}-{stem}.csv", table.to_csv())
    for name, content in pictures.items():
        write_bytes(root / f"{name}.png", content)
    write_json(
        root / THEORY,
        {
            "size": settings.size,
            "seed": settings.seed,
            "study": None if settings.study is None else str(settings.study),
            "environment": environment(settings.resolve_device().type),
            "probes": [plain(result.to_dict()) for result in results],
        },
    )
    return root / THEORY


def plain(data: Any) -> Any:
    """Return `data` with numbers that JSON has no word for as text."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list | tuple) else data


def draw(result: Result) -> Any:
    """Draw a probe's panels side by side, from four on in two rows, with one legend for all lines of the figure."""
    from matplotlib.figure import Figure

    number = len(result.panels)
    rows = 1 if number < 4 else 2
    columns = -(-number // rows)
    width = min(5.2 * columns + 0.6, 11.4) if number > 1 else 7.2
    figure = Figure(figsize=(width, 4.6 if rows == 1 else 7.8), layout="constrained", dpi=150)
    labels = list(dict.fromkeys(line.label for panel in result.panels for line in panel.lines if line.label))
    colours = {label: _HUES[i % len(_HUES)] for i, label in enumerate(labels)}
    handles: dict[str, Any] = {}
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[number:]:
        axes.remove()
    for axes, panel in zip(places, result.panels, strict=False):
        _draw_panel(axes, panel, colours, handles)
    legend_below(figure, handles.values(), columns=3)
    return figure


def _draw_panel(axes: Any, panel: Panel, colours: dict[str, str], handles: dict[str, Any]) -> None:
    style = {"line": ("-", "o"), "points": ("none", "o"), "dashes": ((0, (4, 3)), "")}
    for line in panel.lines:
        dash, mark = style[line.kind]
        many = len(line.x) > 30
        # A logarithmic axis has no place for zero: the line ends where the values do.
        y = [value if value > 0 or not panel.log_y else math.nan for value in line.y]
        (drawn,) = axes.plot(
            *(line.x, y),
            color=colours.get(line.label, SOFT),
            linestyle=dash,
            marker="" if many else mark,
            markersize=5,
            linewidth=1.4,
            label=line.label,
        )
        if line.spans:
            axes.vlines(line.x, *zip(*line.spans, strict=True), color=drawn.get_color(), linewidth=1.2)
        if line.label:
            handles.setdefault(line.label, drawn)
    for place, word in panel.marks:
        axes.axvline(place, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate(
            *(word, (place, 1)),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=INK,
        )
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.names:
        axes.set_xticks(range(len(panel.names)), panel.names)
    if panel.least is not None:
        # Said together: what is below would else stretch the axis upwards too.
        axes.set_ylim(panel.least, 3 * max(value for line in panel.lines for value in line.y if math.isfinite(value)))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
