"""Text from a folder: read whole, split by file, the same split everywhere."""

from __future__ import annotations

import time

import pytest
import torch

from hybridzoo.mixers.schema import SpecError
from hybridzoo.training import load_bytes


def write_files(root, count, prefix="file"):
    for i in range(count):
        path = root / f"sub{i % 3}" / f"{prefix}{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{prefix} {i}\n".encode())


def test_the_standard_library_loads_fast_and_leaves_out_tests_and_packages():
    start = time.perf_counter()
    corpus = load_bytes()
    assert time.perf_counter() - start < 5
    assert corpus.train.numel() > 3e6
    assert corpus.validation.numel() > 2e5
    parts = {part for path in corpus.train_files + corpus.validation_files for part in path.split("/")}
    assert "json" in parts
    assert not parts & {"site-packages", "test", "tests", "__pycache__"}
    assert all(path.endswith(".py") for path in corpus.train_files)


def test_a_second_load_is_the_same_object(tmp_path):
    write_files(tmp_path, 6)
    assert load_bytes(tmp_path) is load_bytes(tmp_path)


def test_every_file_is_in_one_part_and_every_byte_is_kept(tmp_path):
    write_files(tmp_path, 40)
    corpus = load_bytes(tmp_path, validation=0.3)
    assert not set(corpus.train_files) & set(corpus.validation_files)
    for part, files in ((corpus.train, corpus.train_files), (corpus.validation, corpus.validation_files)):
        assert bytes(part.tolist()) == b"\0".join((tmp_path / path).read_bytes() for path in files)
    assert len(corpus.train_files) + len(corpus.validation_files) == 40


def test_adding_files_moves_no_other_file_between_the_parts(tmp_path):
    write_files(tmp_path, 30)
    before = load_bytes(tmp_path, validation=0.3, max_bytes=10**6)
    write_files(tmp_path, 25, prefix="new")
    after = load_bytes(tmp_path, validation=0.3, max_bytes=10**6 + 1)
    assert set(before.validation_files) <= set(after.validation_files)
    assert set(before.train_files) <= set(after.train_files)


def test_the_split_does_not_depend_on_where_the_folder_stands(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, 30)
    a, b = load_bytes(tmp_path / "a"), load_bytes(tmp_path / "b")
    assert a.validation_files == b.validation_files
    assert a.digest == b.digest


def test_the_digest_sees_a_changed_byte(tmp_path):
    write_files(tmp_path, 4)
    before = load_bytes(tmp_path, max_bytes=1000)
    (tmp_path / "sub0" / "file0.py").write_bytes(b"changed\n")
    assert load_bytes(tmp_path, max_bytes=1001).digest != before.digest


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_folder_of_few_files_still_has_both_parts(tmp_path, count, share):
    write_files(tmp_path, count)
    corpus = load_bytes(tmp_path, validation=share)
    assert corpus.train_files
    assert corpus.validation_files


def test_bytes_of_any_encoding_are_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_bytes(b"")
    corpus = load_bytes(tmp_path, pattern="*.txt")
    assert corpus.train.dtype == torch.uint8
    assert corpus.train.numel() + corpus.validation.numel() == 256


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (lambda root: None, {"folder": "missing"}, "missing: no such folder"),
        (lambda root: write_files(root, 1), {}, "1 files fit"),
        (lambda root: write_files(root, 3), {"pattern": "*.txt"}, r"0 files fit '\*.txt'"),
        (lambda root: write_files(root, 3), {"validation": 1.5}, "between 0 and 1, got 1.5"),
        (lambda root: write_files(root, 3), {"max_bytes": 5}, "more than max_bytes = 5"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, make, words, message):
    make(tmp_path)
    words = {**words, "folder": tmp_path / words.get("folder", ".")}
    with pytest.raises(SpecError, match=message):
        load_bytes(**words)
