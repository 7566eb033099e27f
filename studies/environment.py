"""What a result was made with: versions, device, threads, and the commit where the code is a git checkout.

May import nothing of hybridzoo but its version. trial.py puts it into every result, report.py shows it.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import hybridzoo


def environment(device: str) -> dict[str, Any]:
    """Return plain data that says what a result on `device` was made with; `commit` is empty where it is not known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "hybridzoo": hybridzoo.__version__,
        "commit": commit(Path(hybridzoo.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
    }


@functools.cache
def commit(package: Path) -> str:
    """Return the commit that `package` was checked out at, with `+` where tracked files differ from it; else nothing.

    Only a checkout of this project counts: an installed copy may lie inside somebody else's repository.
    """
    root = package.parents[1]
    if package != root / "src" / "hybridzoo" or not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


@functools.cache
def _processor() -> str:
    """Return the processor's name where the system tells it, its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
