"""What the kernels are: a digest of every file of `kernels/`, by which a check on a GPU is known to be of these."""

from __future__ import annotations

from pathlib import Path

from hybridzoo import kernels
from hybridzoo.kernels.source import source_digest


def kernel_digests() -> dict[str, str]:
    """Each Python file below `kernels/` with a hash of what it does: comments aside."""
    folder = Path(kernels.__file__).parent
    return {
        path.relative_to(folder).as_posix(): source_digest([path.read_text(encoding="utf-8")])
        for path in sorted(folder.rglob("*.py"))
    }
