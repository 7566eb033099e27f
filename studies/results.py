"""Results on disk: one JSON file a trial, written whole or not at all, and never trusted unread.

A file is written beside its place, flushed to the disk and renamed, so a killed process leaves the old file or the new
one. Each carries a digest of itself: a file that was cut, edited or copied badly is refused with the reason. May import
the writing of whole files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hybridzoo.architectures.whole_file import write_text

FORMAT = 1
SHORT_KEY = 12  # characters of a key that end the name of its file

Status: TypeAlias = Literal["finished", "failed"]

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "key": str,
    "stack": str,
    "task": str,
    "seed": int,
    "status": str,
    "metrics": dict,
    "history": dict,
    "seconds": (int, float),
    "error": str,
    "traceback": str,
    "environment": dict,
}


class CorruptResultError(ValueError):
    """A result file that cannot be used; the message names the file and what is wrong with it."""


def canonical(data: Any) -> str:
    """Return `data` as JSON text that is the same for equal data; `ValueError` for NaN and infinities."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def content_key(data: Any) -> str:
    """Return a hash of `data`: equal data, equal key, on every machine."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` as JSON, atomically and durably: readers see the old file or the whole new one."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def remove_leftovers(folder: Path) -> int:
    """Delete the unfinished files of writers that were killed, and return how many there were."""
    leftovers = list(folder.glob(".*.tmp"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write one trial's result with its digest; `ValueError` for one that `read_result` would refuse."""
    payload = {"format": FORMAT, **result}
    _check(path, payload)
    write_json(path, {**payload, "digest": content_key(payload)})


def read_result(path: Path, key: str | None = None) -> dict[str, Any]:
    """Read one trial's result.

    Raises: `CorruptResultError` for a file that is cut short, is not JSON, lacks a field, does not fit its digest, or
    belongs to another trial than `key`; `FileNotFoundError` where there is none.
    """
    try:
        payload = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise CorruptResultError(f"{path}: not text") from None
    except ValueError as error:
        raise CorruptResultError(f"{path}: cut short or not JSON ({error})") from None
    if not isinstance(payload, dict):
        raise CorruptResultError(f"{path}: holds a {type(payload).__name__}, not a result")
    digest = payload.pop("digest", None)
    _check(path, payload)
    if digest != content_key(payload):
        raise CorruptResultError(f"{path}: changed since it was written (its digest does not fit)")
    if key is not None and payload["key"] != key:
        raise CorruptResultError(f"{path}: the result of another trial ({payload['key'][:12]}, not {key[:12]})")
    return payload


class ResultFiles:
    """The result files that a folder holds now, found by the key of their trial: the label that a name begins with is
    what the stack was called when it was trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*--*.json")):
            self._paths.setdefault(path.stem.rpartition("--")[2], []).append(path)

    def paths(self, key: str) -> list[Path]:
        """Return the files whose names end as those of that key do, unread."""
        return self._paths.get(key[:SHORT_KEY], [])

    def others(self, keys: Iterable[str]) -> int:
        """Return how many trials have results here and are none of `keys`, by the names of the files."""
        return len(set(self._paths) - {key[:SHORT_KEY] for key in keys})

    def read(self, key: str) -> dict[str, Any]:
        """Read the result of that key: of several, a finished one, or else the last.

        Raises: `FileNotFoundError` where there is none; `CorruptResultError` where none can be read.
        """
        found: list[dict[str, Any]] = []
        damaged: CorruptResultError | None = None
        for path in self.paths(key):
            try:
                found.append(read_result(path, key))
            except CorruptResultError as error:
                damaged = error
        if found:
            return max(found, key=lambda record: (record["status"] == "finished", record.get("finished_at", "")))
        raise damaged or FileNotFoundError(f"{self.folder}: no result of {key[:SHORT_KEY]}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check(path: Path, payload: Mapping[str, Any]) -> None:
    for field, kind in _NEEDED.items():
        if field not in payload:
            raise CorruptResultError(f"{path}: the field '{field}' is missing")
        if not isinstance(payload[field], kind):
            raise CorruptResultError(f"{path}: the field '{field}' is a {type(payload[field]).__name__}")
    if payload["format"] != FORMAT:
        raise CorruptResultError(f"{path}: written in format {payload['format']}, this version reads {FORMAT}")
    if payload["status"] not in ("finished", "failed"):
        raise CorruptResultError(f"{path}: the status '{payload['status']}' is neither finished nor failed")
    if payload["status"] == "finished" and not payload["metrics"]:
        raise CorruptResultError(f"{path}: finished, but without a score")
    for name, value in payload["metrics"].items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CorruptResultError(f"{path}: the score '{name}' is {value}, not a finite number")
