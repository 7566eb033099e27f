"""Two studies side by side: which stacks and tasks they share, how far the scores differ, and what else differs.

May import nothing above studies. compare_page.py shows it; `hybridzoo study compare` prints it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from hybridzoo.studies.comparisons import SEEDS, holm, paired_p
from hybridzoo.studies.display import format_count
from hybridzoo.studies.findings import Cell, Findings
from hybridzoo.studies.report import read_findings
from hybridzoo.studies.results import SHORT_KEY
from hybridzoo.studies.stack import Stack
from hybridzoo.studies.stats import Summary, difference
from hybridzoo.studies.tables import Table, Value
from hybridzoo.studies.verdicts import parts

# Keys of a study whose difference says nothing by itself: what is in the tables, or only a name.
_TOLD_ELSEWHERE = ("name", "about", "stacks", "axes", "overrides")
_NONE: Any = object()  # what a study has no value of
_NAMES = ("first", "second")


# What only the first and only the second study has, and of stacks on which tasks.
Only: TypeAlias = tuple[dict[str, list[str]], dict[str, list[str]]]


@dataclass(frozen=True)
class Pair:
    """One stack on one task under one budget, in both studies: `second - first`.

    `apart` is over the seeds that pair, None where none do; `change` is then the difference of the means, which has no
    interval. `p` and `adjusted` (Holm over the pairs of one task and budget) are NaN below three paired seeds.
    """

    budget: str
    task: str
    first: Cell
    second: Cell
    apart: Summary | None
    change: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """`higher` or `lower` where the second's score is told from the first's, `tied` where not, or `untested`."""
        if math.isnan(self.adjusted):
            return "untested"
        if self.adjusted >= 0.05:
            return "tied"
        return "higher" if self.change > 0 else "lower"


@dataclass(frozen=True)
class SideBySide:
    """What two studies share and do not. `only` lists what either has alone; `notes` are sentences."""

    names: tuple[str, str]
    findings: tuple[Findings, Findings]
    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    changed: tuple[tuple[str, str, str], ...]  # a study's key, its value in the first and in the second
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what `--json` prints."""
        table = pair_table(self)
        return {
            "studies": list(self.names),
            "pairs": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
            "only_in_first": list(self.only[0]),
            "only_in_second": list(self.only[1]),
            "settings": [dict(zip(("key", "first", "second"), row, strict=True)) for row in self.changed],
            "notes": list(self.notes),
        }


def compare_studies(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> SideBySide:
    """Set the studies in two folders side by side: runs, or studies that were kept as a file and tables.

    Budgets and tasks are matched by name, stacks by label or, where a label is in one study alone, by being made the
    same: equal layers and words. Seeds pair where both studies have them and the task draws the same data; two studies
    of different steps or rates may pair, and `changed` says in what they differ. What a kept study does not tell is
    among the notes.

    Raises: `SpecError` where a folder holds no study.
    """
    one, other = read_findings(first), read_findings(second)
    notes = _lacks(one, other)
    only: Only = ({}, {})
    pairs: list[Pair] = []
    for name, first_part, second_part in _budgets(one, other, only, notes):
        for task in _shared(list(first_part.plan.shown), list(second_part.plan.shown), "task", only):
            if said := _not_alike(first_part, second_part, task):
                notes.append(said)
                continue
            matched = _matched(first_part, second_part, task, name, only)
            notes += [said for pair in matched if (said := _made_otherwise(*pair))]
            said = _not_paired(first_part, second_part, task) if matched else ""
            notes += filter(None, [said])
            pairs += _compared(name, task, matched, seeded=not said)
    names = (str(one.plan.study["name"]), str(other.plan.study["name"]))
    if names[0] == names[1]:  # two runs of one study are told apart by their folders
        names = (os.fspath(first), os.fspath(second))
    changed = _settings(one.plan.study, other.plan.study)
    notes += _made(one, other)
    first_only, second_only = (tuple(_only(things)) for things in only)
    return SideBySide(
        names, (one, other), tuple(pairs), (first_only, second_only), changed, tuple(dict.fromkeys(notes))
    )


def _only(things: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{what} (on {', '.join(tasks)})" if any(tasks) else what for what, tasks in things.items()]


def pair_table(side: SideBySide) -> Table:
    """A row for each stack and task of both studies: the scores, their difference, and what is known of it."""
    columns = (
        *("budget", "task", "stack", "stack_in_second", "metric", "first", "second", "paired_seeds", "difference"),
        *("low_95", "high_95", "p", "p_holm", "verdict"),
    )
    rows: list[tuple[Value, ...]] = []
    for pair in side.pairs:
        apart = pair.apart
        low, high = (apart.low, apart.high) if apart is not None else (math.nan, math.nan)
        names = (pair.budget, pair.task, pair.first.stack.label, pair.second.stack.label)
        metric = side.findings[0].shown(pair.task).metric
        numbers = (low, high, pair.p, pair.adjusted)
        rows.append(
            (
                *(*names, metric, pair.first.mean, pair.second.mean, apart.n if apart is not None else 0, pair.change),
                *(value if math.isfinite(value) else None for value in numbers),
                pair.verdict,
            )
        )
    return Table("Pairs: every stack and task that both studies have", columns, tuple(rows))


def _budgets(one: Findings, other: Findings, only: Only, notes: list[str]) -> list[tuple[str, Findings, Findings]]:
    mine, yours = parts(one), parts(other)
    if len(mine) == len(yours) == 1 and set(mine) != set(yours):
        held = [next(iter(each)) or "nothing" for each in (mine, yours)]
        notes.append(
            f"The first study holds {held[0]} equal and the second {held[1]}: stacks of one label differ in size."
        )
        return [("", *mine.values(), *yours.values())]  # type: ignore[list-item]
    return [(name, mine[name], yours[name]) for name in _shared(list(mine), list(yours), "budget", only)]


def _under(budget: str) -> str:
    return f" under {budget}" if budget else ""


def _shared(mine: Sequence[str], yours: Sequence[str], what: str, only: Only) -> list[str]:
    for things, names, others in ((only[0], mine, yours), (only[1], yours, mine)):
        for name in names:
            if name not in others:
                things.setdefault(f"{what} {name or 'none'}", [""])
    return [name for name in mine if name in yours]


def _not_alike(one: Findings, other: Findings, task: str) -> str:
    first, second = one.shown(task), other.shown(task)
    if first.metric != second.metric or first.maximise != second.maximise:
        return f"The task {task} is scored by {first.metric} in one and by {second.metric} in the other: not compared."
    return ""


def _lacks(one: Findings, other: Findings) -> list[str]:
    """Say what kept studies do not tell; of both at once what is true of both."""
    both = [lack for lack in one.lacks if lack in other.lacks]
    said = [f"Each study {lack}." for lack in both]
    for name, each in zip(_NAMES, (one, other), strict=True):
        said += [f"The {name} study {lack}." for lack in each.lacks if lack not in both]
    return said


def _not_paired(one: Findings, other: Findings, task: str) -> str:
    """Say why seeds do not pair on a task, nothing where they do: batches must be the same, and known to be."""
    first, second = one.data.get(task), other.data.get(task)
    if first is None or second is None:
        return (
            f"Whether the task {task} draws the same data in the two studies is not known, so seeds do not pair on it: "
            "it reads files, and the tables do not say which."
        )
    return (
        "" if first == second else f"The task {task} draws other data in the two studies, so seeds do not pair on it."
    )


def _matched(one: Findings, other: Findings, task: str, budget: str, only: Only) -> list[tuple[Cell, Cell]]:
    """Pair the cells of two studies by label, then what is left by how the stacks are made."""
    mine = {cell.stack.label: cell for cell in one.of(task)}
    yours = {cell.stack.label: cell for cell in other.of(task)}
    pairs = {label: (mine[label], yours[label]) for label in mine if label in yours}
    left = {_make(cell.stack): label for label, cell in yours.items() if label not in pairs}
    for label, cell in mine.items():
        if label not in pairs and _make(cell.stack) in left:
            pairs[label] = (cell, yours[left.pop(_make(cell.stack))])
    taken = {second.stack.label for _, second in pairs.values()}
    for things, labels in (
        (only[0], [x for x in mine if x not in pairs]),
        (only[1], [x for x in yours if x not in taken]),
    ):
        for label in labels:
            things.setdefault(f"stack {label}{_under(budget)}", []).append(task)
    return [pairs[label] for label in mine if label in pairs]


def _made_otherwise(first: Cell, second: Cell) -> str:
    """Say in what two stacks of one label differ, nothing where they are made the same."""
    one, other = first.stack, second.stack
    if one.label != other.label or _make(one) == _make(other):
        return ""
    changed = [f"{key} {a} and {b}" for key, a, b in _apart(asdict(one.kind), asdict(other.kind))]
    if one.pattern != other.pattern:
        changed.insert(0, f"layers {one.pattern} and {other.pattern}")
    return f"The stack {one.label} is not the same in the two studies: {'; '.join(changed)}."


def _make(stack: Stack) -> str:
    return json.dumps([stack.pattern, stack.attention, asdict(stack.kind)], sort_keys=True, default=str)


def _compared(budget: str, task: str, matched: Sequence[tuple[Cell, Cell]], seeded: bool) -> list[Pair]:
    found: list[tuple[Cell, Cell, Summary | None]] = []
    for first, second in matched:
        seeds = [seed for seed in first.seeds if seed in second.seeds] if seeded else []
        apart = None
        if seeds:  # shown are the scores that are compared: of the seeds that both have
            first, second = first.of_seeds(seeds), second.of_seeds(seeds)
            apart = difference(_in_order(second, seeds), _in_order(first, seeds))
        found.append((first, second, apart))
    tested = [i for i, (_, _, apart) in enumerate(found) if apart is not None and apart.n >= SEEDS]
    p = dict(
        zip(tested, [paired_p(apart) for _, _, apart in (found[i] for i in tested) if apart is not None], strict=True)
    )
    adjusted = dict(zip(tested, holm([p[i] for i in tested]), strict=True))
    return [
        Pair(
            *(budget, task, first, second, apart),
            change=apart.mean if apart is not None else second.mean - first.mean,
            p=p.get(i, math.nan),
            adjusted=adjusted.get(i, math.nan),
        )
        for i, (first, second, apart) in enumerate(found)
    ]


def _in_order(cell: Cell, seeds: Sequence[int]) -> list[float]:
    scores = dict(zip(cell.seeds, cell.scores, strict=True))
    return [scores[seed] for seed in seeds]


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The keys of two resolved studies whose values differ, names and stacks aside."""
    one, other = ({k: v for k, v in study.items() if k not in _TOLD_ELSEWHERE} for study in (first, second))
    return tuple(_apart(one, other))


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Keys that differ, each with both values; of what only one has, the outermost key alone."""
    for key in dict.fromkeys([*one, *other]):
        place = f"{prefix}{key}"
        mine, yours = one.get(key, _NONE), other.get(key, _NONE)
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            yield from _apart(mine, yours, f"{place}.")
        elif prefix == "tasks." and (mine is _NONE or yours is _NONE):
            continue  # a task of one study alone is said to be that
        elif mine != yours:
            yield place, _as_text(mine), _as_text(yours)


def _as_text(value: Any) -> str:
    return "–" if value is _NONE else json.dumps(value)


def _made(one: Findings, other: Findings) -> list[str]:
    """Say in what the two runs were made differently: code, versions, devices."""
    said = []
    # Tables keep the beginnings of these hashes, and those of earlier versions none.
    codes = [{trial.code[:SHORT_KEY] for trial in each.plan.trials} - {""} for each in (one, other)]
    if codes[0] and codes[1] and not codes[0] & codes[1]:
        said.append("The code that trains and scores differs between the two studies.")
    for key in ("torch", "device_name", "commit"):
        values = [sorted({str(env.get(key, "")) for env in each.environments} - {""}) for each in (one, other)]
        if values[0] and values[1] and values[0] != values[1]:
            said.append(f"Made with {key} {', '.join(values[0])} and with {', '.join(values[1])}.")
    for name, each in zip(_NAMES, (one, other), strict=True):
        if each.missing or each.failed:
            said.append(
                f"The {name} study is a part: {format_count(len(each.missing), 'trial')} without a result, "
                f"{len(each.failed)} failed."
            )
    return said
