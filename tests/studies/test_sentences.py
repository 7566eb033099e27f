"""What a report says in words: the sentences follow from the numbers, and claim no more."""

from __future__ import annotations

import re
from dataclasses import replace

from made_up_study import made_up

from hybridzoo.studies import gather
from hybridzoo.studies.sentences import curve_rows, headline, training_notes


def said(plan, results, task="recall"):
    return " ".join(headline(gather(plan, results), task))


def test_a_cliff_is_found_where_it_is(make_results):
    words = said(*make_results())
    assert "the largest change is from 0 % to 25 % attention, which gains" in words
    assert "gdn2 is last" in words


def test_a_flat_curve_is_called_flat(make_results):
    flat = [(f"s{i}", "carve" if i < 4 else "attention", i / 4, 0.80, 2.4) for i in range(5)]
    words = said(*make_results(rows=flat, noise=0.03))
    assert "flat, as far as this can tell" in words
    assert "largest change" not in words
    assert "is best on average" in words  # said, but with what the seeds do not separate
    assert "From the best, these seeds separate none of the others." in words


def test_where_lower_is_better_the_sentences_turn_round(make_results):
    words = said(*make_results(), "text")
    assert "gdn2 is best on average" in words
    assert "attention is last" in words
    assert "which loses" in words


def test_the_best_ratio_comes_with_those_that_seeds_do_not_separate(make_results):
    words = said(*make_results())
    (ties,) = re.findall(r"is best on average; the seeds do not separate it from ([^.]*)\.", words)
    assert "0 %" not in ties.replace("50 %", "").replace("100 %", "")
    apart = [(f"s{i}", "carve" if i < 4 else "attention", i / 4, 0.2 + 0.15 * i, 2.4) for i in range(5)]
    words = said(*make_results(rows=apart))
    assert "that with 100 % attention is best on average: no seed of another reaches one of its own." in words
    words = said(*make_results(rows=apart, seeds=(0, 1, 2)))
    assert "is best on average: its difference from every other is significant (paired t, 5 % after Holm)." in words


def test_where_stacks_share_a_ratio_they_are_named_and_no_ratio_is_fitted():
    def score(task, family, ratio, place, budget):
        return 0.2 + 0.3 * ratio + (0.6 if place == "first" else 0.0)

    plan, results = made_up(score, families=("gdn2",), places=("first", "last"), noise=0.002)
    unsaid = tuple(replace(stack, placement="") for stack in plan.stacks)  # layers written out, no axis of placement
    found = gather(replace(plan, stacks=unsaid), results)
    told = " ".join(headline(found, "recall"))
    best, tied = found.comparable("recall"), curve_rows(found, "recall")
    assert re.search(r"that with 50 % attention \(gdn2[^)]*first[^)]*\) is best on average", told), told
    assert "No best ratio is fitted: several stacks have one ratio." in told
    assert "largest change" not in told
    assert tied[0][1] == "at a ratio that is not fitted (several stacks have one ratio)"
    assert tied[0][-1] == "–"
    assert len({cell.stack.attention for cell in best}) < len(best)


def test_stacks_near_guessing_are_named_by_their_means(make_results):
    rows_ = [("lost", "carve", 0.0, 0.04, 2.4), ("attention", "attention", 1.0, 0.9, 2.5)]
    plan, results = make_results(rows=rows_, noise=0.001)
    assert "Under 1.5 times guessing (3.1 %): lost." in said(plan, results)
    results[0]["metrics"]["accuracy"] = 0.05  # one seed above, and the mean still below
    assert "Under 1.5 times guessing (3.1 %): lost." in said(plan, results)
    results[4]["metrics"]["accuracy"] = 0.05
    assert "guessing" not in said(plan, results)


def test_where_nothing_was_learnt_nothing_is_crowned(make_results):
    lost = [("one", "carve", 0.0, 0.035, 2.4), ("other", "gdn2", 0.0, 0.02, 2.5)]
    plan, results = make_results(rows=lost, noise=0.001)
    words = said(plan, results)
    assert "no stack reaches 1.5 times guessing (3.1 %): too little was learnt to compare." in words
    assert "best" not in words
    (note,) = training_notes(gather(plan, results), "recall")
    assert "improv" not in note


def test_a_stack_near_guessing_is_not_said_to_improve(make_results):
    rows_ = [("lost", "carve", 0.0, 0.04, 2.4), ("attention", "attention", 1.0, 0.9, 2.5)]
    plan, results = make_results(rows=rows_, noise=0.001)
    for result in results:
        for place, point in enumerate(result["history"]["evaluations"][:-1]):
            point["metrics"]["accuracy"] = place / 100
    (note,) = training_notes(gather(plan, results), "recall")
    assert "attention (" in note
    assert "lost" not in note


def test_stacks_are_compared_on_the_seeds_that_all_of_them_have(make_results):
    rows_ = [("early", "carve", 0.0, 0.5, 2.4), ("steady", "gdn2", 0.0, 0.6, 2.5), ("none", "mamba2", 0.0, 0.4, 2.5)]
    plan, results = make_results(rows=rows_, noise=0.001, seeds=(0, 1, 2))
    for result in results:
        if result["seed"] == 2 and result["stack"] == "steady":
            result["metrics"]["accuracy"] = 0.1  # its mean over three seeds is below
    kept = [one for one in results if one["stack"] != "none" and (one["seed"], one["stack"]) != (2, "early")]
    words = said(plan, kept)
    assert (
        "On recall results are missing of early (2 of 3 seeds) and none (0 of 3 seeds); what follows is of seeds 0 "
        "and 1 alone, which every stack with results has." in words
    )
    assert "steady is best on average, 60." in words
    kept = [one for one in kept if (one["seed"], one["stack"]) != (1, "early")]
    assert "With one seed nothing says" in said(plan, kept)
    kept = [one for one in kept if (one["seed"], one["stack"]) != (0, "steady")]
    words = said(plan, kept)
    assert "no seed has a result of every stack, so stacks are not compared: early (1 of 3 seeds)" in words
    assert "best" not in words
    assert "With one seed" not in words
    assert {cell.seeds for cell in gather(plan, kept).of("recall")} == {(0,), (1, 2)}  # tables still show them


def test_without_points_on_the_way_nothing_is_said_to_be_trained_enough(make_results):
    plan, results = make_results()
    for result in results:
        del result["history"]["evaluations"][:-1]
    (note,) = training_notes(gather(plan, results), "recall")
    assert note.startswith("On recall there is no learning curve (train.eval_every gives one)")


def test_a_stack_that_still_learns_is_named(make_results):
    plan, results = make_results()
    for result in results:
        if result["stack"] == "gdn2" and result["task"] == "recall":
            points = result["history"]["evaluations"]
            for place, point in enumerate(points):
                point["metrics"]["accuracy"] = 0.35 * (place + 1) / len(points)
    (note,) = training_notes(gather(plan, results), "recall")
    assert re.match(r"On recall more than 2\.0 points were gained from steps? [\d, and]+ to [\d, and]+ by ", note)
    assert re.search(r"by all of them \(7\.0 points to [\d.]+ points\)", note)
    assert "what this budget gives" in note


def test_a_trained_study_is_not_called_undertrained(make_results):
    plan, results = make_results()
    for result in results:
        for point in result["history"]["evaluations"]:
            point["metrics"] = {**result["metrics"]}
    (note,) = training_notes(gather(plan, results), "recall")
    assert note.startswith("On recall no stack gained more than 2.0 points from step")
