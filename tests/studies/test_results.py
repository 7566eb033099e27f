"""Results are written whole, and a file that is not whole is never read as one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.studies import results
from hybridzoo.studies.results import CorruptResultError, ResultFiles, content_key, read_result, write_result

RESULT = {
    "key": "k" * 64,
    "stack": "carve",
    "task": "recall",
    "seed": 0,
    "status": "finished",
    "metrics": {"accuracy": 0.5},
    "history": {"loss": [1.0, 0.5]},
    "seconds": 1.25,
    "error": "",
    "traceback": "",
    "environment": {},
}


def test_a_result_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "r.json"
    write_result(path, RESULT)
    assert read_result(path, RESULT["key"]) == {"format": 1, **RESULT}


def test_a_result_is_found_by_its_key_whatever_it_was_called(tmp_path):
    short = "k" * 12
    failed = {**RESULT, "status": "failed", "error": "no", "metrics": {}}
    write_result(tmp_path / f"old--recall--seed0--{short}.json", RESULT)
    write_result(tmp_path / f"new--recall--seed0--{short}.json", failed)
    assert ResultFiles(tmp_path).read(RESULT["key"])["status"] == "finished"
    (tmp_path / f"new--recall--seed0--{short}.json").write_text("{")
    assert ResultFiles(tmp_path).read(RESULT["key"])["status"] == "finished"
    with pytest.raises(FileNotFoundError):
        ResultFiles(tmp_path).read("j" * 64)
    with pytest.raises(CorruptResultError, match="the result of another trial"):
        ResultFiles(tmp_path).read(short + "j" * 52)


def test_nothing_but_the_result_is_left_in_the_folder(tmp_path):
    write_result(tmp_path / "r.json", RESULT)
    write_result(tmp_path / "r.json", RESULT)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_result(path, RESULT)
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_result(path, {**RESULT, "seconds": 9.0})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@given(cut=st.integers(0, 10_000))
@settings(deadline=None)
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "r.json"
    write_result(path, RESULT)
    text = path.read_bytes().rstrip()
    path.write_bytes(text[: cut % len(text)])
    with pytest.raises(CorruptResultError, match=r"r\.json: "):
        read_result(path)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(deadline=None)
def test_a_changed_byte_never_changes_what_is_read(tmp_path_factory, at, byte):
    path = tmp_path_factory.mktemp("flip") / "r.json"
    write_result(path, RESULT)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(bytes(content))
    with contextlib.suppress(CorruptResultError):
        assert read_result(path) == {"format": 1, **RESULT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}}, "finished, but without a score"),
        ({"metrics": {"accuracy": math.nan}}, "the score 'accuracy' is nan"),
        ({"metrics": {"accuracy": "high"}}, "the score 'accuracy' is high"),
        ({"seed": "0"}, "the field 'seed' is a str"),
        ({"status": "done"}, "neither finished nor failed"),
        ({"format": 99}, "written in format 99, this version reads 1"),
    ],
)
def test_a_result_without_sense_is_neither_written_nor_read(tmp_path, change, message):
    path = tmp_path / "r.json"
    with pytest.raises(CorruptResultError, match=message):
        write_result(path, {**RESULT, **change})
    assert not path.exists()
    payload = {"format": 1, **RESULT, **change}
    path.write_text(json.dumps(payload))
    with pytest.raises(CorruptResultError, match=r"r.json: "):
        read_result(path)


def test_a_missing_field_another_trial_and_edited_numbers_are_named(tmp_path):
    path = tmp_path / "r.json"
    write_result(path, RESULT)
    with pytest.raises(CorruptResultError, match="the result of another trial"):
        read_result(path, "other" * 8)
    payload = json.loads(path.read_text())
    path.write_text(json.dumps({**payload, "metrics": {"accuracy": 0.99}}))
    with pytest.raises(CorruptResultError, match="changed since it was written"):
        read_result(path)
    del payload["task"]
    path.write_text(json.dumps(payload))
    with pytest.raises(CorruptResultError, match="the field 'task' is missing"):
        read_result(path)
    path.write_text("[1, 2]")
    with pytest.raises(CorruptResultError, match="holds a list"):
        read_result(path)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    write_result(tmp_path / "r.json", RESULT)
    (tmp_path / ".r.json.x1.tmp").write_text("{")
    (tmp_path / "notes.tmp").write_text("mine")
    assert results.remove_leftovers(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "r.json"]


def test_a_key_depends_on_content_alone():
    assert content_key({"a": 1, "b": [2.5, None]}) == content_key({"b": [2.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        content_key({"a": math.nan})
