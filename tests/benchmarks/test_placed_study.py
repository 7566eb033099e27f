"""The page on attention that stands first quotes its studies, and the pages above it quote that page's findings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean as mean

import pytest
from pages import MIXERS, PAGE, ROOT, STUDY, lines_after, means_of, rows, scores_at, scores_of, text_of

from hybridzoo.studies.comparisons import holm, paired_p
from hybridzoo.studies.stats import Summary, difference

PLACED, FIRST = STUDY / "placed", STUDY / "first"
OVERWRITE, HALF = PLACED / "overwrite", PLACED / "half"
PLACED_PAGE = (PLACED / "README.md").read_text(encoding="utf-8")
FRONT, MAIN, WORDS = text_of("README.md"), " ".join(PAGE.split()), " ".join(PLACED_PAGE.split())
EARLY = "{}, ratio=1/8, placement=first"
LAST, NONE, HALVES = "{}, ratio=1/8", "{}, ratio=0", "{}, ratio=1/2"
DELTA_RULES = MIXERS[:4]
RATES = {"overwrite": 0.003, "needle": 0.003, "text": 0.01}


def said(pattern: str, page: str) -> tuple[str, ...]:
    """What the groups of `pattern` are on a page, which has it once."""
    found = list(re.finditer(pattern, page))
    assert len(found) == 1, pattern
    return found[0].groups()


def listed(values: Sequence[float], digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def over(scores: Mapping[str, Sequence[float]], stack: str, mixers: Sequence[str] = MIXERS) -> list[float]:
    """Each seed's mean over the mixers."""
    return [mean(seeds) for seeds in zip(*(scores[stack.format(mixer)] for mixer in mixers), strict=True)]


def interval(apart: Summary, digits: int = 1) -> str:
    high = f"{apart.high:+.{digits}f}" if apart.low < 0 else f"{apart.high:.{digits}f}"
    return f"{apart.low:.{digits}f} to {high}"


def parameters(study: Path, task: str) -> dict[str, int]:
    return {row["stack"]: int(row["parameters"]) for row in rows("stacks", study) if row["task"] == task}


def early_less(task: str, other: str, early: str = EARLY) -> list[Summary]:
    """What first scored less what another stack of the ratio study did, a mixer each."""
    mine, theirs = scores_of(FIRST, task), scores_of(STUDY, task)
    return [difference(mine[early.format(mixer)], theirs[other.format(mixer)]) for mixer in MIXERS]


def test_where_the_layers_stand_scored_what_the_page_says() -> None:
    means = means_of(PLACED)
    _, _, *lines = lines_after("## Recall, an eighth", PLACED_PAGE)
    assert [line[0] for line in lines] == list(MIXERS)
    for mixer, *cells in lines:
        stacks = [f"{mixer}, ratio={r}, placement={p}" for r in ("1/8", "1/4") for p in ("even", "first")]
        assert cells == [f"{means[stack]:.1f}" for stack in stacks]
    first = [score for stack, mine in scores_of(PLACED).items() if "first" in stack for score in mine]
    assert f"recall {min(first):.1f} to {max(first):.1f} % in every seed" in MAIN
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
    *told, most = said(
        r"by ([\d.]+) points beside carve \(p ([\d.]+)\), ([\d.]+) beside its twin \(([\d.]+)\), ([\d.]+) beside gdn2 "
        r"\(([\d.]+)\), ([\d.]+) beside gated_delta_net \(([\d.]+)\) and (\d+) beside mamba2 \(below 0\.001\)",
        WORDS,
    )
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


def test_the_pages_count_the_trials_that_ran() -> None:
    places, half, first = (len(rows("trials", study)) for study in (PLACED, HALF, FIRST))
    assert f"They are {places + half + first + len(rows('trials', OVERWRITE))} trials" in WORDS
    assert [f"hree seeds, {count} trials" in WORDS for count in (places, half, first)] == [True] * 3
    sizes, there = parameters(PLACED, "recall"), parameters(STUDY, "recall")
    fewer = {f"{100 * (1 - size / there[stack.partition(', placement')[0]]):.0f}" for stack, size in sizes.items()}
    assert len(fewer) == 1
    assert f"those of the ratio study with {min(fewer)} % fewer parameters" in WORDS
    assert f"On recall both have {min(fewer)} % fewer parameters" in MAIN


def test_the_first_and_the_last_layer_differ_in_nothing_else() -> None:
    tuned = json.loads((STUDY / "tuned.json").read_text(encoding="utf-8"))
    chosen = {(row["task"], row["stack"]): row["lr"] for row in tuned}
    words = ("layers", "parameters", "ffn_width", "state_bytes", "kv_bytes")
    there, here = (
        {(row["task"], row["stack"]): [row[word] for word in words] for row in rows("stacks", study)}
        for study in (STUDY, FIRST)
    )
    assert len(here) == 15
    for task, rate in RATES.items():
        for mixer in MIXERS:
            (first, *same), (last, *others) = here[task, EARLY.format(mixer)], there[task, LAST.format(mixer)]
            assert same == others
            assert (first.split()[0], last.split()[-1]) == ("a", "a")
            compared = [NONE, LAST] + [HALVES] * (task == "text" or (task == "overwrite" and mixer in MIXERS[:3]))
            assert {chosen[task, stack.format(mixer)] for stack in compared} == {rate}
    assert f"{RATES['text']} on text and {RATES['needle']} on the other two" in WORDS
    given = (FIRST / "study.yaml").read_text(encoding="utf-8")
    assert re.findall(r"lr: (\S+)\}", given) == ["3e-3", "3e-3", "1e-2"]  # needle, overwrite, text


def test_the_first_layer_scored_what_the_page_says() -> None:
    _, _, *lines = lines_after("## Overwrite, needle and text", PLACED_PAGE)
    assert len(lines) == len(RATES) * len(MIXERS)
    for place, task in enumerate(RATES):
        digits = 3 if task == "text" else 1
        mine, theirs, apart = scores_of(FIRST, task), means_of(STUDY, task), early_less(task, LAST)
        p = holm([paired_p(one) for one in apart])
        assert lines[5 * place][0].startswith(task)
        for (_, mixer, *cells), one, value in zip(lines[5 * place : 5 * place + 5], apart, p, strict=True):
            early = mine[EARLY.format(mixer)]
            means = [theirs[NONE.format(mixer)], theirs[LAST.format(mixer)], mean(early)]
            assert cells == [
                *(f"{value:.{digits}f}" for value in means),
                listed(early, digits),
                f"{one.mean:+.{digits}f}",
                f"{value:.3f}",
            ], (task, mixer)


def test_what_an_early_layer_does_on_average_is_what_the_main_page_says() -> None:
    recall = scores_of(PLACED)
    pairs = {"recall": ([], over(recall, "{}, ratio=1/8, placement=even"), over(recall, EARLY))}
    for task in ("overwrite", "needle", "far", "text"):
        mine, theirs = (
            scores_at(study, "needle", 12288) if task == "far" else scores_of(study, task) for study in (FIRST, STUDY)
        )
        pairs[task] = (over(theirs, NONE), over(theirs, LAST), over(mine, EARLY))
    apart = [difference(first, last) for _, last, first in pairs.values()]
    p = holm([paired_p(one) for one in apart])
    header, _, *lines = lines_after("## Where the layers stand")
    assert header[1:4] == ["none", "the last", "the first"]
    assert [line[0].partition(",")[0] for line in lines] == [
        "recall of 64 pairs",
        "overwrite",
        "needle",
        "needle",
        "text",
    ]
    for (_, *cells), (task, means), one, value in zip(lines, pairs.items(), apart, p, strict=True):
        digits = 3 if task == "text" else 1
        assert cells == [
            *(f"{mean(seeds):.{digits}f}" if seeds else "" for seeds in means),
            f"{one.mean:+.{digits}f} ({interval(one, digits)})",
            f"{value:.3f}",
        ]


def test_what_overwriting_gains_is_what_was_scored() -> None:
    gains = early_less("overwrite", LAST)
    seeds = [gain for one in gains for gain in one.values]
    whole = difference(over(scores_of(FIRST, "overwrite"), EARLY), over(scores_of(STUDY, "overwrite"), LAST))
    pattern = (
        r"beside every mixer, by (\S+) to (\S+) points, and averaged over the mixers by (\S+) \(95 % interval (.*?)\)"
    )
    assert said(pattern, WORDS) == (f"{min(seeds):.1f}", f"{max(seeds):.1f}", f"{whole.mean:.1f}", interval(whole))
    p = holm([paired_p(one) for one in gains])
    told = [mixer for mixer, value in zip(MIXERS, p, strict=True) if value < 0.05]
    assert told == ["carve", "carve[erase=token]", "mamba2"]
    means, theirs = means_of(FIRST, "overwrite"), means_of(STUDY, "overwrite")
    early, halves = (
        [stacks[form.format(mixer)] for mixer in MIXERS] for stacks, form in ((means, EARLY), (theirs, HALVES))
    )
    best = f"{min(early[:3]):.1f} to {max(early[:3]):.1f} % right"
    assert MAIN.count(best) == 2
    evenly = f"{min(halves[:3]):.1f} to {max(halves[:3]):.1f}"
    assert (
        f"half of the layers, placed evenly, get {evenly}; beside the other two {early[3]:.1f} and {early[4]:.1f}."
        in MAIN
    )
    assert f"Half of the layers, placed evenly, get {evenly} % right" in WORDS
    assert f"it gets {early[2]:.1f} % right beside gdn2, last {theirs['gdn2, ratio=1/8']:.1f}" in FRONT


def test_what_text_pays_is_what_was_scored() -> None:
    behind = [loss for one in early_less("text", LAST) for loss in one.values]
    pairs = f"in {sum(loss > 0 for loss in behind)} of {len(behind)} pairs"
    assert f"First is behind {pairs}" in WORDS
    assert f"behind the last layer {pairs}" in MAIN
    assert min(holm([paired_p(one) for one in early_less("text", LAST)])) > 0.05
    early, full = over(scores_of(FIRST, "text"), EARLY), scores_of(STUDY, "text")
    last, none, half = (difference(early, over(full, stack)) for stack in (LAST, NONE, HALVES))
    window = difference(early, over(scores_of(STUDY / "windowed", "text"), LAST))
    assert said(
        r"it is (\S+) bits behind the last layer \((.*?)\), though mixer by mixer it is not told; (\S+) behind no "
        r"attention \((.*?)\), and (\S+) behind half of the layers, placed evenly \((.*?)\)",
        WORDS,
    ) == tuple(word for one in (last, none, half) for word in (f"{one.mean:.3f}", interval(one, 3)))
    assert f"are ahead of it too, by {window.mean:.3f} ({interval(window, 3)})" in WORDS
    assert f"no attention at all by {none.mean:.3f} bits ({interval(none, 3)})" in MAIN
    assert f"{half.mean:.3f} behind ({interval(half, 3)})" in MAIN
    assert f"costs {last.mean:.3f} bits a byte (95 % interval {interval(last, 3)})" in FRONT
    assert none.low > 0  # "behind no attention at all"


def test_where_and_when_text_is_behind_is_what_was_scored() -> None:
    near, far = (scores_at(study, "text", 4) for study in (FIRST, STUDY))
    assert f"stand before the one to be told, by {mean(over(near, EARLY)) - mean(over(far, LAST)):.3f};" in WORDS
    on_the_way = []
    for step in ("100", "200"):
        first, last = (
            mean(
                float(row["score"])
                for row in rows("learning", study)
                if (row["task"], row["step"]) == ("text", step) and row["stack"] in {s.format(m) for m in MIXERS}
            )
            for study, s in ((FIRST, EARLY), (STUDY, LAST))
        )
        on_the_way.append(f"{first - last:.3f}")
    assert said(r"after 100 of 300 steps it was by (\S+), after 200 by (\S+)\.", WORDS) == tuple(on_the_way)


def test_needles_past_the_trained_length_are_what_was_scored() -> None:
    theirs, mine, farthest = (
        scores_at(STUDY, "needle", 12288),
        scores_at(FIRST, "needle", 12288),
        scores_at(FIRST, "needle", 65536),
    )
    _, _, *lines = lines_after("### Needles past the trained length", PLACED_PAGE)
    assert [line[0] for line in lines] == list(MIXERS)
    for mixer, *cells in lines:
        early, far = mine[EARLY.format(mixer)], farthest[EARLY.format(mixer)]
        assert cells == [
            f"{mean(theirs[NONE.format(mixer)]):.1f}",
            f"{mean(theirs[LAST.format(mixer)]):.1f}",
            f"{mean(early):.1f}",
            listed(early),
            f"{mean(far):.1f}",
            listed(far),
        ]
    last, first = ([mean(s[form.format(m)]) for m in DELTA_RULES] for s, form in ((theirs, LAST), (mine, EARLY)))
    found = f"{min(first):.0f} to {max(first):.0f} %"
    assert f"find {min(last):.0f} to {max(last):.0f} % with the last layer and {found} with the first" in WORDS
    assert f"finds {found} beside these delta rules" in MAIN
    assert all(here < there for here, there in zip(first, last, strict=True))
    whole = difference(over(mine, EARLY, DELTA_RULES), over(theirs, LAST, DELTA_RULES))
    assert max(whole.values) < 0  # "in every seed"
    assert "finds on average fewer needles than the last layer" in FRONT
    assert said(r"that is (\S+) points less, .*? not told \((.*?), p (\S+)\)", WORDS) == (
        f"{-whole.mean:.1f}",
        interval(whole),
        f"{paired_p(whole):.3f}",
    )
    apart = [difference(mine[EARLY.format(mixer)], theirs[LAST.format(mixer)]) for mixer in MIXERS]
    p = holm([paired_p(one) for one in apart])
    told = [place for place, value in enumerate(p) if value < 0.05]
    assert [MIXERS[place] for place in told] == ["gated_delta_net"]
    assert f"gated_delta_net's {-apart[3].mean:.1f} points alone are (p {p[3]:.3f} after Holm)" in WORDS


def test_next_to_nothing_is_found_in_65536_tokens() -> None:
    farthest = scores_at(FIRST, "needle", 65536)
    means, seeds = [mean(mine) for mine in farthest.values()], [score for mine in farthest.values() for score in mine]
    found = f"{min(means):.1f} to {max(means):.1f} %"
    guessed = f"{100 / 16**2:.1f}"  # two tokens of 16
    assert (
        f"is found: {found}, in single seeds {min(seeds):.0f} to {max(seeds):.1f}, where guessing finds {guessed}"
        in WORDS
    )
    assert f"In 65,536 it finds {found}, where guessing finds {guessed}" in MAIN
    assert f"{65536 / 192:.0f} times the trained length" in WORDS
    assert "65536" not in {row["level"] for row in rows("levels")}


def test_needles_in_the_trained_length_are_found_beside_one_mixer_more() -> None:
    apart = early_less("needle", LAST)
    p = holm([paired_p(one) for one in apart])
    first, last = means_of(FIRST, "needle")[EARLY.format("mamba2")], means_of(STUDY, "needle")[LAST.format("mamba2")]
    assert f"beside mamba2: {first:.1f} % where the last layer finds {last:.1f} (p {p[4]:.3f})" in WORDS
    assert f"beside mamba2 alone, {first:.1f} % for {last:.1f}" in MAIN
    assert min(p[:4]) > 0.2


def test_one_layer_on_two_cpu_cores_scored_what_the_page_says() -> None:
    scores, gpus = scores_of(OVERWRITE), scores_of(FIRST, "overwrite")
    _, _, *lines = lines_after("### Overwrite, on two CPU cores", PLACED_PAGE)
    assert [line[0] for line in lines] == ["gdn2", "mamba2"]
    for mixer, *cells in lines:
        mine = scores[EARLY.format(mixer)]
        assert cells == [f"{mean(mine):.1f}", listed(mine), f"{mean(gpus[EARLY.format(mixer)]):.1f}"]
    cores, gpu = (parameters(study, "overwrite") for study in (OVERWRITE, FIRST))
    assert {f"{100 * (1 - size / gpu[stack]):.1f}" for stack, size in cores.items()} == {"6.5"}
    assert "with 6.5 % fewer parameters" in WORDS
    early = EARLY.format("mamba2")
    assert max(min(scores[early]), min(gpus[early])) < min(max(scores[early]), max(gpus[early]))  # "overlap"


def test_half_of_the_layers_scored_what_the_page_says() -> None:
    mine, theirs = scores_of(HALF), scores_of(STUDY, "recall")
    _, _, *lines = lines_after("## Recall, half of the layers", PLACED_PAGE)
    assert [line[0] for line in lines] == list(MIXERS)
    for mixer, *cells in lines:
        even, four = theirs[HALVES.format(mixer)], mine[f"{mixer}, ratio=1/2, placement=first"]
        assert cells == [f"{mean(even):.1f}", listed(even), f"{mean(four):.1f}", listed(four)]
    seeds = [score for four in mine.values() for score in four]
    assert f"The first four recall {min(seeds):.1f} to {max(seeds):.1f} % in every seed" in WORDS
    behind = {mixer for mixer in MIXERS if min(theirs[HALVES.format(mixer)]) < min(seeds)}
    assert behind == {"gdn2", "mamba2"}
    tuned = json.loads((STUDY / "tuned.json").read_text(encoding="utf-8"))
    pilots = [row for row in tuned if row["task"] == "recall" and row["stack"].endswith("ratio=1/2")]
    assert {row["lr"] for row in pilots} == {0.01}
    assert "the pilots had chosen 0.01. At 0.003 the pilots' one seed" in WORDS
    lower = [100 * row["scores"]["0.003"] for row in pilots]
    assert f"one seed recalled {min(lower):.1f} to {max(lower):.1f} % placed evenly" in WORDS
    sizes, there = parameters(HALF, "recall"), parameters(STUDY, "recall")
    assert {f"{100 * (1 - size / there[stack.partition(', placement')[0]]):.0f}" for stack, size in sizes.items()} == {
        "1"
    }
    assert "with 1 % fewer parameters than the ratio study" in WORDS


def test_what_was_gained_to_the_end_is_what_was_scored() -> None:
    gained = {(row["task"], row["family"]): float(row["gained_at_the_end"]) for row in rows("stacks", FIRST)}
    slow = [100 * gained[task, mixer] for task in ("needle", "overwrite") for mixer in ("mamba2", "gated_delta_net")]
    text = [gained["text", mixer] for mixer in MIXERS]
    for page in (MAIN, WORDS):
        points, bits = said(r"gained (\d+ to \d+) points .*?, and all five (\S+ to \S+) bits", page)
        assert points == f"{min(slow):.0f} to {max(slow):.0f}"
        assert bits == f"{min(text):.2f} to {max(text):.2f}"


def test_the_content_gate_of_these_stacks_is_what_was_measured() -> None:
    bounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows("gates", FIRST):
        if row["gate"] == "content":
            bounds.setdefault((row["task"], row["layer"]), []).append((float(row["q05"]), float(row["q95"])))
    widest = max(abs(mean(ends)) for seeds in bounds.values() for ends in zip(*seeds, strict=True))
    assert f"in all {len(bounds)} recurrent layers those bounds lie within 0.12 of zero" in MAIN
    assert widest < 0.12
    twins = [row for row in rows("mixers", FIRST) if {row["first"], row["second"]} == {"carve", "carve[erase=token]"}]
    assert {row["task"]: row["told_apart"] for row in twins} == dict.fromkeys(RATES, "False")


def test_the_front_page_says_where_one_layer_recalls() -> None:
    means = means_of(PLACED)
    firsts = [means[EARLY.format(mixer)] for mixer in MIXERS]
    last = means["mamba2, ratio=1/8, placement=even"]
    recalled = f"{min(firsts):.1f} to {max(firsts):.1f} %"
    assert f"{recalled} beside all five mixers" in FRONT
    assert f"It recalls {recalled} beside every mixer" in MAIN
    for page in (FRONT, MAIN):
        assert re.search(rf"is at {last:.1f} % with the same layer (placed )?last", page)


@pytest.mark.parametrize("folder", [PLACED, STUDY], ids=["placed", "hybrids"])
def test_the_files_that_a_page_names_are_there(folder: Path) -> None:
    page = (folder / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page)
    assert len(named) > 10
    assert all((folder / name).exists() for name in named)


def test_what_is_kept_of_a_study_is_its_report_and_its_tables() -> None:
    for study in (FIRST, HALF):
        kept = {path.relative_to(study).as_posix() for path in study.rglob("*") if path.is_file()}
        tables = {
            f"tables/{name}.csv"
            for name in ("comparisons", "gates", "learning", "levels", "mixers", "stacks", "trials")
        }
        assert kept - {"levels-needle.png"} == {"report.html", "study.yaml", *tables}
        assert len({row["seed"] for row in rows("trials", study)}) == 3
        assert str(ROOT) not in (study / "report.html").read_text(encoding="utf-8")
