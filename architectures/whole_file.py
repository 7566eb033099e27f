"""Writing a file whole or not at all. May import nothing of the project."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to, whose file takes `path` as the block ends.

    Readers see the old file or the whole new one, and so they do after a crash: it is on the disk before it is renamed.
    Where the block breaks, the old file stays and nothing else. What a killed process leaves is called
    `.NAME.*.tmp`.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield half
        with half.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; Windows cannot open a folder, and needs no such call.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
