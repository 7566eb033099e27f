"""Reading pages and what they quote: their text, their tables, and the tables of studies that were run."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs/studies/hybrids"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")
SHARES = {"0 %": "ratio=0", "12.5 %": "ratio=1/8", "25 %": "ratio=1/4", "50 %": "ratio=1/2"}
MIXERS = ("carve", "carve[erase=token]", "gdn2", "gated_delta_net", "mamba2")
TASKS = ("recall", "overwrite", "needle", "text")


def text_of(page: str) -> str:
    """A page, its lines joined: where they break says nothing."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def rows(stem: str, study: Path = STUDY) -> list[dict[str, str]]:
    """One of a study's tables."""
    with (study / f"tables/{stem}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines_after(title: str, page: str = PAGE) -> list[list[str]]:
    """The cells of the first table below a title, header and rule included."""
    lines = page[page.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def scores_of(study: Path, task: str | None = None) -> dict[str, list[float]]:
    """Each stack's scores, a seed each, of a study of one task, or on one: in per cent, on text in bits."""
    return _by_stack(row for row in rows("trials", study) if task in (None, row["task"]))


def scores_at(study: Path, task: str, level: int) -> dict[str, list[float]]:
    """The same at one level of difficulty."""
    return _by_stack(row for row in rows("levels", study) if (row["task"], row["level"]) == (task, str(level)))


def _by_stack(found: Iterable[dict[str, str]]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for row in found:
        scores.setdefault(row["stack"], []).append((1 if row["task"] == "text" else 100) * float(row["score"]))
    return scores


def means_of(study: Path, task: str | None = None) -> dict[str, float]:
    """Each stack's mean of those."""
    return {stack: sum(mine) / len(mine) for stack, mine in scores_of(study, task).items()}
