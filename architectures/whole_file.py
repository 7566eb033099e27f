"""Writing a file whole or not at all. May import nothing of the project."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to, whose file takes `path` as the block ends.

    Readers see the old file or the whole new one, and so they do after a crash: it is on the disk before it is renamed.
    Where the block breaks, the old file stays and nothing else; what a killed process leaves, `remove_halves` removes.
    """
    half = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield half
        with half.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as half:
        half.write_bytes(content)


def remove_halves(path: Path) -> None:
    """Remove what processes that were killed have left of `path`; for files that nobody else is writing."""
    for half in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        half.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk. Windows cannot open a folder, and needs no such call; some file systems of
    # networks refuse it, and the file is in its place all the same.
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
