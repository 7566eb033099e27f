"""One process at a folder at a time. Imports nothing of hybridzoo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


class BusyError(RuntimeError):
    """Another process is at work in this folder."""


@contextlib.contextmanager
def only_one(folder: Path, doing: str) -> Iterator[None]:
    """Hold the folder's lock; the system lets it go when the process ends, however it ends.

    Raises: `BusyError` where another process holds it, which says what that one is `doing`.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder would only waste work, as each file is written whole
        yield
        return
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"{folder}: another process is {doing} in this folder") from None
        yield
