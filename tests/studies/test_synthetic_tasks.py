"""Every synthetic task can be solved exactly by reading it, and not by guessing; a new one is held to the same."""

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import Guesser, PerfectSolver, Solver, first_value
from torch import nn

from hybridzoo.architectures import build_model
from hybridzoo.architectures.loader import spec_from
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies import Execution, make_plan, run_study, study_from
from hybridzoo.studies.tasks import AnswerTask, Shown, answers, build_task, list_tasks
from hybridzoo.studies.tasks.answers import answered
from hybridzoo.studies.tasks.base import _TASKS
from hybridzoo.studies.tasks.mad_recall import distinct
from hybridzoo.studies.tasks.niah import NEEDLE
from hybridzoo.studies.tasks.state_tracking import products, table
from hybridzoo.training import IGNORED

CPU = torch.device("cpu")
SYNTHETIC = [name for name in list_tasks() if issubclass(_TASKS[name], AnswerTask)]

# Beside each task as it is by default: other words, and levels where there are any.
OTHERS = {
    "compression": [{"length": 9, "tokens": 3, "levels": [1, 5]}],
    "copy": [{"length": 6, "shortest": 2, "tokens": 3, "levels": [1, 9, 20]}],
    "fuzzy_recall": [
        {"pairs": 5, "keys": 2, "key_tokens": 4, "values": 3, "value_tokens": 3, "levels": [1, 16]},
        {"pairs": 4, "key_tokens": 1, "value_tokens": 1},
    ],
    "memorisation": [{"keys": 5, "values": 3, "length": 7}],
    "mqar": [
        {"pairs": 5, "length": 40, "filler": "random"},
        {"pairs": 16, "keys": 16, "levels": [2, 8]},
    ],
    "niah": [
        {"variant": "single_2", "length": 40, "levels": [8, 300]},
        {"variant": "single_3", "length": 60},
        {"variant": "multikey_1", "length": 80, "levels": [20, 200]},
        {"haystack": "text", "distractors": 7, "keys": 8, "value_tokens": 1, "words": 1, "length": 27},
    ],
    "noisy_recall": [
        {"pairs": 6, "keys": 6, "noise_share": 0.9, "levels": [1, 4]},
        {"noise_share": 0.0},
    ],
    "overwrite": [
        {"pairs": 6, "keys": 9, "overwrites": 5, "values": 2, "levels": [2, 9]},
        {"pairs": 4, "overwrites": 1, "distance": 11},
    ],
    "selective_copy": [{"length": 5, "items": 5, "levels": [40]}],
    "state_tracking": [
        {"group": "S3", "length": 9, "levels": [1, 30]},
        {"group": "S5", "length": 12},
        {"group": "S5", "length": 12, "elements": "swaps"},
    ],
}
CASES = [{"type": name, "examples": 40, **words} for name in SYNTHETIC for words in [{}, *OTHERS.get(name, [])]]
NAMES = [" ".join(str(word) for key, word in case.items() if key != "examples") for case in CASES]
every_case = pytest.mark.parametrize("entry", CASES, ids=NAMES)


def drawn(entry, seed=0, count=4):
    task = build_task(entry)
    return task, task.sample(task.config.own, count, torch.Generator().manual_seed(seed))


@every_case
def test_a_perfect_solver_scores_one_in_everything_at_every_level(entry):
    task = build_task(entry)
    scores = task.evaluate(PerfectSolver(task), CPU)
    assert set(scores.values()) == {1.0}
    shown = task.shown
    assert shown.metric in scores
    assert {metric for _, metric in shown.levels} <= set(scores)
    assert [level for level, _ in shown.levels] == (sorted({*entry["levels"], task.config.own}) if shown.levels else [])


@every_case
def test_guessing_scores_chance(entry):
    task = build_task({**entry, "examples": 200})
    score = task.evaluate(Guesser(task), CPU)["accuracy"]
    asked = 0
    for batch in task.held_out(task.config.own, 200):
        asked += task.tally(batch, torch.zeros_like(batch.ids, dtype=torch.bool))["accuracy"][1]
    chance = task.shown.chance
    assert abs(score - chance) < 5 * math.sqrt(chance * (1 - chance) / asked) + 1e-12


@every_case
def test_sequences_have_the_form_that_training_and_scoring_rely_on(entry):
    task = build_task(entry)
    for level in task.config.scored:
        ids, labels = task.sample(level, 3, torch.Generator().manual_seed(1))
        assert ids.shape == labels.shape == (3, task.length_of(level))
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.min() >= 0
        assert ids.max() < task.vocab_size
        assert set(labels[labels != IGNORED].tolist()) <= set(task.answers)
        assert (labels[:, 0] == IGNORED).all()  # nothing stands before it
        assert (labels != IGNORED).any(1).all()
    assert task.longest == max(task.length_of(level) for level in task.config.scored)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_vocabulary_ends_with_a_token_that_is_used(name):
    task, batch = drawn({"type": name}, count=500)
    assert max(int(batch.ids.max()), int(batch.labels.max())) == task.vocab_size - 1


@every_case
def test_data_are_decided_by_the_seed(entry):
    task = build_task(entry)
    draws = [task.batch(9, 4, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0].ids, draws[1].ids)
    assert torch.equal(draws[0].labels, draws[1].labels)
    assert not torch.equal(draws[0].labels, draws[2].labels)
    reader = PerfectSolver(task)
    for _ in range(2):
        task.evaluate(reader, CPU, quick=True)
    first, second = torch.cat(reader.seen).chunk(2)
    assert torch.equal(first, second)
    other = build_task({**entry, "data_seed": 5})
    assert not torch.equal(next(other.held_out(other.config.own, 40)).ids, next(task.held_out(task.config.own, 40)).ids)


@every_case
def test_a_task_says_in_json_how_it_is_shown_and_what_its_data_are(entry):
    task = build_task(entry)
    assert Shown.from_dict(json.loads(json.dumps(task.shown.to_dict()))) == task.shown
    assert json.loads(json.dumps(task.fingerprint()))["type"] == entry["type"]
    assert str(task.config.own) in task.shown.label + task.shown.about


@pytest.mark.parametrize("name", [name for name in SYNTHETIC if name != "memorisation"])
def test_a_curriculum_has_as_many_tokens_a_step_as_the_task(name):
    task = build_task({"type": name})
    own, knob = task.config.own, task.config.knob
    task = build_task({"type": name, "curriculum": [{knob: own // 2, "steps": 3}, {knob: own, "steps": 2}]})
    assert [task.level_at(step) for step in range(7)] == [own // 2] * 3 + [own] * 4
    assert task.shown.stages == (3, 5)
    early, late = (task.batch(step, 16, torch.Generator().manual_seed(0)).ids for step in (2, 3))
    assert len(late) == 16
    assert early.numel() == pytest.approx(late.numel(), abs=early.shape[1])


SMALL = {
    "d_model": 8,
    "mixers": {"a": {"type": "attention", "n_heads": 1}, "d": {"type": "delta_net", "n_heads": 1, "head_dim": 8}},
    "layers": "d a",
    "ffn": {"type": "gelu", "width": 8},
}


class LogitsEverywhere(nn.Module):
    """The same model, as one that is not known to be a `HybridLM`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def test_logits_are_made_for_questions_only_and_in_few_rows_and_change_no_answer(monkeypatch):
    task, batch = drawn({"type": "noisy_recall"}, count=7)
    torch.manual_seed(0)
    model = build_model(spec_from(SMALL, [f"vocab_size={task.vocab_size}"])).eval()
    made = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: made.append(hidden.shape) or logits(hidden))
    with torch.no_grad():
        whole = answered(LogitsEverywhere(model), batch, CPU)
        made.clear()
        monkeypatch.setattr(answers, "TOKENS_AT_ONCE", 2 * batch.ids.shape[1])
        parts = answered(model, batch, CPU)
    assert torch.equal(whole, parts)
    assert [shape[0] for shape in made] == [2 * task.config.pairs] * 3 + [task.config.pairs]


@pytest.mark.parametrize("variant", ["single_1", "single_2", "single_3", "multikey_1"])
def test_needles_in_65536_tokens_are_drawn_at_once_and_found(variant):
    task = build_task({"type": "niah", "variant": variant})
    started = time.process_time()
    batch = task.sample(65536, 4, torch.Generator().manual_seed(0))
    assert time.process_time() - started < 1.0
    assert batch.ids.shape == (4, 65536)
    right = answered(PerfectSolver(task), batch, CPU)
    assert task.tally(batch, right)["accuracy"] == (4, 4)


@pytest.mark.parametrize("name", list_tasks())
def test_a_small_model_trains_on_a_task_in_a_study(name, tmp_path):
    train = {"steps": 3, "batch_size": 2, "eval_every": 2, "log_every": 1, "lr": 1e-2}
    words = {}
    if name == "tokens":  # the one task that has no text of its own
        words = {f"{part}_file": str(tmp_path / f"{part}.bin") for part in ("train", "validation")}
        for path in words.values():
            (torch.arange(600) % 50).to(torch.int32).numpy().tofile(path)
        words |= {"vocab_size": 50, "dtype": "int32"}
    study = {"name": "each", "spec": SMALL}
    study["tasks"] = {"it": {"type": name, "examples": 4, "quick_examples": 2, **words}}
    study["tasks"]["it"]["train"] = train
    done = run_study(study_from(study), tmp_path / "run", Execution(processes=0))
    assert (done.finished, done.failed) == (1, ())


def test_levels_longer_than_a_stack_takes_are_refused_before_training():
    study = {"name": "long", "spec": {**SMALL, "max_context": 100}}
    study["tasks"] = {"copies": {"type": "copy", "length": 20, "levels": [49]}}
    make_plan(study_from(study))
    study["tasks"]["copies"]["levels"] = [49, 50]
    said = r"tasks\.copies: at its hardest level its sequences of 101 are over max_context 100 of stacks"
    with pytest.raises(SpecError, match=said):
        make_plan(study_from(study))


def test_with_the_first_values_kept_only_intact_keys_are_right():
    task = build_task({"type": "overwrite", "levels": [4], "distance": 3})
    scores = task.evaluate(Solver(task, first_value), CPU)
    assert (scores["overwritten"], scores["overwritten@4"]) == (0, 0)
    assert (scores["intact"], scores["intact@4"]) == (1, 1)
    assert scores["accuracy"] == 1 - 8 / 16


@given(pairs=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_an_overwrite_comes_after_its_write_and_changes_the_value(pairs, share, seed):
    overwrites = 1 + int(share * (pairs - 2))
    entry = {"type": "overwrite", "pairs": pairs, "overwrites": overwrites, "keys": 12, "values": 3}
    task, (ids, _) = drawn(entry, seed)
    assert task.overwrites_of(pairs) == overwrites
    for row in ids.tolist():
        held: dict[int, int] = {}
        changed = set()
        place = 0
        while len(held) < pairs or len(changed) < overwrites:
            flagged = row[place] == 1
            key, value = row[place + flagged : place + flagged + 2]
            assert (key in held) == flagged
            assert held.get(key) != value
            assert key not in changed
            held[key] = value
            changed |= {key} if flagged else set()
            place += 2 + flagged
        assert sorted(row[place:-1]) == sorted(held)


def test_needles_stand_anywhere_in_a_haystack_of_their_variant():
    for variant in ("single_1", "multikey_1"):
        task, (ids, _) = drawn({"type": "niah", "variant": variant, "length": 108}, count=400)
        places = torch.nonzero(ids == NEEDLE)[:, 1].double()
        needles = task.config.made.distractors + 1
        assert len(places) == 400 * needles
        assert places.mean() == pytest.approx(50, abs=5)
        assert places.min() <= 2
        assert places.max() >= 98
    first = 2 + 64 + 16
    words = (ids[ids >= first] - first).bincount()
    assert words[0] > words[3] > words[30] > 0  # by Zipf's law
    _, (ids, _) = drawn({"type": "niah", "words": 5, "length": 64}, count=1)
    phrase = ids[0][(ids[0] >= first)] - first
    before = int(torch.nonzero(ids[0] == NEEDLE))
    assert phrase[:before].tolist() == [i % 5 for i in range(before)]


def test_strings_to_copy_have_every_length_in_training_and_one_in_scoring():
    task = build_task({"type": "copy", "length": 5, "shortest": 2})
    _, labels = task.batch(0, 200, torch.Generator().manual_seed(0))
    assert set((labels != IGNORED).sum(1).tolist()) == {2, 3, 4, 5}
    for batch in task.held_out(5, 40):
        assert set((batch.labels != IGNORED).sum(1).tolist()) == {5}


@given(word=st.lists(st.integers(0, 119), min_size=1, max_size=40))
def test_prefix_products_equal_the_plain_loop(word):
    times = table("S5")
    reached, expected = 0, []
    for one in word:
        reached = int(times[reached, one])
        expected.append(reached)
    assert products(torch.tensor([word]), times)[0].tolist() == expected


@pytest.mark.parametrize("group", ["parity", "S3", "S5"])
def test_a_table_is_a_groups(group):
    times = table(group)
    size = len(times)
    assert times[0].tolist() == times[:, 0].tolist() == list(range(size))
    assert (times.sort(1).values == torch.arange(size)).all()  # every element has an inverse
    a, b, c = torch.randint(size, (3, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(times[times[a, b], c], times[a, times[b, c]])
    assert torch.equal(times, times.T) == (group == "parity")


def test_words_of_swaps_hold_nothing_else():
    _, (ids, _) = drawn({"type": "state_tracking", "group": "S5", "elements": "swaps"}, count=64)
    used = ids[:, :-1].unique() - 1
    assert len(used) == 11  # the identity and ten swaps
    assert (table("S5")[used, used] == 0).all()  # each undoes itself


@given(n=st.integers(1, 12), more=st.integers(0, 5000), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_distinct_numbers_are_distinct_and_in_range(n, more, seed):
    rows = distinct(50, n + more, n, torch.Generator().manual_seed(seed))
    assert rows.shape == (50, n)
    assert all(len(set(row)) == n and max(row) < n + more for row in rows.tolist())


def test_noise_has_its_share_and_a_vocabulary_of_its_own():
    for share in (0.2, 0.8):
        _, (ids, labels) = drawn({"type": "noisy_recall", "noise_share": share}, count=8)
        assert (ids >= 96).double().mean().item() == pytest.approx(share, abs=0.02)
        assert not set(labels[labels != IGNORED].tolist()) & set(range(96, 112))


@pytest.mark.parametrize("name", list_tasks())
def test_the_page_of_tasks_has_a_row_for_it_with_all_of_its_words(name):
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
    row = re.search(rf"^\| `{name}` \|([^|]*)\|([^|]*)\|([^|]*)\|", page, re.MULTILINE)
    shared = {"levels", "curriculum", "examples", "quick_examples", "data_seed"}
    words = {field.name for field in dataclasses.fields(_TASKS[name].Config)} - shared
    assert row
    assert set(re.findall(r"`(\w+)`", row[3])) == words


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "overwrite", "overwrites": 16}, r"t\.overwrites: of 16 pairs at most 15 can be overwritten"),
        ({"type": "overwrite", "levels": [1]}, r"t\.levels: must be at least 2, got 1"),
        ({"type": "overwrite", "values": 1}, r"t\.values: must be at least 2, got 1"),
        ({"type": "overwrite", "pairs": 65}, r"t\.pairs: 65 pairs need as many distinct keys, and keys is 64"),
        ({"type": "overwrite", "distance": -1}, r"t\.distance: must be at least 0"),
        ({"type": "fuzzy_recall", "pairs": 9, "key_tokens": 1}, r"t\.pairs: 9 pairs .* keys \*\* key_tokens is 8"),
        ({"type": "fuzzy_recall", "key_tokens": 21}, r"t\.key_tokens: keys \*\* key_tokens must be below 2 \*\* 63"),
        ({"type": "fuzzy_recall", "value_tokens": 0}, r"t\.value_tokens: must be at least 1"),
        ({"type": "noisy_recall", "noise_share": 1.0}, r"t\.noise_share: must be a share from 0 to below 1, got 1\.0"),
        (
            {"type": "niah", "length": 7},
            r"t\.length: 1 needles and the question.* of 2 tokens, take 8 positions, got 7",
        ),
        ({"type": "niah", "variant": "single_3", "levels": [16]}, r"t\.levels: .* 8 tokens, take 20 positions, got 16"),
        ({"type": "niah", "distractors": 64}, r"t\.keys: the asked key and 64 distractors need as many distinct keys"),
        ({"type": "niah", "variant": "single_4"}, r"t\.variant: 'single_4' is not one of single_1.*did you mean"),
        ({"type": "copy", "shortest": 40}, r"t\.shortest: must be at most length = 32, got 40"),
        ({"type": "copy", "levels": [0]}, r"t\.levels: must be at least 1, got 0"),
        (
            {"type": "copy", "curriculum": [{"length": 64, "steps": 1}]},
            r"t\.curriculum: a stage of length 64 is harder",
        ),
        ({"type": "copy", "curriculum": [{"length": 4, "steps": 0}]}, r"t\.curriculum\[0\]\.steps: must be at least 1"),
        ({"type": "state_tracking", "group": "S4"}, r"t\.group: 'S4' is not one of parity, S3, S5"),
        ({"type": "selective_copy", "length": 8}, r"t\.length: the items take 16 positions, got 8"),
        ({"type": "selective_copy", "curriculum": [{"length": 8, "steps": 1}]}, r"t\.curriculum: the items take 16"),
        ({"type": "compression", "levels": [33]}, r"t\.levels: at most length = 32, since training never asks"),
        ({"type": "memorisation", "levels": [4]}, r"t: unknown key 'levels'"),
        ({"type": "memorisation", "keys": 0}, r"t\.keys: must be at least 1, got 0"),
    ],
)
def test_words_that_make_no_task_are_refused_by_name(entry, message):
    with pytest.raises(SpecError, match=message):
        build_task(entry, "t")
