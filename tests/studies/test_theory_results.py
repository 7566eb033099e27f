"""What the theory probes hand back: verdicts that follow from the numbers, files, pictures, and a study's ratios."""

import csv
import json
import math
import statistics

import pytest
import torch
from rich.console import Console

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies import Execution, run_study, study_from
from hybridzoo.studies.findings import families, gather
from hybridzoo.studies.tables import Table
from hybridzoo.studies.theory import (
    Line,
    Panel,
    Result,
    Settings,
    Statement,
    boundary,
    chunk,
    find_probes,
    lengths,
    list_probes,
    optimality,
    run_probes,
    show,
    show_summary,
    write_results,
)
from hybridzoo.studies.theory.render import draw, format_value
from hybridzoo.studies.theory.result import FAILS, HOLDS, OPEN, UNSEEN

RECURRENT = "carve"


def made_up(*verdicts, **fields):
    statements = tuple(Statement(f"statement {i}", verdict, "numbers") for i, verdict in enumerate(verdicts))
    tables = {"t": Table("about", ("name", "value"), (("a", 1.5), ("b", math.inf), ("c", None)))}
    panel = Panel("title", "x", "y", (Line("line", (1, 2), (0, 1)),), log_x=True, log_y=True, marks=((1.5, "here"),))
    words = {"name": "made-up", "title": "Made up", "claim": "A claim.", "source": "arXiv", "finding": "Found [this]."}
    result = {**words, "statements": statements, "tables": tables, "shown": ("t",), "panels": (panel,), **fields}
    return Result(**result)


def test_a_quarter_is_judged_by_its_best_stack():
    def judged(**scores):
        rows = [
            optimality.Measured("", "recall", "gdn2", stack, share, 3, -behind, behind, behind - 0.01, behind + 0.01)
            for stack, (share, behind) in scores.items()
        ]
        rows = [row._replace(low_together=None, high_together=None) if not row.behind_best else row for row in rows]
        return optimality._judge(rows)

    early_wins = judged(none=(0.0, 0.7), early=(0.25, 0.0), late=(0.25, 0.6), all=(1.0, 0.5))
    assert early_wins.verdict == "holds"
    assert judged(none=(0.0, 0.7), early=(0.25, 0.0), twin=(0.25, 0.005), all=(1.0, 0.5)).verdict == "holds"
    assert judged(early=(0.25, 0.0), late=(0.25, 0.6), all=(1.0, 0.005)).verdict == "cannot be told"
    assert judged(early=(0.25, 0.005), late=(0.25, 0.6), all=(1.0, 0.0)).verdict == "cannot be told"
    lost = judged(early=(0.25, 0.3), late=(0.25, 0.6), half=(0.5, 0.005), all=(1.0, 0.0))
    assert lost.verdict == "does not hold as printed"
    assert "best mean at 1 (all, " in lost.measured
    assert "not told from it: 0.5 (half)" in lost.measured


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, OPEN), OPEN),
        ((OPEN, FAILS, HOLDS), FAILS),
        ((UNSEEN, OPEN), UNSEEN),
        ((UNSEEN, FAILS), FAILS),
    ],
)
def test_the_least_favourable_statement_decides(verdicts, whole):
    assert made_up(*verdicts).verdict == whole


def test_a_statement_that_was_not_seen_as_printed_is_not_judged_as_printed():
    (result,) = run_probes(find_probes(["gradient"]), Settings(size="small"))
    read, ours = result.statements[:2], result.statements[2:]
    assert {statement.verdict for statement in read} == {UNSEEN}
    assert {statement.verdict for statement in ours} == {HOLDS}


def test_what_is_said_of_a_gpu_is_not_judged_by_the_time_of_a_cpu():
    (result,) = run_probes(find_probes(["boundary"]), Settings(size="small", device="cpu"))
    (said,) = [statement for statement in result.statements if "Throughput" in statement.text]
    assert said.verdict == OPEN
    assert "on this CPU" in said.measured
    assert "times as long" in said.measured


def test_where_there_is_a_gpu_its_times_decide_and_every_result_names_it(monkeypatch):
    def chunks(device, settings):
        return [chunk.Timing(L, 0.001 + 0.1 * L**-1 if L else 0.001, "cuda", "triton", "bfloat16") for L in (0, 16, 64)]

    def forms(device, settings):
        seconds = {
            "key-axis, chunkwise (triton)": 0.002,
            boundary.KEY_LOOP: 0.5,
            boundary.LOOP: 0.6,
            boundary.MANY: 0.05,
        }
        return [boundary.Timing(1024, name, s, s / 0.002, "cuda") for name, s in seconds.items()]

    monkeypatch.setattr(Settings, "resolve_device", lambda self: torch.device("cuda"))
    monkeypatch.setattr(Settings, "device_name", "Some GPU")
    monkeypatch.setattr(chunk, "time_on", chunks)
    monkeypatch.setattr(boundary, "time_on", forms)
    monkeypatch.setattr(lengths, "captures", lambda form, device: False)
    for result in run_probes(find_probes(["chunk", "boundary"]), Settings(size="small")):
        assert result.facts["device"] == "Some GPU"
        assert "Some GPU" in result.finding
        assert [panel.title for panel in result.panels if "Some GPU" in panel.title]
        assert "time" in result.shown
        (judged,) = [s for s in result.statements if "Throughput" in s.text or "On a GPU" in s.text]
        assert judged.verdict != OPEN
        assert "Some GPU" in judged.measured
        assert draw(result)


def test_a_device_is_named_as_it_is_and_refused_where_it_is_not():
    assert Settings(device="cpu").resolve_device() == torch.device("cpu")
    assert Settings(device="cpu").device_name == "cpu"
    assert Settings().resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SpecError, match=r"unknown device 'gpu'.*cpu, cuda"):
        Settings(device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="torch sees no GPU"):
            Settings(device="cuda").resolve_device()


def test_more_than_three_pictures_of_a_probe_stand_in_two_rows_with_their_intervals():
    line = Line("line", (1.0, 2.0), (0.5, 0.6), spans=((0.4, 0.7), (0.5, 0.8)))
    panel = Panel("title", "x", "y", (line,))
    for number, rows in ((1, 1), (3, 1), (4, 2), (5, 2)):
        figure = draw(made_up(HOLDS, panels=(panel,) * number))
        assert len(figure.axes) == number
        assert {axes.get_gridspec().nrows for axes in figure.axes} == {rows}
        (spans,) = figure.axes[0].collections
        assert [segment[:, 1].tolist() for segment in spans.get_segments()] == [[0.4, 0.7], [0.5, 0.8]]


def test_every_number_reaches_the_files_and_json_holds_no_infinity(tmp_path):
    path = write_results(
        tmp_path / "new", [made_up(FAILS, facts={"most": math.inf})], Settings(size="small", seed=3, device="cpu")
    )
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (data["size"], data["seed"], data["probes"][0]["verdict"]) == ("small", 3, FAILS)
    assert data["environment"]["device"] == "cpu"
    assert data["probes"][0]["facts"] == {"most": "inf"}
    rows = list(csv.reader((path.parent / data["probes"][0]["tables"]["t"]).read_text().splitlines()))
    assert rows == [["name", "value"], ["a", "1.5"], ["b", "inf"], ["c", ""]]
    assert (path.parent / data["probes"][0]["figure"]).read_bytes().startswith(b"\x89PNG")


def test_a_terminal_shows_claim_verdict_numbers_and_finding():
    console = Console(record=True, width=200)
    result = made_up(FAILS, HOLDS)
    show(console, result)
    show_summary(console, [result])
    text = console.export_text()
    for part in (
        result.claim,
        "does not hold as printed: statement 0",
        "holds: statement 1",
        "numbers",
        "Found [this].",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (12345, "12,345"), (0.5, "0.5"), (1e-9, "1.0e-09"), (0.0, "0"), (math.inf, "inf"), (True, "True")],
)
def test_values_are_shown_short(value, shown):
    assert format_value(value) == shown


def test_a_probe_s_numbers_do_not_depend_on_which_others_run():
    small = Settings(size="small", seed=1)
    alone = next(iter(run_probes(find_probes(["capacity"]), small)))
    *_, after = run_probes(find_probes(["optimality", "capacity"]), small)
    again = list(run_probes(find_probes(["optimality", "capacity"]), small))
    assert [result.name for result in again] == ["capacity", "optimality"]
    assert again[0].tables == alone.tables
    assert after.tables == again[1].tables


def test_probes_are_found_by_name_in_the_paper_s_order():
    assert [probe.name for probe in find_probes([])] == [probe.name for probe in list_probes()]
    assert [probe.name for probe in find_probes(["chunk", "capacity", "chunk"])] == ["capacity", "chunk"]
    with pytest.raises(SpecError, match="did you mean 'stability'"):
        find_probes(["stabilty"])


def test_shares_of_attention():
    assert [optimality.share(ratio) for ratio in ("1:1", "3:1", "7:1")] == [0.5, 0.25, 0.125]


def test_the_spread_that_hides_a_gap_puts_it_at_the_edge_of_95_per_cent():
    for gap in (0.07, 0.23):
        spread = optimality.largest_spread(gap, 1)
        tail = 1 - statistics.NormalDist(0, spread * math.sqrt(2)).cdf(gap)
        assert 2 * tail == pytest.approx(0.05)
        assert optimality.largest_spread(gap, 3) < optimality.largest_spread(gap, 30)
        needed = optimality.seeds_needed(gap, 2 * spread)
        assert optimality.largest_spread(gap, needed) >= 2 * spread > optimality.largest_spread(gap, needed - 1)


def test_without_noise_the_published_best_always_wins_and_with_much_nothing_is_told():
    assert optimality.redraw(1e-6, 200, 0)["3:1"] == 1
    shares = optimality.redraw(100.0, 2000, 0).values()
    assert max(shares) < 0.35
    assert sum(shares) == pytest.approx(1)


def test_what_was_published_cannot_be_told_and_without_a_study_that_is_said():
    result = optimality.probe(Settings(size="small"))
    assert result.verdict == OPEN
    assert "--study" in result.statements[1].measured


ROWS = [("all", "attention", 1.0), ("1/2", RECURRENT, 0.5), ("1/4", RECURRENT, 0.25), ("none", RECURRENT, 0.0)]


def curve(make_results, quarter, other, noise, seeds=(0, 1, 2)):
    """Judge a made-up study whose stack of a quarter scores `quarter` at recall and all others `other`."""
    rows = [(label, family, share, quarter if share == 0.25 else other, 2.5) for label, family, share in ROWS]
    plan, results = make_results(rows=rows, seeds=seeds, noise=noise)
    found = families(gather(plan, results).comparable("recall"))
    return optimality._judge(optimality.compare("recall", RECURRENT, found[RECURRENT], maximise=True))


def test_a_study_decides_only_where_seeds_tell_a_quarter_apart(make_results):
    assert curve(make_results, 0.9, 0.5, 0.01).verdict == HOLDS
    assert curve(make_results, 0.5, 0.9, 0.01).verdict == FAILS
    assert curve(make_results, 0.9, 0.899, 0.05).verdict == OPEN
    assert curve(make_results, 0.9, 0.5, 0.01, seeds=(0,)).verdict == OPEN


def test_a_study_without_a_quarter_is_open(make_results):
    plan, results = make_results(rows=[(*row, 0.5, 2.5) for row in ROWS if row[2] != 0.25])
    found = families(gather(plan, results).comparable("recall"))
    judged = optimality._judge(optimality.compare("recall", RECURRENT, found[RECURRENT], maximise=True))
    assert judged.verdict == OPEN
    assert "no stack with a quarter" in judged.measured


STUDY = {
    "name": "ratios",
    "spec": {
        "d_model": 16,
        "mixers": {"m": {"type": "gla", "n_heads": 2, "head_dim": 8}, "a": {"type": "attention", "n_heads": 2}},
        "ffn": {"type": "swiglu", "width": 16},
    },
    "stacks": {"1/2": {"layers": "m a m a"}, "1/4": {"layers": "m a m*2"}},
    "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 4, "values": 4, "examples": 4}},
    "hold": {"params": "largest", "train_flops": "largest", "tolerance": 0.05},
    "train": {"steps": 1, "batch_size": 2},
    "seeds": [0, 1],
}


def test_a_real_study_s_curves_are_read_budget_by_budget(tmp_path):
    run_study(study_from(STUDY), tmp_path, Execution(processes=0))
    result = optimality.probe(Settings(size="small", study=tmp_path))
    assert len(result.statements) == 3  # the published numbers, and one curve a budget
    rows = result.tables["measured"].rows
    assert [row[0] for row in rows] == ["params", "params", "train_flops", "train_flops"]
    assert {row[4] for row in rows} == {0.25, 0.5}
    for budget in ("params", "train_flops"):
        behind = [row[7] for row in rows if row[0] == budget]
        assert min(behind) == 0  # the best of each curve, which no other is ahead of
    assert len(result.panels) == 3
