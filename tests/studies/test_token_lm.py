"""Token files: windows are what the files hold, whatever their format, and what is no such file is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks import build_task

CPU = torch.device("cpu")
VOCABULARY = 40_000  # more than a signed number of 16 bits holds


def counting(n, start=0):
    """Tokens that say where they stand."""
    return (np.arange(start, start + n) % VOCABULARY).astype("uint16")


@pytest.fixture
def files(tmp_path):
    counting(39_000).tofile(tmp_path / "train.bin")
    counting(700, start=39_200).tofile(tmp_path / "val.bin")
    return tmp_path


def task_of(folder, **words):
    entry = {"type": "tokens", "train_file": str(folder / "train.bin"), "validation_file": str(folder / "val.bin")}
    return build_task({**entry, "vocab_size": VOCABULARY, "length": 16, **words})


def test_windows_are_what_the_files_hold(files):
    task = task_of(files)
    assert task.vocab_size == VOCABULARY
    ids, labels = task.batch(0, 64, torch.Generator().manual_seed(0))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, ids[:, :1] + torch.arange(16))
    assert torch.equal(ids, labels)
    assert ids.max() > 2**15
    assert ids.max() < 39_000
    assert torch.equal(ids, task.batch(0, 64, torch.Generator().manual_seed(0)).ids)


class Guesser(nn.Module):
    """Guesses evenly, or knows that the next token is the next number."""

    def __init__(self, knows=False):
        super().__init__()
        self.knows, self.seen = knows, []

    def forward(self, ids):
        self.seen.append(ids)
        logits = torch.zeros(*ids.shape, VOCABULARY)
        if self.knows:
            logits.scatter_(2, ((ids + 1) % VOCABULARY)[..., None], 100.0)
        return SimpleNamespace(logits=logits)


def test_nats_a_token_are_those_of_a_uniform_guess_and_none_for_one_who_knows(files):
    task = task_of(files, examples=4)
    guesser = Guesser()
    scores = task.evaluate(guesser, CPU)
    assert set(scores) == {"nats_per_token", *(f"nats_per_token@{n}" for n in (1, 2, 4, 8))}
    assert scores == pytest.approx(dict.fromkeys(scores, math.log(VOCABULARY)))
    assert all(ids.min() >= 39_200 for ids in guesser.seen)  # of the validation file
    assert task.evaluate(Guesser(knows=True), CPU, quick=True)["nats_per_token"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_every_format_gives_the_same_windows(files, dtype):
    expected = task_of(files).batch(0, 8, torch.Generator().manual_seed(1)).ids
    tokens = counting(39_000).astype(dtype)
    tokens.tofile(files / "other.bin")
    np.save(files / "other.npy", tokens)
    raw = task_of(files, train_file=str(files / "other.bin"), validation_file=str(files / "other.npy"), dtype=dtype)
    saved = task_of(files, train_file=str(files / "other.npy"))
    for task in (raw, saved):
        assert torch.equal(task.batch(0, 8, torch.Generator().manual_seed(1)).ids, expected)


def test_the_fingerprint_is_of_what_the_files_hold(files, tmp_path):
    before = task_of(files).fingerprint()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train.bin", "val.bin"):
        (elsewhere / name).write_bytes((files / name).read_bytes())
    assert task_of(elsewhere).fingerprint() == before
    tokens = counting(700, start=39_200)
    tokens[350] = 7
    tokens.tofile(elsewhere / "val.bin")
    assert task_of(elsewhere).fingerprint() != before
    assert task_of(files, length=17).fingerprint() != before


def test_a_file_larger_than_memory_is_mapped(files):
    with open(files / "sparse.bin", "wb") as file:
        file.truncate(2**40)
    task = task_of(files, train_file=str(files / "sparse.bin"))
    assert task.batch(0, 2, torch.Generator().manual_seed(0)).ids.shape == (2, 16)
    assert task.fingerprint() == task_of(files, train_file=str(files / "sparse.bin"), dtype="uint16").fingerprint()


def test_what_a_report_says_of_it_names_the_files_and_their_sizes(files):
    shown = task_of(files).shown
    assert "train.bin, 39,000 tokens of a vocabulary of 40,000" in shown.about
    assert not shown.maximise
    assert [level for level, _ in shown.levels] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"train_file": "text.txt"}, r"task\.train_file: expected a \.bin or \.npy file, got 'text\.txt'"),
        ({"vocab_size": 1}, r"task\.vocab_size: must be at least 2, got 1"),
        ({"dtype": "float32"}, r"task\.dtype: 'float32' is not one of"),
        (
            {"train_file": "a.bin", "validation_file": "a.bin"},
            r"task\.validation_file: is the train_file too, 'a\.bin'",
        ),
        ({"length": 1}, r"task\.length: a window needs at least 2 tokens"),
    ],
)
def test_words_that_cannot_be_are_refused(files, words, said):
    with pytest.raises(SpecError, match=said):
        task_of(files, **words)


def test_files_that_cannot_be_are_refused_by_name(files):
    np.save(files / "square.npy", np.zeros((4, 4), "int32"))
    np.save(files / "reals.npy", np.zeros(100))
    np.save(files / "foreign.npy", np.zeros(100, ">u2"))
    np.save(files / "objects.npy", np.array([{}, 1] * 50, dtype=object), allow_pickle=True)
    (files / "odd.bin").write_bytes(b"abc")
    (files / "empty.bin").touch()
    (files / "damaged.npy").write_bytes(b"no array")
    (files / "nothing.npy").touch()
    np.savez(files / "several.npz", a=counting(100))
    (files / "several.npz").rename(files / "several.npy")
    counting(15).tofile(files / "short.bin")
    for name, said in (
        ("missing.bin", "No such file"),
        ("square.npy", r"expected a flat array .* got <i4 \[4, 4\]"),
        ("reals.npy", r"expected a flat array .* got <f8"),
        ("foreign.npy", r"expected a flat array .* got >u2"),
        ("objects.npy", ""),
        ("odd.bin", "multiple"),
        ("empty.bin", "empty"),
        ("damaged.npy", ""),
        ("nothing.npy", ""),
        ("several.npy", ""),
        ("short.bin", "has 15 tokens, fewer than one window of length = 16"),
    ):
        task = task_of(files, validation_file=str(files / name))
        with pytest.raises(SpecError, match=rf"token file .*{name}: .*{said}"):
            _ = task.parts


def test_a_token_outside_the_vocabulary_is_named_before_a_model_sees_it(files):
    task = task_of(files, vocab_size=39_000)
    task.batch(0, 8, torch.Generator())
    with pytest.raises(SpecError, match=r"val\.bin: holds the token 39,\d+, and vocab_size is 39,000"):
        task.evaluate(Guesser(), CPU)
    signed = task_of(files, dtype="int32", vocab_size=2**31 - 1)  # two tokens read as one
    assert signed.batch(0, 2, torch.Generator()).ids.max() > VOCABULARY
    (-np.ones(100, "int32")).tofile(files / "val.bin")
    with pytest.raises(SpecError, match=r"holds the token -1, .*another dtype than torch\.int32"):
        signed.evaluate(Guesser(), CPU)
