"""Write the report of a run: one page that needs nothing beside it, and its pictures and tables as files.

Reads what runner.py wrote and nothing else, so a report can be written anywhere, of a study that is still running too.
May import nothing above studies.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from hybridzoo.studies.figures import draw_all
from hybridzoo.studies.findings import Findings, gather
from hybridzoo.studies.page import page
from hybridzoo.studies.results import write_bytes, write_text
from hybridzoo.studies.runner import TRIALS, read_plan, read_trials
from hybridzoo.studies.style import styled
from hybridzoo.studies.tables import all_tables

REPORT, FIGURES, TABLES = "report.html", "figures", "tables"


def read_findings(folder: str | os.PathLike[str]) -> Findings:
    """Read a run's plan and whatever results are there; `SpecError` where there is no run."""
    plan = read_plan(folder)
    results, faults = read_trials(folder, plan)
    return gather(plan, results, faults)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.csv` into a run's folder, and return the page's path.

    Results that are missing, failed or damaged are named in the report, which shows the rest. Pictures and tables of an
    earlier report in the same folder are replaced, and those that no longer apply are removed.

    Raises: `SpecError` where the folder holds no run; `ModuleNotFoundError` without matplotlib (the extra `study`).
    """
    root = Path(folder)
    findings = read_findings(root)
    with styled():
        pictures = {stem: _png(figure) for stem, figure in draw_all(findings).items()}
    tables = all_tables(findings)
    asides = sorted(path.name for path in (root / TRIALS).glob("*.corrupt"))
    for stem, content in pictures.items():
        write_bytes(root / FIGURES / f"{stem}.png", content)
    for stem, table in tables.items():
        write_text(root / TABLES / f"{stem}.csv", table.to_csv())
    _remove_others(root / FIGURES, {f"{stem}.png" for stem in pictures})
    write_text(root / REPORT, page(findings, pictures, tables, asides))
    return root / REPORT


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    # No date and no version inside: the same findings give the same file.
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _remove_others(folder: Path, names: set[str]) -> None:
    for path in folder.glob("*.png"):
        if path.name not in names:
            path.unlink()
