"""A file that is written is there whole, or is what it was before."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybridzoo.architectures.whole_file import remove_halves, whole_file


@pytest.mark.parametrize("before", [None, "old"])
def test_a_writing_that_breaks_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def write() -> None:
        with whole_file(path) as half:
            half.write_text("half of it")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()
    assert [one.name for one in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before


def test_until_it_is_whole_readers_see_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as half:
        half.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, happened = tmp_path / "file", list[str]()
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append("on the disk"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("named"), replace(*paths)))
    with whole_file(path) as half:
        half.write_text("new")
    assert happened[:2] == ["on the disk", "named"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".file.0a1b.tmp", "file", ".file[1].0a.tmp", ".file2.0a.tmp", "file.tmp"):
        (tmp_path / name).write_text("mine")
    remove_halves(tmp_path / "file")
    assert sorted(one.name for one in tmp_path.iterdir()) == [".file2.0a.tmp", ".file[1].0a.tmp", "file", "file.tmp"]
    remove_halves(tmp_path / "file[1]")
    assert not (tmp_path / ".file[1].0a.tmp").exists()


def test_a_folder_that_cannot_be_synced_has_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuses)
    with whole_file(tmp_path / "file") as half:
        half.write_text("new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "new"


def test_threads_that_write_one_file_leave_one_of_their_files(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(letter: str) -> None:
        for _ in range(20):
            with whole_file(path) as half:
                half.write_text(letter * 10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    text = path.read_text()
    assert len(text) == 10_000
    assert len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [path]
