"""From nothing compiled to the first gradient on one GPU, and what a new length or batch costs after that.

Each mixer runs in a process of its own with an empty cache of Triton. Its first forward + backward compiles; then come
calls of other lengths and batches, each twice: a first call that took longer than the second would show compilation.

    python benchmarks/cold_start.py                 # prints, and writes benchmarks/results/cold_start.json

Shapes: B batch, T time, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST = (8, 1024, 16, 128)  # B, T, H, D
THEN = ((8, 1000, 16, 128), (8, 4096, 16, 128), (3, 77, 16, 128), (16, 512, 16, 128))


def one(row: str) -> dict[str, Any]:
    """Seconds until the first gradient of a mixer in this process, and milliseconds of the calls that follow."""
    begun = time.perf_counter()
    import torch
    from triton_backend import inputs, ours

    def call(B: int, T: int, H: int, D: int) -> float:
        x = inputs(row, B, T, H, D)
        leaves = list({id(leaf): leaf for leaf in x.values()}.values())
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(ours(row, x), leaves, torch.ones_like(x["v"]))
        torch.cuda.synchronize()
        return time.perf_counter() - start

    torch.zeros(1, device="cuda")
    ready = time.perf_counter()
    first = call(*FIRST)
    later = [
        {**dict(zip("BTHD", shape, strict=True)), "first_ms": 1e3 * call(*shape), "again_ms": 1e3 * call(*shape)}
        for shape in THEN
    ]
    rounded = [{name: round(x, 2) for name, x in of.items()} for of in later]
    return {"mixer": row, "import_s": round(ready - begun, 1), "first_s": round(first, 1), "then": rounded}


def apart(row: str) -> dict[str, Any]:
    """The same in a process of its own, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        made = subprocess.run(
            [sys.executable, __file__, "--one", row],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if made.returncode:
        return {"mixer": row, "error": made.stderr[-500:]}
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=["gdn2", "kda", "carve", "mamba2"], help="which mixers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    from recording import environment, record

    found = []
    for row in options.rows:
        found.append(apart(row))
        print(json.dumps(found[-1]), flush=True)
    print(f"written to {record('cold_start', {'environment': environment('triton'), 'results': found}, options.out)}")


if __name__ == "__main__":
    main()
