"""Studies that were kept as a file and tables are read as runs are, and what they do not tell is said."""

from __future__ import annotations

import csv
import functools
import re
import shutil
from pathlib import Path

import pytest
import yaml
from small_study import SMALL, run

from hybridzoo.architectures.plain_yaml import read_file
from hybridzoo.architectures.whole_file import write_text
from hybridzoo.mixers import SpecError
from hybridzoo.studies import compare, compare_studies, read_findings, write_comparison, write_report
from hybridzoo.studies import report as report_module
from hybridzoo.studies.kept import is_kept
from hybridzoo.studies.verdict_tables import every_table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
KEPT = sorted(path.parent.parent for path in DOCS.rglob("tables/trials.csv"))
PLACEMENT = DOCS / "placement"
read_once = functools.cache(read_findings)


def rows(folder, stem):
    with open(folder / "tables" / f"{stem}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def place(row):
    return [row.get(name, "") for name in ("budget", "task", "stack", "seed", "level", "step")]


def rewrite(folder, stem, change):
    """Write a table anew, each row as `change` gives it; None leaves it out."""
    kept = [new for row in rows(folder, stem) if (new := change(dict(row))) is not None]
    with open(folder / "tables" / f"{stem}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)


def keep(folder, study, target):
    """Keep a run as its file and its tables."""
    write_text(target / "study.yaml", yaml.safe_dump(study, sort_keys=False))
    for stem, table in every_table(read_findings(folder)).items():
        write_text(target / "tables" / f"{stem}.csv", table.to_csv())
    return target


def settings(folder):
    return read_file(folder / "study.yaml", "study.yaml")


@pytest.fixture
def kept(tmp_path):
    """A copy of a kept study, for something to happen to."""
    return shutil.copytree(PLACEMENT, tmp_path / "kept")


def test_there_are_kept_studies():
    assert PLACEMENT in KEPT
    assert DOCS / "hybrids" in KEPT


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.relative_to(DOCS).as_posix())
def test_every_kept_study_is_read_as_its_tables_say(folder):
    findings = read_once(folder)
    assert not findings.missing
    assert not any("left out" in lack for lack in findings.lacks)
    stacks = {(stack.budget, stack.label): stack for stack in findings.plan.stacks}
    for row in rows(folder, "stacks"):
        stack, task = stacks[row["budget"], row["stack"]], row["task"]
        cell = findings.cell(task, stack)
        assert (len(cell.seeds), cell.mean) == (int(row["seeds"]), pytest.approx(float(row["mean"]), rel=1e-12))
        costs = (stack.parameters[task], stack.train_flops[task], stack.decode_flops[task], stack.state_bytes)
        columns = ("parameters", "train_flops_per_token", "decode_flops_per_token", "state_bytes")
        assert costs == tuple(int(row[name]) for name in columns)
    tables = every_table(findings)
    for stem in ("trials", "levels", "learning"):
        if (folder / "tables" / f"{stem}.csv").exists():
            written = list(csv.DictReader(tables[stem].to_csv().splitlines()))
            for new, old in zip(sorted(written, key=place), sorted(rows(folder, stem), key=place), strict=True):
                speeds = [row.pop("tokens_per_second", "") for row in (new, old)]
                assert {name: new[name] for name in old} == old
                assert speeds[0] == speeds[1] or float(speeds[0]) == pytest.approx(float(speeds[1]))


def test_two_kept_studies_are_set_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "read_findings", read_once)
    folders = (DOCS / "hybrids", DOCS / "hybrids" / "windowed")
    side = compare_studies(*folders)
    scores = [{(r["task"], r["stack"], r["seed"]): float(r["score"]) for r in rows(f, "trials")} for f in folders]
    assert len(side.pairs) == 64
    for pair in side.pairs:
        place = (pair.task, pair.first.stack.label)
        apart = [scores[1][*place, seed] - scores[0][*place, seed] for seed in "012"]
        assert pair.change == pytest.approx(sum(apart) / 3)
        if pair.task != "text":
            assert pair.apart.values == pytest.approx(apart)
    settings = {key: values for key, *values in side.changed}
    assert settings["spec.mixers.a.window"] == ["–", "32"]
    assert "stack gdn2, ratio=0 under params (on recall, needle, overwrite, text)" in side.only[0]
    (said,) = [note for note in side.notes if note.startswith("Each study was kept")]
    assert "code, versions and devices that it was made with are not known" in said
    text = write_comparison(side, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64") == 4
    assert str(DOCS) not in text
    assert not re.search(r"<script|url\(|@import|https?://", text)


def test_of_a_task_that_reads_files_seeds_pair_only_where_the_tables_say_what_was_read(kept, tmp_path):
    text = {"type": "bytes", "length": 32, "train": {"steps": 290, "batch_size": 4}}
    study = settings(kept)
    stacks = {"first": study["stacks"]["first"]}
    write_text(kept / "study.yaml", yaml.safe_dump({**study, "stacks": stacks, "tasks": {"recall": text}}))
    rewrite(kept, "trials", lambda row: {**row, "metric": "bits_per_byte"} if row["stack"] in stacks else None)
    other = shutil.copytree(kept, tmp_path / "other")
    for first, second, said in (
        ("", "", "is not known"),
        ("one", "", "is not known"),
        ("one", "two", "draws other data"),
        ("one", "one", ""),
    ):
        for folder, data in ((kept, first), (other, second)):
            rewrite(folder, "trials", lambda row, data=data: {**row, "data": data, "code": ""})
        side = compare_studies(kept, other)
        found = [note for note in side.notes if "seeds do not pair" in note]
        assert len(found) == bool(said)
        assert all(said in note for note in found)
        assert {pair.apart is None for pair in side.pairs} == {bool(said)}


def test_a_run_and_what_was_kept_of_it_are_one(folder, tmp_path):
    there = keep(folder, SMALL, tmp_path / "kept")
    ran, kept = read_findings(folder), read_findings(there)
    assert is_kept(there)
    assert not is_kept(folder)
    assert kept.data == ran.data != {}
    for task, cells in ran.cells.items():
        for place, cell in cells.items():
            found = kept.cells[task][place]
            assert (found.stack, found.seeds, found.scores) == (cell.stack, cell.seeds, cell.scores)
            assert (found.metrics, found.gates, found.seconds) == (cell.metrics, cell.gates, cell.seconds)
            assert found.curve("accuracy") == cell.curve("accuracy")
    for stem, table in every_table(ran).items():
        if stem != "trials":  # its speeds are a quotient, and may differ in the last digit
            assert every_table(kept)[stem] == table
    side = compare_studies(folder, there)
    assert len(side.pairs) == 2
    assert all(pair.change == 0 and pair.apart.n == 2 for pair in side.pairs)
    assert side.only == ((), ())
    assert side.changed == ()
    (said,) = side.notes
    assert said.startswith("The second study was kept as study.yaml and tables")
    assert "the versions and devices" in said  # the code is known, and the same


def test_other_code_is_told_where_tables_know_theirs(folder, tmp_path):
    there = keep(folder, SMALL, tmp_path / "kept")
    rewrite(there, "trials", lambda row: {**row, "code": "0123456789ab"})
    assert "The code that trains and scores differs between the two studies." in compare_studies(folder, there).notes


def test_a_fresh_run_is_compared_with_a_kept_study(tmp_path):
    study = settings(PLACEMENT)
    task = {**study["tasks"]["recall"], "curriculum": [], "train": {"steps": 2, "batch_size": 2}}
    task |= {"examples": 8, "quick_examples": 8}
    stacks = {label: study["stacks"][label] for label in ("first", "last")}
    done, _ = run({**study, "stacks": stacks, "tasks": {"recall": task}}, tmp_path / "run", estimate=0)
    assert done.finished == 6
    side = compare_studies(tmp_path / "run", PLACEMENT)
    assert {pair.first.stack.label for pair in side.pairs} == {"first", "last"}
    assert any("draws other data" in note for note in side.notes)  # of another curriculum
    assert "tasks.recall.train.steps" in {key for key, *_ in side.changed}
    assert "stack all attention under params (on recall)" in side.only[1]


def test_tables_of_earlier_versions_may_lack_columns_and_others_whole_tables(kept):
    whole = read_findings(PLACEMENT)
    rewrite(kept, "trials", lambda row: {name: row[name] for name in ("task", "stack", "seed", "score")})
    for path in (kept / "tables").iterdir():
        if path.name != "trials.csv":
            path.unlink()
    found = read_findings(kept)
    assert [cell.scores for cell in found.of("recall")] == [cell.scores for cell in whole.of("recall")]
    assert "has no tables/stacks.csv, so what its stacks cost is counted as it would be today" in found.lacks
    assert compare_studies(kept, PLACEMENT).pairs[0].apart.n == 3


def test_costs_are_those_of_the_tables_and_are_named_where_today_s_are_others(kept):
    def change(row):
        if row["stack"] == "third":
            return {**row, "parameters": "7", "state_bytes": "11", "solved": "by hand"}
        return row

    rewrite(kept, "stacks", change)
    found = read_findings(kept)
    (stack,) = [stack for stack in found.plan.stacks if stack.label == "third"]
    assert (stack.parameters["recall"], stack.state_bytes, stack.solved) == (7, 11, "by hand")
    assert "has costs in its tables that would be counted otherwise today: third" in found.lacks


def test_what_the_file_does_not_plan_is_left_out_and_named(kept):
    def change(row):
        if row["stack"] == "third":
            return {**row, "stack": "fifth"}
        return {**row, "metric": "loss"} if row["stack"] == "last" else row

    rewrite(kept, "trials", change)
    found = read_findings(kept)
    assert {cell.stack.label for cell in found.of("recall")} == {"first", "second", "no attention", "all attention"}
    assert len(found.missing) == 6
    said = " ".join(found.lacks)
    assert "does not plan, which are left out: fifth on recall" in said
    assert "not shown by today, which are left out: loss of recall" in said
    assert "The first study is a part: 6 trials without a result, 0 failed." in compare_studies(kept, PLACEMENT).notes


def test_trials_that_failed_or_never_ran_are_kept_as_that(kept):
    def change(row):
        states = {"0": row, "1": {**row, "status": "failed", "score": "", "error": "E: no"}}
        return states.get(row["seed"], {**row, "status": "missing", "score": ""})

    rewrite(kept, "trials", change)
    found = read_findings(kept)
    assert {cell.seeds for cell in found.of("recall")} == {(0,)}
    assert {result["error"] for result in found.failed} == {"E: no"}
    assert len(found.failed) == len(found.missing) == 6


def test_a_task_whose_files_are_elsewhere_is_left_out_and_named(kept):
    study = settings(kept)
    words = {"type": "tokens", "train_file": "a.bin", "validation_file": "b.bin", "vocab_size": 64, "length": 8}
    write_text(kept / "study.yaml", yaml.safe_dump({**study, "tasks": {**study["tasks"], "words": words}}))
    found = read_findings(kept)
    assert list(found.plan.shown) == ["recall"]
    assert any(re.match(r"has the task words, which is left out, .*a\.bin", lack) for lack in found.lacks)
    assert len(compare_studies(kept, PLACEMENT).pairs) == 6
    write_text(kept / "study.yaml", yaml.safe_dump({**study, "tasks": {"words": words}}))
    with pytest.raises(SpecError, match=r"a\.bin"):
        read_findings(kept)


def test_stacks_alike_today_keep_the_scores_they_had_apart(tmp_path):
    study = {**SMALL, "hold": {"params": "largest", "train_flops": "largest"}, "seeds": [0]}
    study["stacks"] = {"attention": {"layers": "a"}}
    run(study, tmp_path / "run", estimate=0)
    there = keep(tmp_path / "run", study, tmp_path / "kept")
    both = rows(there, "trials")
    assert len(both) == 2
    assert len({row["key"] for row in both}) == 1  # trained once, for both budgets
    assert len(read_findings(there).plan.distinct) == 1
    rewrite(
        there, "trials", lambda row: {**row, "key": row["budget"], "score": "0.5" if row["budget"] == "params" else "1"}
    )
    found = read_findings(there)
    assert {budget: found.at(budget).of("recall")[0].mean for budget in found.plan.budgets} == {
        "params": 0.5,
        "train_flops": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"task": row["task"]}, r"trials\.csv: has no column 'stack', only: task"),
        (lambda row: {**row, "score": "much"}, r"trials\.csv, line 2: score: expected a number, got 'much'"),
        (lambda row: {**row, "score": "nan"}, r"trials\.csv, line 2: score: expected a number, got 'nan'"),
        (lambda row: {**row, "score": ""}, r"trials\.csv, line 2: score: expected a number, got ''"),
        (lambda row: {**row, "seed": "x"}, r"trials\.csv, line 2: seed: expected a whole number, got 'x'"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_its_line(kept, change, message):
    rewrite(kept, "trials", change)
    with pytest.raises(SpecError, match=message):
        read_findings(kept)


def test_a_table_that_is_no_text_is_named(kept):
    (kept / "tables" / "trials.csv").write_bytes(b"task,stack,seed,score\n\xff\xfe")
    with pytest.raises(SpecError, match=r"trials\.csv: not a table"):
        read_findings(kept)


def test_a_folder_with_neither_says_what_was_looked_for(tmp_path):
    write_text(tmp_path / "study.yaml", yaml.safe_dump(SMALL))
    said = r"no study\.json here, as a run has, and no study\.yaml beside tables/trials\.csv, as a kept study has"
    with pytest.raises(SpecError, match=said):
        compare_studies(tmp_path, PLACEMENT)


def test_a_report_is_not_written_over_the_tables_it_is_read_from(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "draw_all", lambda findings: {})  # drawing takes most of a report's time
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(SpecError, match="would replace the tables that it is read from"):
        write_report(kept)
    text = write_report(tmp_path / "again", read_findings(kept)).read_text(encoding="utf-8")
    assert "This study was kept as study.yaml and tables" in text
    assert "18 of 18 trials finished" in text
    assert "there is no learning curve (train.eval_every gives one)" in text
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    first, again = rows(kept, "trials"), rows(tmp_path / "again", "trials")
    assert [{name: row[name] for name in ("key", "score")} for row in again] == [
        {name: row[name] for name in ("key", "score")} for row in first
    ]
