"""Tasks: what they ask is answerable, a perfect solver scores 1, and guessing scores chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks import StudyTask, build_task, list_tasks, register_task
from hybridzoo.training import IGNORED

CPU = torch.device("cpu")


mqar_words = st.fixed_dictionaries(
    {
        "pairs": st.integers(1, 12),
        "keys": st.integers(12, 20),
        "values": st.integers(1, 9),
        "length": st.none() | st.integers(26, 60),
        "filler": st.sampled_from(["blank", "random"]),
        "power": st.sampled_from([0.01, 1.0, 2.0]),
    }
)


@given(words=mqar_words, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_every_query_of_mqar_asks_for_a_listed_key_and_is_labelled_with_its_value(words, seed):
    task = build_task({"type": "mqar", **words})
    pairs = words["pairs"]
    ids, labels = task.sample(pairs, 5, torch.Generator().manual_seed(seed))
    assert ids.shape == labels.shape == (5, task.length_of(pairs))
    assert ids.min() >= 0
    assert ids.max() < task.vocab_size
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        listed = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(listed) == pairs  # distinct keys
        assert all(1 <= key <= task.config.keys < value for key, value in listed.items())
        asked = [row[t - 1] for t, label in enumerate(wanted) if label != IGNORED]
        assert all(t > 2 * pairs for t, label in enumerate(wanted) if label != IGNORED)
        assert len(set(asked)) == len(asked) == min(pairs, len(row) - 2 * pairs - 1)
        assert [listed[key] for key in asked] == [label for label in wanted if label != IGNORED]


def test_knowing_the_other_pairs_does_not_help_with_the_one_asked_for():
    # Values are drawn with replacement: with as many pairs as values, elimination would otherwise give the last one.
    ids, _ = build_task({"type": "mqar"}).sample(32, 50, torch.Generator().manual_seed(0))
    distinct = [len(set(row[1:64:2])) for row in ids.tolist()]
    assert max(distinct) < 32


def test_the_power_law_brings_queries_nearer_to_the_pairs():
    def mean_place(power: float) -> float:
        task = build_task({"type": "mqar", "pairs": 8, "length": 128, "power": power})
        _, labels = task.sample(8, 300, torch.Generator().manual_seed(0))
        return torch.nonzero(labels != IGNORED)[:, 1].double().mean().item()

    assert mean_place(0.01) < mean_place(1.0) - 10
    assert mean_place(1.0) == pytest.approx((16 + 128) / 2, abs=2)


def test_the_curriculum_takes_its_stages_in_turn_at_an_equal_number_of_tokens_a_step():
    stages = [{"pairs": 4, "steps": 3}, {"pairs": 16, "steps": 2}]
    task = build_task({"type": "mqar", "curriculum": stages})
    assert [task.level_at(step) for step in range(7)] == [4, 4, 4, 16, 16, 32, 32]
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(task.batch(step, 16, generator).ids.shape) for step in (0, 3, 5)]
    assert shapes == [(128, 12), (32, 48), (16, 96)]
    assert task.shown.stages == (3, 5)


class Uniform(nn.Module):
    def forward(self, ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 256))


class Knows(nn.Module):
    """Knows the next byte, being shown it: logits of the sequence moved by one."""

    def forward(self, ids):
        return SimpleNamespace(logits=100.0 * F.one_hot(ids.roll(-1, 1), 256).float())


def test_bits_a_byte_are_eight_for_a_uniform_guess_and_none_for_one_who_knows():
    task = build_task({"type": "bytes", "length": 64, "examples": 16})
    assert task.evaluate(Uniform(), CPU)["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert task.evaluate(Knows(), CPU)["bits_per_byte"] == pytest.approx(0.0, abs=1e-5)


class LearnsLate(nn.Module):
    """Guesses a byte that fewer than 8 stand before, and knows the rest."""

    def forward(self, ids):
        logits = Knows()(ids).logits
        logits[:, :7] = 0
        return SimpleNamespace(logits=logits)


def test_bits_a_byte_are_also_told_by_how_many_bytes_stand_before():
    task = build_task({"type": "bytes", "length": 40, "examples": 5})
    scores = task.evaluate(LearnsLate(), CPU)
    levels = task.shown.levels
    assert [level for level, _ in levels] == [1, 2, 4, 8, 16, 32]
    assert [scores[metric] for _, metric in levels] == pytest.approx([8, 8, 8, 0, 0, 0], abs=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(8 * 7 / 39, abs=1e-5)
    assert set(task.evaluate(LearnsLate(), CPU, quick=True)) == {"bits_per_byte"}


def test_the_buckets_of_positions_hold_every_byte_once():
    for length in (2, 3, 8, 9, 33):
        task = build_task({"type": "bytes", "length": length, "examples": 3})
        torch.manual_seed(0)
        table = torch.randn(256, 256)
        scores = task.evaluate(nn.Sequential(nn.Embedding.from_pretrained(table), Named()), CPU)
        sizes = {n: min(2 * n, length) - n for n, _ in task.shown.levels}
        assert sum(sizes.values()) == length - 1
        total = sum(size * scores[f"bits_per_byte@{n}"] for n, size in sizes.items())
        assert total / (length - 1) == pytest.approx(scores["bits_per_byte"])


class Named(nn.Module):
    def forward(self, logits):
        return SimpleNamespace(logits=logits)


def test_byte_batches_repeat_from_a_seed_and_differ_between_seeds():
    task = build_task({"type": "bytes", "length": 64})
    draws = [task.batch(9, 4, torch.Generator().manual_seed(seed)).ids for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_byte_windows_come_from_the_part_they_should(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.py").write_bytes(b"x" * 50)
    task = build_task({"type": "bytes", "folder": str(tmp_path), "length": 20})
    for path in task.corpus.validation_files:
        (tmp_path / path).write_bytes(b"y" * 50)
    task = build_task({"type": "bytes", "folder": str(tmp_path), "length": 20, "max_bytes": 10**6})
    ids, labels = task.batch(0, 64, torch.Generator().manual_seed(0))
    assert ids.shape == (64, 20)
    assert ids.dtype == torch.int64
    assert ord("y") not in ids.unique().tolist()
    assert torch.equal(ids, labels)


def test_a_task_on_other_text_has_another_fingerprint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.py").write_bytes(b"same" * 20)
    entries = [{"type": "bytes", "folder": str(tmp_path / name), "length": 8} for name in ("a", "b")]
    assert build_task(entries[0]).fingerprint() == build_task(entries[1]).fingerprint()
    (tmp_path / "b" / "0.py").write_bytes(b"other" * 20)
    changed = {**entries[1], "max_bytes": 10**6}  # a second read of a changed folder
    assert build_task(entries[0]).fingerprint() != build_task(changed).fingerprint()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pairs": 4}, "tasks.t: missing 'type'; known tasks: .*bytes.*mqar"),
        ({"type": "mqra"}, r"tasks.t.type: unknown task 'mqra'.*did you mean 'mqar'"),
        ({"type": "mqar", "pars": 4}, r"tasks.t: unknown key 'pars'.*did you mean 'pairs'"),
        ({"type": "mqar", "pairs": 65}, "tasks.t.pairs: 65 pairs need as many distinct keys, and keys is 64"),
        ({"type": "mqar", "levels": [128]}, "tasks.t.levels: 128 pairs need"),
        ({"type": "mqar", "length": 64}, "tasks.t.length: 32 pairs and one query take 66 positions, got 64"),
        (
            {"type": "mqar", "curriculum": [{"pairs": 40, "steps": 3}]},
            "tasks.t.curriculum: a stage of pairs 40 is harder",
        ),
        ({"type": "mqar", "curriculum": [{"pairs": 4}]}, r"tasks.t.curriculum\[0\]: missing 'steps'"),
        ({"type": "bytes", "length": 1}, "tasks.t.length: a window needs at least 2 tokens"),
        ({"type": "bytes", "length": "long"}, "tasks.t.length: expected integer, got 'long'"),
    ],
)
def test_a_task_that_cannot_be_is_refused_by_key(entry, message):
    with pytest.raises(SpecError, match=message):
        build_task(entry, "tasks.t")


def test_text_shorter_than_a_window_is_refused(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.py").write_bytes(b"short")
    task = build_task({"type": "bytes", "folder": str(tmp_path), "length": 64})
    with pytest.raises(SpecError, match="fewer than one window of length = 64"):
        task.fingerprint()


def test_two_tasks_cannot_have_one_name():
    assert {"bytes", "mqar"} <= set(list_tasks())
    with pytest.raises(ValueError, match="'mqar' is taken by Mqar"):
        register_task("mqar")(StudyTask)
