"""Byte-level text from a folder, split by file into a training and a validation part.

Every machine that runs this has such a folder: the source files of Python's own standard library, the default. May
import mixers (for its error class); studies/tasks/byte_lm.py draws batches from a corpus.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError

SEPARATOR = 0  # the byte between two files: it occurs in no text file

# Folders that are not the standard library's own source: installed packages, caches, and tests, whose data files and
# tables are unlike the rest.
NOT_SOURCE = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


@dataclass(frozen=True)
class ByteCorpus:
    """The bytes of a folder's files: `train` and `validation`, uint8, files joined by `SEPARATOR`.

    A file belongs to one part only, by a hash of its path inside the folder, so adding files moves none of the others.
    """

    folder: Path
    train: Tensor  # uint8 [bytes]
    validation: Tensor  # uint8 [bytes]
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    digest: str  # of every path and byte, so that results on different text are never compared unknowingly

    def describe(self) -> str:
        """Say in one line what the text is."""
        return (
            f"{self.folder}: {len(self.train_files)} files ({self.train.numel() / 1e6:.1f} MB) to train on, "
            f"{len(self.validation_files)} files ({self.validation.numel() / 1e6:.2f} MB) to validate, "
            f"sha256 {self.digest[:12]}"
        )


def load_bytes(
    folder: str | Path | None = None,
    pattern: str = "*.py",
    exclude: tuple[str, ...] = NOT_SOURCE,
    validation: float = 0.1,
    max_bytes: int = 2**30,
) -> ByteCorpus:
    """Read every file under `folder` whose name fits `pattern`, outside folders named in `exclude`.

    `folder=None` is the running Python's standard library. About a share `validation` of the files, chosen by a hash of
    their paths (at least one), is kept for validation. A second call with the same arguments returns the same object.

    Raises: `SpecError` where there is no such folder, fewer than two files that fit, or more than `max_bytes` of them.
    """
    root = Path(folder) if folder is not None else Path(sysconfig.get_path("stdlib"))
    return _load(root.expanduser().resolve(), pattern, tuple(exclude), validation, max_bytes)


@functools.lru_cache(maxsize=4)
def _load(root: Path, pattern: str, exclude: tuple[str, ...], validation: float, max_bytes: int) -> ByteCorpus:
    if not root.is_dir():
        raise SpecError(f"text folder {root}: no such folder")
    if not 0 < validation < 1:
        raise SpecError(f"text folder {root}: validation must be a share between 0 and 1, got {validation}")
    paths = sorted(_files(root, pattern, exclude))
    if len(paths) < 2:
        raise SpecError(
            f"text folder {root}: {len(paths)} files fit '{pattern}'; two are needed, one to train on and one to "
            "validate (give another folder or pattern)"
        )
    size = sum((root / path).stat().st_size for path in paths)
    if size > max_bytes:
        raise SpecError(f"text folder {root}: {size:,} bytes fit '{pattern}', more than max_bytes = {max_bytes:,}")
    held_out = _held_out(paths, validation)
    contents = {path: (root / path).read_bytes() for path in paths}
    total = hashlib.sha256()
    for path, content in contents.items():
        total.update(f"{path}\0{len(content)}\0".encode(errors="surrogateescape"))
        total.update(content)
    kept = tuple(path for path in paths if path not in held_out)
    left = tuple(path for path in paths if path in held_out)
    return ByteCorpus(
        root,
        _join([contents[path] for path in kept]),
        _join([contents[path] for path in left]),
        kept,
        left,
        total.hexdigest(),
    )


def _files(root: Path, pattern: str, exclude: tuple[str, ...]) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in exclude]
        for name in fnmatch.filter(names, pattern):
            path = Path(folder, name)
            if path.is_file():  # not a dangling link
                yield path.relative_to(root).as_posix()


def _held_out(paths: list[str], share: float) -> frozenset[str]:
    places = {path: _place(path) for path in paths}
    chosen = {path for path, place in places.items() if place < share}
    # A folder of a few files may have none below the share, or all: the lowest, or all but the highest, will do.
    ordered = sorted(paths, key=lambda path: (places[path], path))
    chosen = chosen or {ordered[0]}
    return frozenset(chosen - {ordered[-1]})


def _place(path: str) -> float:
    """Return a number in [0, 1) that depends on the path alone."""
    digest = hashlib.sha256(path.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _join(contents: list[bytes]) -> Tensor:
    joined = bytes([SEPARATOR]).join(contents)
    if not joined:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
