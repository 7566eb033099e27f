"""Softmax attention by every backend that is present: full, windowed, packed, and one token behind a cache.

Every side computes the same call on the same inputs; how far its output is from torch's own attention is written beside
its times. What `auto` takes for the call is named: it should be the fastest, and nothing here holds it to that.

    python benchmarks/attention.py                 # on a GPU: prints, and writes benchmarks/results/attention.json
    python benchmarks/attention.py --small         # anywhere: whether it runs

Where two packages cannot be installed side by side, run it once with each and give each result a name by --name.

Shapes: B batch, T tokens, H query heads, H_kv key heads, D head dim, C cached tokens, W window.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recording import environment, in_turn, record
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from turns import gpu_in_turn, installed, peak_mib

from hybridzoo.mixers.softmax import BACKENDS, SoftmaxRule, attend, attend_packed
from hybridzoo.mixers.softmax.backends import choose
from hybridzoo.mixers.softmax.rule import call_of

SHAPE = {"B": 8, "T": 4096, "H": 16, "H_kv": 16, "D": 128, "W": 1024}
SMALL = {"B": 2, "T": 48, "H": 4, "H_kv": 2, "D": 16, "W": 16}
# Shares of a pack's tokens, so that lengths lie from a few to a quarter of them.
SHARES = (0.25, 0.15, 0.0001, 0.2, 0.1, 0.05, 0.12, 0.08, 0.03)
DECODING = {"B": 64, "C": 8192, "H_kv": 4}
PASSES = ("forward", "forward_backward")


class Case(NamedTuple):
    """One call: its inputs, whether it is differentiated, and how a rule runs it."""

    inputs: tuple[Tensor, ...]
    window: int | None
    trained: bool
    run: Callable[[SoftmaxRule], Tensor]
    packed: bool = False
    cached: bool = False


def leaves(device: str, trained: bool, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random inputs of these shapes."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=trained) for shape in shapes)


def batch(shape: dict[str, int], device: str, window: int | None) -> Case:
    """Whole sequences."""
    heads = ((shape["B"], shape["T"], shape[h], shape["D"]) for h in ("H", "H_kv", "H_kv"))
    q, k, v = leaves(device, True, *heads)
    return Case((q, k, v), window, True, lambda rule: attend(q, k, v, rule))


def pack(shape: dict[str, int], device: str) -> Case:
    """As many tokens in sequences of different lengths."""
    total = shape["B"] * shape["T"]
    lengths = [max(1, int(share * total)) for share in SHARES]
    lengths.append(total - sum(lengths))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)
    q, k, v = leaves(device, True, *((total, shape[h], shape["D"]) for h in ("H", "H_kv", "H_kv")))
    empty = k.new_zeros(len(lengths), 0, shape["H_kv"], shape["D"])
    length = torch.zeros(len(lengths), device=device, dtype=torch.int32)
    return Case(
        (q, k, v), None, True, lambda rule: attend_packed(q, k, v, rule, bounds, (empty, empty), length), packed=True
    )


def decoding(shape: dict[str, int], device: str, small: bool) -> Case:
    """One token a row, behind caches that are full."""
    B, C, H_kv = (2, 40, 2) if small else (DECODING[key] for key in ("B", "C", "H_kv"))
    D = shape["D"]
    q, k, v = leaves(device, False, (B, 1, shape["H"], D), (B, C + 1, H_kv, D), (B, C + 1, H_kv, D))
    length = torch.full((B,), C, device=device, dtype=torch.int32)
    return Case((q, k, v), None, False, lambda rule: attend(q, k, v, rule, length), cached=True)


def cases(shape: dict[str, int], device: str, small: bool) -> dict[str, Callable[[], Case]]:
    """By name, made when it is their turn."""
    return {
        "full": lambda: batch(shape, device, None),
        "window": lambda: batch(shape, device, shape["W"]),
        "packed": lambda: pack(shape, device),
        "decoding": lambda: decoding(shape, device, small),
    }


def steps_of(case: Case, rule: SoftmaxRule) -> dict[str, Callable[[], Any]]:
    """The passes of one side."""
    d_y = torch.randn_like(case.inputs[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return case.run(rule)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.run(rule), case.inputs, d_y)

    return {"forward": forward, **({"forward_backward": forward_backward} if case.trained else {})}


def measure(case: Case, names: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Every backend's median milliseconds a pass, and why one has none."""
    call = call_of(*case.inputs, SoftmaxRule(1.0, case.window), case.packed, case.cached)
    found: dict[str, Any] = {"auto": choose(call, "auto").name, "ms": {}, "peak_mib": {}, "apart": {}, "without": {}}
    rule = SoftmaxRule(case.inputs[0].shape[-1] ** -0.5, case.window)
    with torch.no_grad():
        truth = case.run(rule._replace(backend="sdpa")).float()
    sides: dict[str, dict[str, Callable[[], Any]]] = {}
    for name in names:
        try:
            steps = steps_of(case, rule._replace(backend=name))
            y = steps["forward"]()
            for step in steps.values():
                step()
        except Exception as error:
            found["without"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        sides[name] = steps
        found["apart"][name] = round(((y.float() - truth).norm() / truth.norm()).item(), 5)
    for what in PASSES:
        runs = {name: steps[what] for name, steps in sides.items() if what in steps}
        if runs and device == "cuda":
            found["peak_mib"][what] = {name: peak_mib(run) for name, run in runs.items()}
            found["ms"][what] = gpu_in_turn(runs, rounds, warmup=3)
        elif runs:
            found["ms"][what] = {name: times["median"] for name, times in in_turn(runs, rounds).items()}
    last = found["ms"][next(what for what in reversed(PASSES) if what in found["ms"])]
    found["fastest"] = min(last, key=lambda name: last[name])
    return found


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """A line for each case and backend."""
    table = Table("call", "backend", *(f"{what} ms" for what in PASSES), "apart")
    for name, found in results.items():
        for backend in found["apart"]:
            times = [str(found["ms"].get(what, {}).get(backend, "")) for what in PASSES]
            marked = f"{backend} (auto)" if backend == found["auto"] else backend
            table.add_row(name, marked, *times, str(found["apart"][backend]))
        for backend, why in found["without"].items():
            console.print(f"{name}: {backend}: {escape(why)}")
    console.print(table)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = [name for name in BACKENDS if name != "reference"]  # which holds all scores: some 100 GiB at full size
    parser.add_argument("--backends", nargs="*", choices=list(BACKENDS), default=several, help="which to time")
    parser.add_argument("--cases", nargs="*", choices=("full", "window", "packed", "decoding"), help="which calls")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="attention", help="of the result's file")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    shape = SMALL if options.small else SHAPE
    results = {}
    for name, make in cases(shape, options.device, options.small).items():
        if options.cases is None or name in options.cases:
            results[name] = measure(make(), options.backends, options.rounds, options.device)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    packages = sorted({package for backend in BACKENDS.values() for package in backend.packages} - {"torch"})
    whole = {
        "environment": environment(),
        "packages": {package: installed(package) for package in packages},
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "shape": shape,
        "decoding": DECODING,
        "results": results,
    }
    console = Console()
    show(results, console)
    console.print(f"written to {record(options.name, whole, options.out)}")


if __name__ == "__main__":
    main()
