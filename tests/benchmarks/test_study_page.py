"""The pages of studies that were run quote their tables, and the front page quotes those pages."""

from __future__ import annotations

import re

import pytest
from pages import MIXERS, PAGE, ROOT, SHARES, STUDY, TASKS, lines_after, means_of, rows, scores_at, scores_of, text_of

from hybridzoo.studies.comparisons import with_the_best

PLACEMENT = ROOT / "docs/studies/placement"


def test_the_means_are_those_of_the_study() -> None:
    means = {(row["task"], row["stack"]): float(row["mean"]) for row in rows("stacks")}
    header, _, *lines = lines_after("## What was found")
    assert header[2:] == [*SHARES, "100 %"]
    task, written, seen = "", "", 0
    for said, mixer, *cells in lines:
        task = said.split()[0].strip(",") if said else task
        scale, digits = (1, 3) if task == "text" else (100, 1)
        for share, cell in zip(SHARES.values(), cells, strict=False):
            assert cell == f"{scale * means[task, f'{mixer}, {share}']:.{digits}f}", (task, mixer, share)
            seen += 1
        written = cells[4] or written  # one stack, said once
        assert written == f"{scale * means[task, 'all attention']:.{digits}f}"
    assert seen == len(means) - 4


def test_what_the_content_gate_does_is_what_was_compared() -> None:
    pairs = {
        row["task"]: [float(row[name]) for name in ("first_minus_second", "low_95", "high_95")]
        for row in rows("mixers")
        if (row["first"], row["second"]) == ("carve", "carve[erase=token]")
    }
    _, _, *lines = lines_after("## The content gate")
    assert len(lines) == len(pairs) == 4
    for task, apart, interval in lines:
        mean, low, high = pairs[task.split(",")[0]]
        if task.startswith("text"):
            assert (apart, interval) == (f"{mean:.3f}", f"{low:.3f} to {high:+.3f}")
        else:
            assert (apart, interval) == (f"{100 * mean:.1f} points", f"{100 * low:.1f} to {100 * high:+.1f}")
    told = {row["task"] for row in rows("mixers") if "carve[erase=token]" in (row["first"], row["second"])}
    assert told == set(pairs)
    assert not any(low > 0 or high < 0 for _, low, high in pairs.values())


def test_the_best_ratios_are_those_that_were_fitted() -> None:
    found = {(row["task"], row["curve"]): row for row in rows("optima") if not row["level"]}
    for mixer, written in re.findall(r"(gdn2|gated_delta_net)'s (?:is )?(\d[\d.]* % \(0 to \d+ %\))", PAGE):
        row = found["text", mixer]
        said = (
            f"{100 * float(row['best_ratio']):.1f} % ({float(row['low_95']):g} to {100 * float(row['high_95']):.0f} %)"
        )
        assert written == said
    assert {row["verdict"] for (task, _), row in found.items() if task == "text"} == {"flat", "inside"}


def test_the_shares_that_are_best_or_not_told_from_the_best_are_counted() -> None:
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows("trials"):
        scores.setdefault((row["task"], row["stack"]), []).append(float(row["score"]))
    found = {(share, task): 0 for share in (*SHARES, "100 %") for task in TASKS}
    for task in TASKS:
        for mixer in MIXERS:
            stacks = {share: f"{mixer}, {ratio}" for share, ratio in SHARES.items()} | {"100 %": "all attention"}
            curve = [scores[task, stack] for stack in stacks.values()]
            compared = with_the_best(curve, maximise=task != "text")
            apart = {one.index for one in compared.rest if not one.tied}
            for place, share in enumerate(stacks):
                found[share, task] += place not in apart
    header, _, *lines = lines_after("## Beside the published answers")
    assert tuple(header[2:6]) == TASKS
    assert [line[0] for line in lines] == [*SHARES, "100 %"]
    for share, _, *counts, whole in lines:
        assert [int(count) for count in counts] == [found[share, task] for task in TASKS]
        assert int(whole) == sum(map(int, counts))
    front = text_of("README.md")
    said = re.search(
        r"on (\d+) of 20 curves, 3:1 on (\d+), an eighth, .*?, on (\d+), none on (\d+), and attention alone on (\d+)",
        front,
    )
    assert said
    assert list(said.groups()) == [line[-1] for line in (lines[3], lines[2], lines[1], lines[0], lines[4])]


def test_what_is_said_of_length_is_what_was_scored() -> None:
    means = {stack: sum(seeds) / len(seeds) for stack, seeds in scores_at(STUDY, "needle", 12288).items()}
    alone, half = means["all attention"], [means[f"{mixer}, ratio=1/2"] for mixer in MIXERS]
    less = [means[f"{mixer}, {share}"] for share in list(SHARES.values())[:3] for mixer in MIXERS[:4]]
    said = (f"{alone:.0f}", f"{min(half):.0f} to {max(half):.0f}", f"{min(less):.0f} to {max(less):.0f}")
    found = re.search(
        r"attention alone finds (\d+) % of the needles,\s+and mixtures with half of it (\d+ to \d+) %;"
        r".*? find (\d+ to \d+) %",
        PAGE,
        re.DOTALL,
    )
    assert found
    assert found.groups() == said


def test_the_front_page_says_what_the_study_found() -> None:
    front = text_of("README.md")
    for said in (
        r"98 to 100 % beside four of five",
        r"gdn2's fitted best share is 8\.6 % \(95 % interval 0 to 25 %\)",
    ):
        assert re.search(said, front), said
    means = {(row["task"], row["stack"]): 100 * float(row["mean"]) for row in rows("stacks") if row["task"] != "text"}
    halves = sorted(mean for (task, stack), mean in means.items() if task == "recall" and stack.endswith("ratio=1/2"))
    assert (round(halves[1]), round(halves[-1])) == (98, 100)
    few = [
        (stack, mean)
        for study in (STUDY, STUDY / "placed")
        for stack, mean in means_of(study, "recall").items()
        if re.search(r"ratio=(0|1/8|1/4)(, placement=even)?$", stack)
    ]
    ranges = [
        [f"{ends:.0f}" for ends in (min(mine), max(mine))]
        for mine in (
            [mean for stack, mean in few if stack.startswith(names)] for names in (("carve", "gdn2"), "gated", "mamba2")
        )
    ]
    said = re.search(
        r"leaves carve and gdn2 at (\d+) to (\d+) %, gated_delta_net at (\d+) to (\d+) % "
        r"and mamba2 at (\d+) to (\d+) %",
        front,
    )
    assert said
    assert list(said.groups()) == [end for ends in ranges for end in ends]
    text = [(row["stack"] == "all attention", float(row["score"])) for row in rows("trials") if row["task"] == "text"]
    alone, rest = ([score for attention, score in text if attention is which] for which in (True, False))
    assert min(alone) > max(rest) + 0.2


def test_where_attention_stands_scored_what_its_page_says() -> None:
    page = (PLACEMENT / "README.md").read_text(encoding="utf-8")
    stacks = {"none": "no attention", "all layers": "all attention"}
    for title, study in (("# Where", PLACEMENT), ("## In the stacks of the ratio study", PLACEMENT / "eight")):
        scores = scores_of(study)
        _, _, *lines = lines_after(title, page)
        assert len(lines) == len(scores)
        for place, mean, seeds in lines:
            mine = scores[stacks.get(place, place)]
            assert mean == f"{sum(mine) / len(mine):.1f}"
            assert seeds == ", ".join(f"{score:.1f}" for score in mine)
    told = {row["stack"] for row in rows("comparisons", PLACEMENT) if row["told_apart"] == "True"}
    assert told == {"last", "no attention"}


@pytest.mark.parametrize("name", ["report.html", "study.yaml", "tuned.json", "ratio.png", "levels-needle.png"])
def test_the_files_that_it_names_are_there(name: str) -> None:
    assert name in PAGE
    assert (STUDY / name).is_file()
