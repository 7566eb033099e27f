"""Studies that were kept as `study.yaml` and `tables/*.csv`, without their trials, read back as what a run leaves.

The plan is made anew from the file; scores, curves, gates and what stacks cost are those of the tables. What these do
not tell, since no table has it or a version before this one wrote them, is said in `Findings.lacks`. May import nothing
above studies; report.py reads runs and kept studies alike, and tables.py writes what is read here.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.findings import Findings, gather
from hybridzoo.studies.gates import QUANTILES
from hybridzoo.studies.plan import Plan, make_plan
from hybridzoo.studies.reach import some
from hybridzoo.studies.runner import PLAN
from hybridzoo.studies.stack import Stack
from hybridzoo.studies.study import Study, load_study
from hybridzoo.studies.tasks import Shown, build_task
from hybridzoo.studies.trial import Trial, data_mark, result_of
from hybridzoo.studies.tuning import read_tuned, with_rates
from hybridzoo.training import Evaluation, History

STUDY, TABLES = "study.yaml", "tables"
LOOKED_FOR = f"{STUDY} beside {TABLES}/trials.csv"

# What the rows of a table are of: budget, task, stack and, where it tells seeds apart, the seed.
Place: TypeAlias = tuple[str, ...]


def is_kept(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a study that was kept, and no run."""
    root = Path(folder)
    return not (root / PLAN).exists() and (root / STUDY).is_file() and (root / TABLES / "trials.csv").is_file()


def read_kept(folder: str | os.PathLike[str]) -> Findings:
    """Read a kept study as the findings of a run.

    Only `trials.csv` must be there. Costs that `stacks.csv` lacks are counted; levels, curves and gates that have no
    table are missing. A task that cannot be built here, as its files are elsewhere, is left out and named.

    Raises: `SpecError` that names the file, for a study that cannot be planned and a table that cannot be read.
    """
    root = Path(folder)
    given = load_study(root / STUDY)
    study, data, lacks = _built_here(given)
    plan = make_plan(study)
    tuned = [row for row in read_tuned(root) if row["task"] in study.tasks] if study.tune else []
    plan = with_rates(plan, tuned) if tuned else plan
    rows = _read(root, "trials", ("task", "stack", "seed", "score"))
    trials, odd = _planned(plan, [row for row in rows if row["task"] in study.tasks or row["task"] not in given.tasks])
    plan, counted = _as_counted(_as_trained(plan, trials), _read(root, "stacks", ("task", "stack")))
    details = _Details.of(root, plan)
    results = [
        _result(plan, trial, row, details)
        for trial in plan.trials
        if (row := trials.get(_place_of(trial))) is not None and row.status != "missing"
    ]
    written = {**given.to_dict(), "context": plan.study["context"]}  # with the tasks that are left out
    plan = replace(plan, study=json.loads(json.dumps(written)))  # as a run's is read: lists, where this has tuples
    lacks = [_made_elsewhere(trials.values()), *lacks, *odd, *counted]
    data |= _told(trials.values())
    return replace(gather(plan, results), data=data, tuned=tuple(tuned), lacks=tuple(lacks))


def _made_elsewhere(rows: Iterable[_Row]) -> str:
    code = "" if any(row["code"] for row in rows) else "code, "
    return (
        f"was kept as {STUDY} and tables: what that file leaves out is taken as it is today, and the {code}versions "
        "and devices that it was made with are not known"
    )


def _built_here(study: Study) -> tuple[Study, dict[str, str], list[str]]:
    """Return the study with those tasks that can be built here, what is known of their data, and what cannot and why.

    A task's fingerprint is not its words alone where it reads files, and those of then may not be those of today: of
    these nothing is known.
    """
    lacks = []
    tasks, data = dict(study.tasks), {}
    for label, entry in study.tasks.items():
        try:
            task = build_task(entry.task, f"tasks.{label}")
            _, fingerprint = task.shown, task.fingerprint()
        except SpecError as error:
            if len(tasks) == 1:
                raise
            lacks.append(f"has the task {label}, which is left out, since it cannot be built here: {error}")
            del tasks[label]
        else:
            words = {"type": task.type, **dataclasses.asdict(task.config)}
            if all(name in words and words[name] == value for name, value in fingerprint.items()):
                data[label] = data_mark(fingerprint)
    return replace(study, tasks=tasks), data, lacks


@dataclass(frozen=True)
class _Row:
    """One row of a table: its texts by column, empty where the table or the row has none."""

    where: str
    texts: Mapping[str, str | None]

    def __getitem__(self, column: str) -> str:
        return self.texts.get(column) or ""

    def place(self, plan: Plan, seed: bool = True) -> Place:
        """Return what the row is of. Where a table has no budget, it is the only one that the study has."""
        budget = self["budget"] or (plan.budgets[0] if len(plan.budgets) == 1 else "")
        return (budget, self["task"], self["stack"], *([str(self.whole("seed"))] if seed else []))

    @property
    def status(self) -> str:
        """What became of a trial; of a table that does not say it, a score."""
        return self["status"] or ("finished" if self["score"] else "missing")

    def number(self, column: str) -> float:
        try:
            value = float(self[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SpecError(f"{self.where}: {column}: expected a number, got '{self[column]}'")
        return value

    def whole(self, column: str) -> int:
        try:
            return int(self[column])
        except ValueError:
            raise SpecError(f"{self.where}: {column}: expected a whole number, got '{self[column]}'") from None


def _read(root: Path, stem: str, needed: Sequence[str]) -> list[_Row]:
    """Read one table; none where it was not kept. A column that is not `needed` may be missing: it is then empty."""
    path = root / TABLES / f"{stem}.csv"
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = [_Row(f"{path}, line {reader.line_num}", texts) for texts in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a table ({error})") from None
    for name in needed:
        if name not in columns:
            raise SpecError(f"{path}: has no column '{name}', only: {', '.join(columns) or 'none'}")
    return rows


@dataclass(frozen=True, kw_only=True)
class _KeptTrial(Trial):
    """A trial of then. What its key was hashed from is not in the tables, but the key is: stacks that are alike today
    were trained once then only where their rows have one."""

    then: str

    @property
    def key(self) -> str:
        return self.then


def _place_of(trial: Trial) -> Place:
    return trial.budget, trial.task, trial.stack, str(trial.seed)


def _planned(plan: Plan, rows: Iterable[_Row]) -> tuple[dict[Place, _Row], list[str]]:
    """Return the rows of the plan's trials, and say which are left out: others, and those of other scores."""
    planned = {_place_of(trial) for trial in plan.trials}
    found: dict[Place, _Row] = {}
    unplanned: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for row in rows:
        place = row.place(plan)
        if place not in planned:
            unplanned[" on ".join((place[2], place[1]))] = None
        elif row["metric"] not in ("", plan.shown[row["task"]].metric):
            unknown[f"{row['metric']} of {row['task']}"] = None
        else:
            found[place] = row
    said = []
    if unplanned:
        said.append(f"has trials in its tables that {STUDY} does not plan, which are left out: {_listed(unplanned)}")
    if unknown:
        said.append(f"has scores that its tasks are not shown by today, which are left out: {_listed(unknown)}")
    return found, said


def _listed(names: Iterable[str]) -> str:
    return "; ".join(some(names))


def _as_trained(plan: Plan, rows: Mapping[Place, _Row]) -> Plan:
    """Return the plan with its trials under the keys of then."""
    trials = []
    for trial in plan.trials:
        place = _place_of(trial)
        row = rows.get(place)
        words = {one.name: getattr(trial, one.name) for one in dataclasses.fields(trial)}
        key, code = ("", "") if row is None else (row["key"], row["code"])
        trials.append(_KeptTrial(**{**words, "code": code}, then=key or " · ".join(place)))
    return replace(plan, trials=tuple(trials))


def _as_counted(plan: Plan, rows: Sequence[_Row]) -> tuple[Plan, list[str]]:
    """Return the plan with the costs that the table of stacks has, and say where today's count is another."""
    by_stack: dict[Place, list[_Row]] = {}
    for row in rows:
        budget, _, label = row.place(plan, seed=False)
        by_stack.setdefault((budget, label), []).append(row)
    stacks = [_with_costs(stack, by_stack.get((stack.budget, stack.label), ())) for stack in plan.stacks]
    said = []
    if not rows:
        said.append("has no tables/stacks.csv, so what its stacks cost is counted as it would be today")
    other = [one.label for one, was in zip(plan.stacks, stacks, strict=True) if replace(one, solved=was.solved) != was]
    if other:
        said.append(f"has costs in its tables that would be counted otherwise today: {_listed(dict.fromkeys(other))}")
    return replace(plan, stacks=tuple(stacks)), said


def _with_costs(stack: Stack, rows: Iterable[_Row]) -> Stack:
    """Return the stack with what the table says of it: one row a task, and where that has nothing, as it is."""
    for row in rows:
        task = row["task"]
        costs: dict[str, Any] = {
            field: {**counts, task: row.whole(column)}
            for field, column, counts in (
                ("parameters", "parameters", stack.parameters),
                ("train_flops", "train_flops_per_token", stack.train_flops),
                ("decode_flops", "decode_flops_per_token", stack.decode_flops),
            )
            if task in counts and row[column]
        }
        costs |= {field: row.whole(field) for field in ("ffn_width", "state_bytes", "kv_bytes") if row[field]}
        stack = replace(stack, **costs, solved=row["solved"] or stack.solved)
    return stack


@dataclass(frozen=True)
class _Details:
    """What was measured of trials beside their scores: by level, on the way (step and score), and of their gates."""

    levels: Mapping[Place, Mapping[int, float]]
    curves: Mapping[Place, Sequence[tuple[int, float]]]
    gates: Mapping[Place, Sequence[dict[str, Any]]]

    @classmethod
    def of(cls, root: Path, plan: Plan) -> _Details:
        levels: dict[Place, dict[int, float]] = {}
        curves: dict[Place, list[tuple[int, float]]] = {}
        gates: dict[Place, list[dict[str, Any]]] = {}
        place = ("task", "stack", "seed")
        for row in _read(root, "levels", (*place, "level", "score")):
            levels.setdefault(row.place(plan), {})[row.whole("level")] = row.number("score")
        for row in _read(root, "learning", (*place, "step", "score")):
            curves.setdefault(row.place(plan), []).append((row.whole("step"), row.number("score")))
        numbers = ("mean", *QUANTILES)
        for row in _read(root, "gates", (*place, "layer", "mixer", "gate", *numbers)):
            values = {"layer": row.whole("layer"), "mixer": row["mixer"], "gate": row["gate"]}
            gates.setdefault(row.place(plan), []).append({**values, **{name: row.number(name) for name in numbers}})
        return cls(levels, curves, gates)


def _result(plan: Plan, trial: Trial, row: _Row, details: _Details) -> dict[str, Any]:
    """Return the record of a trial as its file had it, as far as the tables tell."""
    shown, place = plan.shown[trial.task], _place_of(trial)
    seconds = row.number("seconds") if row["seconds"] else 0.0
    if row.status == "failed":
        return result_of(trial, status="failed", seconds=seconds, error=row["error"], finished_at="")
    metrics = _metrics(shown, row, details.levels.get(place, {}))
    return result_of(
        trial,
        status="finished",
        seconds=seconds,
        metrics=metrics,
        history=_history(plan, trial, row, metrics, details.curves.get(place, ())).to_dict(),
        gates=list(details.gates.get(place, ())),
        finished_at="",
    )


def _metrics(shown: Shown, row: _Row, levels: Mapping[int, float]) -> dict[str, float]:
    at_levels = {metric: levels[level] for level, metric in shown.levels if level in levels}
    return {**at_levels, shown.metric: row.number("score")}


def _history(
    plan: Plan, trial: Trial, row: _Row, metrics: dict[str, float], curve: Sequence[tuple[int, float]]
) -> History:
    """The learning curve, whose last point is of as much as those before it, and the speed; no losses are kept."""
    metric = plan.shown[trial.task].metric
    speed = row.number("tokens_per_second") if row["tokens_per_second"] else 0.0
    tokens = plan.tokens[trial.task]
    last = curve[-1][0] if curve else int(trial.train["steps"])
    return History(
        evaluations=[*(Evaluation(step, {metric: value}) for step, value in curve[:-1]), Evaluation(last, metrics)],
        quick_at_end={metric: curve[-1][1]} if curve else {},
        tokens=tokens,
        seconds=tokens / speed if speed else 0.0,
    )


def _told(rows: Iterable[_Row]) -> dict[str, str]:
    """What the data of each task were where its rows tell, and all the same."""
    marks: dict[str, set[str]] = {}
    for row in rows:
        marks.setdefault(row["task"], set()).add(row["data"])
    return {task: found.pop() for task, found in marks.items() if len(found) == 1 and found != {""}}
