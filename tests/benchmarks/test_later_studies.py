"""The page of the ratio study quotes what followed it: how many trainings, gates, and attention with a window."""

from __future__ import annotations

import json
import re
from statistics import fmean as mean

from pages import MIXERS, PAGE, SHARES, STUDY, TASKS, lines_after, means_of, rows, scores_of, text_of

WINDOWED = STUDY / "windowed"
PLACES = (STUDY / "placed", STUDY / "placed/overwrite", STUDY / "placed/half", STUDY / "first")
FRONT = text_of("README.md")
WORDS = " ".join(PAGE.split())


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


def test_the_pages_count_the_trials_that_ran() -> None:
    there, window, *places = (len(rows("trials", study)) for study in (STUDY, WINDOWED, *PLACES))
    assert f"[{there + window + sum(places)} trials]" in FRONT
    pilots = len(json.loads((STUDY / "tuned.json").read_text(encoding="utf-8")))
    assert f"{pilots} pilots and {there} trials on" in WORDS
    assert f"{window} trials, and with" in WORDS
    assert f"attention, {sum(places)}: {pilots + there + window + sum(places)} trainings in all." in WORDS
    assert f"four first: {sum(places)} trials." in WORDS


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
