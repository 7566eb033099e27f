"""A report loads nothing, says what the numbers say, and is written of whatever results there are."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hybridzoo.studies import gather, read_findings, write_report
from hybridzoo.studies import report as report_module
from hybridzoo.studies.findings import families
from hybridzoo.studies.limits import limits
from hybridzoo.studies.results import write_json, write_result
from hybridzoo.studies.stats import summarise
from hybridzoo.studies.tables import all_tables

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what a page would load, its text, and whether every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.images, self.texts, self.links, self.tags = [], [], [], [], [], set()
        self.ids, self.order, self.figures = set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        words = dict(attributes)
        self.ids.add(words.get("id"))
        self.order.append((tag, len(self.order)))
        if tag == "figure":
            self.figures.append([len(self.order), None])
        if tag not in VOID:
            self.open.append(tag)
        for name in ("src", "srcset", "data", "poster", "background"):
            if name in words:
                self.loads.append(words[name])
        if tag == "img":
            self.images.append(words)
        if tag == "a":
            self.links.append(words)
        assert not any(name.startswith("on") for name in words)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "figure":
            self.figures[-1][1] = len(self.order)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def saved_and_jumps(self):
        saved = [link for link in self.links if "download" in link]
        return saved, [link for link in self.links if "download" not in link]

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write made-up results as a run would, report on them, and return the page; pictures only where asked for."""

    def write(plan, results, damage=None, draw=False):
        if not draw:  # drawing takes most of a report's time
            monkeypatch.setattr(report_module, "draw_all", lambda findings: {})
        write_json(tmp_path / "study.json", plan.to_dict())
        names = {trial.key: trial.file_name for trial in plan.trials}
        for result in results:
            write_result(tmp_path / "trials" / names[result["key"]], result)
        if damage:
            damage(tmp_path)
        report = write_report(tmp_path)
        assert report == tmp_path / "report.html"
        return Page(report.read_text(encoding="utf-8"))

    write.folder = tmp_path
    return write


def rows(folder, stem):
    with open(folder / "tables" / f"{stem}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def failed(result, error="ValueError: no"):
    return {**result, "status": "failed", "metrics": {}, "history": {}, "error": error, "traceback": "Traceback: x"}


def test_a_page_holds_all_it_shows_and_loads_nothing(written, make_results):
    page = written(*make_results(), draw=True)
    assert len(page.images) == 6
    for image in page.images:
        kind, _, encoded = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(encoded)
        assert content.startswith(b"\x89PNG")
        assert image["alt"]
    assert all(source.startswith("data:") for source in page.loads)
    saved, jumps = page.saved_and_jumps
    assert all(link["href"].startswith("data:text/csv") for link in saved)
    assert {link["href"] for link in jumps} <= {f"#{link['download']}" for link in saved}
    assert {link["href"] for link in jumps} <= {f"#{name}" for name in page.ids}
    assert len(page.figures) == len(page.images)
    for start, end in page.figures:  # every picture leads to the numbers behind it
        assert "a" in {tag for tag, _ in page.order[start:end]}
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    text = (written.folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_pictures_and_tables_lie_beside_the_page_and_are_the_same(written, make_results):
    page = written(*make_results(), draw=True)
    files = {path.stem: path.read_bytes() for path in (written.folder / "figures").glob("*.png")}
    assert set(files) == {"ratio", "levels-recall", "frontier", "learning-recall", "learning-text", "parameters"}
    assert {base64.b64decode(image["src"].partition(",")[2]) for image in page.images} == set(files.values())
    drawings = {path.stem: path.read_text() for path in (written.folder / "figures").glob("*.svg")}
    assert set(drawings) == set(files)
    for drawing in drawings.values():
        assert "</svg>" in drawing
        assert "<image" not in drawing  # lines and letters, not a picture of them
    saved, _ = page.saved_and_jumps
    for link in saved:
        inside = base64.b64decode(link["href"].partition(",")[2])
        assert inside == (written.folder / "tables" / link["download"]).read_bytes()
    named = {"stacks", "trials", "levels", "learning", "comparisons", "optima"}
    assert {link["download"] for link in saved} == {f"{stem}.csv" for stem in named}


def test_the_tables_hold_exactly_what_the_results_hold(written, make_results):
    plan, results = make_results()
    written(plan, results)
    by_trial = {(r["task"], r["stack"], r["seed"]): r for r in results}
    trials = rows(written.folder, "trials")
    assert len(trials) == len(results)
    for row in trials:
        result = by_trial[row["task"], row["stack"], int(row["seed"])]
        assert float(row["score"]) == result["metrics"][row["metric"]]
        assert float(row["seconds"]) == result["seconds"]
    for row in rows(written.folder, "stacks"):
        runs = [by_trial[row["task"], row["stack"], seed]["metrics"][row["metric"]] for seed in (0, 1)]
        summary = summarise(runs)
        assert float(row["mean"]) == summary.mean
        assert (float(row["low_95"]), float(row["high_95"])) == (summary.low, summary.high)
        (stack,) = [one for one in plan.stacks if one.label == row["stack"]]
        assert int(row["parameters"]) == stack.parameters[row["task"]]
        assert int(row["state_bytes"]) == stack.state_bytes
        assert float(row["attention_share"]) == stack.attention
    for row in rows(written.folder, "levels"):
        metric = "accuracy" if row["level"] == "32" else f"accuracy@{row['level']}"
        assert float(row["score"]) == by_trial["recall", row["stack"], int(row["seed"])]["metrics"][metric]
    points = sum(len(result["history"]["evaluations"]) for result in results)
    assert len(rows(written.folder, "learning")) == points


def test_the_frontier_is_of_stacks_that_no_other_beats_on_both(written, make_results):
    written(*make_results())
    for task, sign in (("recall", 1), ("text", -1)):
        points = [
            (int(row["state_bytes"]), sign * float(row["mean"]), row["on_frontier"] == "True")
            for row in rows(written.folder, "stacks")
            if row["task"] == task
        ]
        for cost, value, best in points:
            beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v, _ in points)
            assert best is not beaten


def test_names_from_a_study_are_shown_and_never_run(written, make_results):
    from dataclasses import replace

    nasty = '<script>alert("x")</script><img src=http://evil/x>'
    rows_ = [(nasty, "carve", 0.0, 0.5, 2.4), ("attention", "attention", 1.0, 0.9, 2.5)]
    plan, results = make_results(rows=rows_)
    plan = replace(plan, study={**plan.study, "name": nasty, "about": nasty}, excluded=(("params", nasty, nasty),))
    results[1] = failed(results[1], nasty)
    page = written(plan, results, draw=True)
    assert not page.tags & {"script"}
    assert all(image["src"].startswith("data:") for image in page.images)
    assert nasty in page.text


@pytest.mark.parametrize("kept", [1, 20])
def test_a_part_of_a_study_is_reported_as_a_part(written, make_results, kept):
    plan, results = make_results()
    page = written(plan, results[:kept], draw=True)
    assert f"{kept} of 28 trials finished" in page.text
    assert f"Without a result yet: {28 - kept} trials. This report shows a part" in page.text
    assert plan.trials[-1].title in page.text
    assert {row["status"] for row in rows(written.folder, "trials")} == {"finished", "missing"}


def test_a_study_without_any_result_is_reported_too(written, make_results):
    plan, _ = make_results()
    page = written(plan, [], draw=True)
    assert "On recall no trial has finished." in page.text
    assert "0 of 28 trials finished" in page.text


def test_when_all_failed_the_report_says_why(written, make_results):
    plan, results = make_results()
    page = written(plan, [failed(result, f"OddError: number {i}") for i, result in enumerate(results)], draw=True)
    assert "28 trials failed." in page.text
    assert "OddError: number 27" in page.text
    assert "Traceback: x" in page.text


def test_one_failed_seed_leaves_the_other_in_the_means(written, make_results):
    plan, results = make_results()
    results[0] = failed(results[0])
    written(plan, results)
    (row,) = [r for r in rows(written.folder, "stacks") if (r["task"], r["stack"]) == ("recall", "attention")]
    assert row["seeds"] == "1"
    assert row["low_95"] == ""
    assert float(row["mean"]) == results[14]["metrics"]["accuracy"]


def test_one_seed_has_no_interval_and_the_report_says_what_that_means(written, make_results):
    page = written(*make_results(seeds=(0,)), draw=True)
    assert "1 seed," not in page.text
    assert "One seed says nothing of chance" in page.text
    assert "the table has no intervals" in page.text
    assert "no order of stacks is established" in page.text
    assert "one seed does not say whether by more than chance" in page.text
    assert "by more than its seeds differ" not in page.text
    assert "on average" not in page.text
    assert "wide for that reason" not in page.text
    assert all(row["low_95"] == "" for row in rows(written.folder, "stacks"))


def test_damaged_results_are_named_and_left_out(written, make_results):
    plan, results = make_results()

    def damage(folder):
        victim = folder / "trials" / plan.trials[0].file_name
        victim.write_bytes(victim.read_bytes()[:100])
        (folder / "trials" / "older.corrupt").write_text("{")

    page = written(plan, results, damage)
    assert "Damaged and not used: 1 result file." in page.text
    assert plan.trials[0].file_name in page.text
    assert "older.corrupt" in page.text
    assert "27 of 28 trials finished" in page.text


def test_a_later_report_replaces_the_pictures_of_an_earlier_one(written, make_results):
    plan, results = make_results()
    written(plan, results, draw=True)
    for path in (written.folder / "trials").iterdir():
        path.unlink()
    written(plan, [], draw=True)
    assert {path.name for path in (written.folder / "figures").iterdir()} == {"parameters.png", "parameters.svg"}


def test_a_stack_left_out_is_listed_with_the_reason(written, make_results):
    page = written(*make_results(excluded=[("giant", "too large by far")]))
    assert "giant: too large by far" in page.text


def test_the_page_says_what_was_held_equal_and_what_it_was_made_with(written, make_results):
    page = written(*make_results())
    assert "no stack further off than 0.67 %" in page.text
    assert "torch" in page.text
    assert "made-up" in page.text
    assert "tolerance: 0.02" in page.text
    assert "Nothing: the stacks are compared as they were declared." in written(*make_results(hold=False)).text


def test_half_an_interval_of_percentages_is_said_in_points(written, make_results):
    page = written(*make_results())
    assert re.search(r"± \d+\.\d points", page.text)
    assert not re.search(r"± [\d.]+ %", page.text)


def test_limits_are_drawn_from_the_facts_of_the_run(make_results):
    words = " ".join(limits(gather(*make_results())))
    assert "149 k to 161 k parameters" in words
    assert "Two seeds bound chance only loosely" in words
    assert "synthetic task" in words
    more = " ".join(limits(gather(*make_results(seeds=(0, 1, 2), hold=False))))
    assert "seeds bound" not in more
    assert "made equal" not in more


def test_a_family_ends_at_the_only_stack_of_attention_alone(make_results):
    curves = families(gather(*make_results()).of("recall"))
    assert [cell.stack.attention for cell in curves["carve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [cell.stack.label for cell in curves["gdn2"]] == ["gdn2"]
    assert "attention" not in curves


@pytest.fixture
def crossed(make_results, make_kind):
    """Return made-up results where three ratios of carve stand under every value of an axis."""

    def make(part, axis, values):
        placed = [(value, share) for value in values for share in (0.0, 0.5, 1.0)]
        rows_ = [
            (f"{share:g} of {value}", "carve" if share < 1 else "attention", share, 0.5 + share / 3, 2.4)
            for value, share in placed
        ]
        plan, results = make_results(rows=rows_)
        stacks = []
        for stack, (value, share) in zip(plan.stacks, placed, strict=True):
            kind = make_kind(stack.family, share)
            if getattr(kind, part):  # a stack without attention has no words of attention
                kind = replace(kind, **{part: {**getattr(kind, part), axis: value}})
            stacks.append(replace(stack, kind=kind))
        return families(gather(replace(plan, stacks=tuple(stacks)), results).of("recall"))

    return make


def test_a_curve_joins_only_stacks_that_differ_in_the_ratio(crossed):
    curves = crossed("rest", "d_model", (64, 128))
    assert {name: [cell.stack.label for cell in curve] for name, curve in curves.items()} == {
        f"carve (d_model={width})": [f"{share} of {width}" for share in ("0", "0.5", "1")] for width in (64, 128)
    }


def test_a_word_in_which_several_mixers_differ_is_said_once(make_results, make_kind):
    rows_ = [(f"{share:g} of {value}", "carve", share, 0.5, 2.4) for value in (None, 8) for share in (0.25, 0.5)]
    plan, results = make_results(rows=rows_)
    kinds = [
        replace(make_kind("carve", 0.5), recurrent={"carve.conv": conv, "carve 2.conv": conv}) for conv in (None, 8)
    ]
    stacks = [replace(stack, kind=kinds[place // 2]) for place, stack in enumerate(plan.stacks)]
    curves = families(gather(replace(plan, stacks=tuple(stacks)), results).of("recall"))
    assert list(curves) == ["carve (conv=null)", "carve (conv=8)"]


def test_what_concerns_attention_alone_leaves_the_recurrent_end_to_every_curve(crossed):
    curves = crossed("attention", "attention.window", (16, 32))
    assert set(curves) == {"carve (window=16)", "carve (window=32)"}
    for window in (16, 32):
        labels = {cell.stack.label for cell in curves[f"carve (window={window})"]}
        assert labels == {"0 of 16", "0 of 32", f"0.5 of {window}", f"1 of {window}"}


def test_csv_keeps_every_digit_and_quotes_what_must_be(make_results):
    label = 'a "quoted", name\nwith a break'
    plan, results = make_results(rows=[(label, "carve", 0.0, 1 / 3, 2.4)], seeds=(0,))
    table = all_tables(gather(plan, results))["stacks"]
    first, *_ = csv.DictReader(io.StringIO(table.to_csv()))
    assert first["stack"] == label
    assert float(first["mean"]) == results[0]["metrics"]["accuracy"]
    assert math.isfinite(float(first["mean"]))


def test_findings_read_back_are_those_that_were_written(written, make_results):
    plan, results = make_results()
    written(plan, results)
    read, given = read_findings(written.folder), gather(plan, results)
    assert all_tables(read) == all_tables(given)
    assert read.plan == given.plan


def test_a_report_says_of_which_stacks_it_shows_no_content_gate(make_results):
    plan, results = make_results()
    words = {"layers": "c", "mixers": {"c": {"type": "carve", "erase": "content", "content_chunk": 96}}}
    carve = plan.stacks[-1]
    stacks = (*plan.stacks[:-1], replace(carve, specs={"recall": words, "text": words}))
    found = gather(replace(plan, stacks=stacks, longest={"recall": 96, "text": 97}), results)
    (said,) = [sentence for sentence in limits(found) if "content" in sentence]
    assert said.startswith(
        "What a content gate does is not shown on recall, whose sequences of training have at most 96"
    )
    assert said.endswith(f": {carve.label}.")


def test_a_report_names_the_study_as_given_and_what_was_laid_over_its_file(written, make_results):
    plan, results = make_results()
    text = written(plan, results).text
    assert "The study as given" in text
    assert "with every default" not in text
    assert "Laid over the study's file" not in text
    assert "of training and scoring, summed over them" in text
    laid = replace(plan, study={**plan.study, "overrides": ["seeds=[0]", "train.lr=<1>"]})
    assert "Laid over the study's file: 'seeds=[0]' 'train.lr=<1>'" in " ".join(written(laid, results).text.split())
