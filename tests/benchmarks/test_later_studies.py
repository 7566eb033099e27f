"""The page of the ratio study quotes the two that followed it: where the layers stand, and a window."""

from __future__ import annotations

import json
import re
from statistics import fmean as mean

from pages import MIXERS, PAGE, SHARES, STUDY, TASKS, lines_after, means_of, rows, scores_of, text_of

from hybridzoo.studies.comparisons import holm, paired_p
from hybridzoo.studies.stats import difference

PLACED, WINDOWED = STUDY / "placed", STUDY / "windowed"
OVERWRITE = PLACED / "overwrite"
FRONT = text_of("README.md")
WORDS = " ".join(PAGE.split())


def test_where_the_layers_stand_scored_what_the_page_says() -> None:
    means = means_of(PLACED)
    _, _, *lines = lines_after("## Where the layers stand")
    assert [line[0] for line in lines] == list(MIXERS)
    for mixer, *cells in lines:
        stacks = [f"{mixer}, ratio={r}, placement={p}" for r in ("1/8", "1/4") for p in ("even", "first")]
        assert cells == [f"{means[stack]:.1f}" for stack in stacks]
    first = [score for stack, mine in scores_of(PLACED).items() if "first" in stack for score in mine]
    assert f"recall {min(first):.1f} to {max(first):.1f} % in every seed" in WORDS
    rest = [score for stack, mine in scores_of(PLACED).items() if "even" in stack for score in mine]
    assert min(first) > max(rest)
    assert f"the worst seed recalls {min(first):.1f} %, of the others the best {max(rest):.1f}" in WORDS
    layers = {row["stack"]: row["layers"] for row in rows("stacks", PLACED)}
    assert layers["mamba2, ratio=1/8, placement=even"].endswith("a")
    assert layers["mamba2, ratio=1/8, placement=first"].startswith("a")


def test_first_against_even_is_what_a_paired_test_says() -> None:
    scores = scores_of(PLACED)
    apart = []
    for mixer in MIXERS:
        first, even = (
            [
                mean(two)
                for two in zip(*(scores[f"{mixer}, ratio={r}, placement={p}"] for r in ("1/8", "1/4")), strict=True)
            ]
            for p in ("first", "even")
        )
        apart.append(difference(first, even))
    p = holm([paired_p(one) for one in apart])
    said = re.search(
        r"by ([\d.]+) points beside carve \(p ([\d.]+)\), ([\d.]+) beside its twin \(([\d.]+)\), ([\d.]+) beside gdn2 "
        r"\(([\d.]+)\), ([\d.]+) beside gated_delta_net \(([\d.]+)\) and (\d+) beside mamba2 \(below 0\.001\)",
        WORDS,
    )
    assert said
    *told, most = said.groups()
    assert told == [
        word for one, value in zip(apart[:4], p, strict=False) for word in (f"{one.mean:.1f}", f"{value:.3f}")
    ]
    assert most == f"{apart[4].mean:.0f}"
    assert p[4] < 0.001


def test_stacks_that_both_studies_have_scored_what_the_page_says() -> None:
    here, there = means_of(PLACED), means_of(STUDY, "recall")
    for mixer, ratio in (("gated_delta_net", "1/8"), ("gated_delta_net", "1/4"), ("carve", "1/8")):
        stack = f"{mixer}, ratio={ratio}"
        both = (f"{there[stack]:.1f}", f"{here[f'{stack}, placement=even']:.1f}")
        assert re.search(rf"{both[0]}( %)?( there)? and {both[1]}", WORDS), stack


def test_the_gate_is_used_in_one_layer_of_a_hundred() -> None:
    bounds: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows("gates"):
        if row["stack"].startswith("carve,") and row["gate"] == "content":
            key = (row["task"], row["stack"], row["layer"])
            bounds.setdefault(key, []).append((float(row["q05"]), float(row["q95"])))
    wide = {key for key, seeds in bounds.items() if not all(abs(mean(ends)) < 0.5 for ends in zip(*seeds, strict=True))}
    assert len(bounds) == 100
    assert wide == {("overwrite", "carve, ratio=1/4", "0")}
    low = [low for low, _ in bounds["overwrite", "carve, ratio=1/4", "0"]]
    assert f"lower bound is {max(low):.1f} to {min(low):.1f} in all three seeds" in WORDS
    means = means_of(STUDY, "overwrite")
    assert f"scores {means['carve, ratio=1/4']:.1f} % where its twin scores" in WORDS
    assert f"twin scores {means['carve[erase=token], ratio=1/4']:.1f}." in WORDS


def test_the_front_page_says_where_one_layer_recalls() -> None:
    means = means_of(PLACED)
    firsts = [means[f"{mixer}, ratio=1/8, placement=first"] for mixer in MIXERS]
    last = means["mamba2, ratio=1/8, placement=even"]
    assert f"{min(firsts):.1f} to {max(firsts):.1f} % beside all five mixers" in FRONT
    assert f"is at {last:.1f} % with the same layer placed last" in FRONT
    counts = [len(rows("trials", study)) for study in (STUDY, WINDOWED, PLACED, OVERWRITE)]
    assert f"[{sum(counts)} trials]" in FRONT
    assert f"{counts[0]} trials" in WORDS
    assert f"{counts[1]} trials, and with" in WORDS
    assert f"few layers of attention, {counts[2] + counts[3]}." in WORDS


def test_one_layer_on_keys_that_change_scored_what_the_page_says() -> None:
    header, _, *lines = lines_after("**On keys that change the same.**")
    assert header[0].startswith("overwrite")
    scores, before = scores_of(OVERWRITE), means_of(STUDY, "overwrite")
    assert [line[0] for line in lines] == ["gdn2", "mamba2"]
    for mixer, last, first, seeds in lines:
        mine = scores[f"{mixer}, ratio=1/8, placement=first"]
        assert last == f"{before[f'{mixer}, ratio=1/8']:.1f}"
        assert first == f"{mean(mine):.1f}"
        assert seeds == ", ".join(f"{score:.1f}" for score in mine)
    assert f"it gets {lines[0][2]} % right beside gdn2, last {lines[0][1]}" in FRONT
    assert f"the first gets {lines[0][2]} % right beside gdn2" in WORDS


def test_what_a_window_scored_is_what_the_page_says() -> None:
    header, _, *lines = lines_after("## Attention to the last 32 tokens")
    assert header[2:] == ["none, from above", "12.5 %", "25 %", "50 %", "100 %"]
    assert len(lines) == len(TASKS) * len(MIXERS)
    task = ""
    for said, mixer, none, *shares, alone in lines:
        task = said.split()[0].strip(",") if said else task
        digits = 3 if task == "text" else 1
        means, full = means_of(WINDOWED, task), means_of(STUDY, task)
        assert none == f"{full[f'{mixer}, ratio=0']:.{digits}f}"
        assert shares == [f"{means[f'{mixer}, {ratio}']:.{digits}f}" for ratio in list(SHARES.values())[1:]]
        assert alone == (f"{means['all attention']:.{digits}f}" if said else "")


def test_a_window_on_text_is_as_good() -> None:
    full, windowed = scores_of(STUDY, "text"), scores_of(WINDOWED, "text")
    apart = {stack: [w - f for w, f in zip(mine, full[stack], strict=True)] for stack, mine in windowed.items()}
    alone = [-x for x in apart.pop("all attention")]
    assert max(abs(x) for mine in apart.values() for x in mine) < 0.05
    assert f"{min(alone):.2f} to {max(alone):.2f} bits ahead of full attention in each of three seeds" in WORDS
    assert min(windowed.pop("all attention")) > max(x for mine in windowed.values() for x in mine)


def test_a_window_recalls_what_the_page_says() -> None:
    full, windowed = means_of(STUDY, "recall"), means_of(WINDOWED, "recall")
    few = {stack: windowed[stack] - full[stack] for stack in windowed if stack.endswith(("1/8", "1/4"))}
    below = [-apart for stack, apart in few.items() if stack.startswith("gated")]
    assert max(abs(apart) for stack, apart in few.items() if not stack.startswith("gated")) <= 1.55
    assert (round(min(below)), round(max(below))) == (8, 9)
    for mixer in MIXERS[:3]:
        assert windowed[f"{mixer}, ratio=1/2"] < min(windowed[f"{mixer}, ratio={r}"] for r in ("1/8", "1/4"))
    told = [row for row in rows("mixers", WINDOWED) if "carve[erase=token]" in (row["first"], row["second"])]
    told = [row for row in told if "carve" in (row["first"], row["second"])]
    assert {row["task"] for row in told} == set(TASKS)
    assert {row["told_apart"] for row in told} == {"False"}


def test_one_learning_rate_a_task_is_what_most_pilots_chose() -> None:
    fixed = {task: 0.01 if task == "text" else 0.003 for task in TASKS}
    tried = json.loads((STUDY / "tuned.json").read_text(encoding="utf-8"))
    tried = [row for row in tried if not row["stack"].endswith("ratio=0")]
    cost = {
        (row["task"], row["stack"]): 100 * (max(row["scores"].values()) - row["scores"][f"{fixed[row['task']]:g}"])
        for row in tried
        if row["lr"] != fixed[row["task"]]
    }
    needle = cost[("needle", "all attention")]
    assert f"which {len(tried) - len(cost)} of the {len(tried)} pilots" in WORDS
    assert len(cost) == 12  # as a word on the page
    assert not any(task == "text" for task, _ in cost)
    most = max(lost for stack, lost in cost.items() if stack != ("needle", "all attention"))
    assert f"it cost at most {most:.1f} points, but for attention alone on the needle ({needle:.1f})" in WORDS


def test_what_mixtures_keep_of_a_sequence_is_what_was_counted() -> None:
    kept = {}
    for study in (STUDY, WINDOWED):
        mixed = [row for row in rows("stacks", study) if row["stack"].endswith(("1/8", "1/4", "1/2"))]
        kept[study] = sorted(int(row["state_bytes"]) for row in mixed)
    small, large = kept[WINDOWED], kept[STUDY]
    found = re.search(r"keep (\d+) to (\d+) KB a sequence instead of ([\d.]+) to ([\d.]+) MB", WORDS)
    assert found
    assert found.groups() == (
        *(f"{size / 1000:.0f}" for size in (small[0], small[-1])),
        *(f"{size / 1e6:.1f}" for size in (large[0], large[-1])),
    )


def test_the_files_that_it_names_are_there() -> None:
    named = re.findall(r"\]\(((?:placed|windowed)/[^)]*)\)", PAGE)
    assert len(named) == 11
    assert all((STUDY / name).exists() for name in named)
