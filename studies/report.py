"""Write the report of a run: one page that needs nothing beside it, and its pictures and tables as files.

Reads what runner.py wrote and nothing else, so a report can be written anywhere, of a study that is still running too.
May import nothing above studies.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hybridzoo.architectures.whole_file import write_bytes, write_text
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.canvas import image_of
from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.findings import Findings, gather
from hybridzoo.studies.kept import LOOKED_FOR, TABLES, is_kept, read_kept
from hybridzoo.studies.page import page
from hybridzoo.studies.runner import PLAN, TRIALS, other_results, read_plan, read_trials
from hybridzoo.studies.style import styled
from hybridzoo.studies.tuning import read_tuned
from hybridzoo.studies.verdict_tables import every_table

REPORT, FIGURES = "report.html", "figures"


def holds_study(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a run, or a study that was kept as a file and tables."""
    return (Path(folder) / PLAN).exists() or is_kept(folder)


def read_findings(folder: str | os.PathLike[str]) -> Findings:
    """Read a run's plan, the rates its pilots chose, and what results there are; or a study that was kept as a file and
    tables (kept.py).

    Raises: `SpecError` where there is neither, or where a kept study cannot be read.
    """
    if is_kept(folder):
        return read_kept(folder)
    if not holds_study(folder):
        raise SpecError(f"{folder}: no {PLAN} here, as a run has, and no {LOOKED_FOR}, as a kept study has")
    plan = read_plan(folder)
    results, faults = read_trials(folder, plan)
    found = gather(plan, results, faults)
    return replace(found, tuned=tuple(read_tuned(folder)), others=other_results(Path(folder) / TRIALS, plan))


def write_report(folder: str | os.PathLike[str], findings: Findings | None = None) -> Path:
    """Write `report.html`, `figures/*` (PNG and SVG) and `tables/*.csv` into a run's folder; return the page's path.

    Results that are missing, failed or damaged are named in the report, which shows the rest. Pictures and tables of an
    earlier report in the same folder are replaced, and those that no longer apply are removed. `findings` are those of
    the folder, for who has read them already, or of another: the report of a kept study needs a folder of its own.

    Raises: `SpecError` where the folder holds no run, or a kept study, whose tables would be written over;
    `ModuleNotFoundError` without matplotlib (the extra `study`).
    """
    root = Path(folder)
    if is_kept(root):
        raise SpecError(
            f"{root}: holds a study that was kept without its trials, and a report would replace the tables that it is "
            "read from; give the report another folder (--out)"
        )
    findings = read_findings(root) if findings is None else findings
    with styled():
        figures = draw_all(findings)
        pictures = {stem: image_of(figure, "png") for stem, figure in figures.items()}
        for figure in figures.values():
            figure.set_layout_engine("none")  # laid out already: doing it again takes as long as the drawing
        drawings = {stem: image_of(figure, "svg") for stem, figure in figures.items()}
    tables = every_table(findings)
    asides = sorted(path.name for path in (root / TRIALS).glob("*.corrupt"))
    for kind, contents in (("png", pictures), ("svg", drawings)):
        for stem, content in contents.items():
            write_bytes(root / FIGURES / f"{stem}.{kind}", content)
    for stem, table in tables.items():
        write_text(root / TABLES / f"{stem}.csv", table.to_csv())
    _remove_others(root / FIGURES, {f"{stem}.{kind}" for stem in pictures for kind in ("png", "svg")})
    write_text(root / REPORT, page(findings, pictures, tables, asides))
    return root / REPORT


def _remove_others(folder: Path, names: set[str]) -> None:
    for path in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        if path.name not in names:
            path.unlink()
