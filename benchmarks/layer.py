"""One mixer layer at the 125M shape of CARVE's paper, forward + backward: time, memory and parameters, fla's beside it.

The paper (arXiv 2606.27229v2) claims for CARVE against Gated DeltaNet-2 a throughput within 0.4 %, 13 % less memory and
19 % fewer mixer parameters. Here both, CARVE's token gate alone and KDA run from one input in one process, a round of
each in turn: eager, compiled (fullgraph, default mode), and either replayed as a CUDA graph, where the host no longer
counts. fla's layers, eager, load the same weights, and are timed beside ours in a process each.

Weights are bfloat16 and those of the gates float32: what FSDP2's mixed precision computes with, in which models of
this size are trained. Gradients are taken of the input and of every parameter.

    python benchmarks/layer.py                          # on a GPU: prints, and writes benchmarks/results/layer.json
    python benchmarks/layer.py --small --ways eager     # anywhere: whether it runs

Shapes: B batch, T time, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording import environment, in_turn, record
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from turns import MIB, gpu_in_turn, installed, measured_in_turn, peak_mib

from hybridzoo.architectures.model import cast
from hybridzoo.mixers import build_mixer, import_weights

MIXERS = ("carve", "carve[erase=token]", "gdn2", "kda")
PEERS = {"gdn2": "GatedDeltaNet2", "kda": "KimiDeltaAttention"}
WAYS = ("eager", "compiled", "graph", "compiled graph")
SHAPE = {"d_model": 768, "B": 8, "T": 1024, "H": 12, "D": 64}
SMALL = {"d_model": 32, "B": 2, "T": 40, "H": 2, "D": 16}
Step = Callable[[], Any]


def layer_of(name: str, shape: dict[str, int], device: str) -> nn.Module:
    """The mixer as specs build it, in bfloat16 but for its gates."""
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=shape["d_model"], n_heads=shape["H"], head_dim=shape["D"]).to(device)
    cast(mixer, torch.bfloat16)
    return mixer


def peer_of(name: str, mixer: nn.Module, shape: dict[str, int]) -> nn.Module:
    """The layer of that name in fla, whose weights `mixer` takes; its rates and time steps stay float32 too."""
    import fla.layers

    layer = getattr(fla.layers, PEERS[name])(
        hidden_size=shape["d_model"], num_heads=shape["H"], head_dim=shape["D"], expand_v=1.0, mode="chunk"
    )
    import_weights(mixer, layer.state_dict(), "fla")
    rates = {name: p.detach().clone() for name, p in layer.named_parameters() if name in ("A_log", "dt_bias")}
    layer = layer.to("cuda", torch.bfloat16)
    for name, value in rates.items():
        layer.get_parameter(name).data = value.float().cuda()
    return layer


def inputs(shape: dict[str, int], device: str) -> tuple[Tensor, Tensor]:
    """The input, a leaf, and the gradient of the output."""
    torch.manual_seed(1)
    x, d_y = (torch.randn(shape["B"], shape["T"], shape["d_model"], device=device).bfloat16() for _ in range(2))
    return x.requires_grad_(), d_y


def step_of(layer: nn.Module, way: str, x: Tensor, d_y: Tensor) -> Step:
    """One forward and backward pass. The second compiled way of a layer takes what the first compiled."""
    forward = partial(_output, layer)
    if way.startswith("compiled"):
        forward = partial(_compiled_output, layer)
    leaves = [x, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), leaves, d_y)

    return captured(step) if way.endswith("graph") else step


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


_compiled_output = torch.compile(_output, fullgraph=True)


def captured(step: Step) -> Step:
    """`step` as a CUDA graph, recorded once."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def kept_mib(layer: nn.Module, x: Tensor) -> float:
    """What the forward pass keeps on the GPU for the backward one, its output included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)[0]
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del y
    return round(held / MIB, 1)


def parameters_of(layer: nn.Module) -> dict[str, int]:
    """The number of parameters, whole and by part."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.named_children()}
    own = sum(p.numel() for p in layer.parameters(recurse=False))
    return {"all": sum(parts.values()) + own, **({"own": own} if own else {}), **parts}


def timed(steps: dict[Any, Step], rounds: int, device: str) -> dict[Any, float]:
    """Median milliseconds of each, a round of all in turn."""
    if device == "cuda":
        return gpu_in_turn(steps, rounds)
    return {name: times["median"] for name, times in in_turn(steps, rounds).items()}


def ours(shape: dict[str, int], mixers: list[str], ways: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """Every mixer in every way; a way that fails is its error."""
    torch._dynamo.reset()  # what earlier layers were compiled to is searched at each call
    x, d_y = inputs(shape, device)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[tuple[str, str], Step] = {}
    for name in mixers:
        layer = layer_of(name, shape, device)
        found[name] = {"side": "hybridzoo", "mixer": name, "parameters": parameters_of(layer)}
        times, peaks, errors = {}, {}, {}
        for way in ways:
            try:
                step = step_of(layer, way, x, d_y)
                step()
                step()
            except Exception as error:
                errors[way] = f"{type(error).__name__}: {error}"[:300]
                continue
            steps[name, way] = step
            times[way] = 0.0
            if device == "cuda" and not way.endswith("graph"):  # a graph's memory is its own, from recording on
                peaks[way] = peak_mib(step)
        found[name] |= {"ms": times, **({"peak_mib": peaks} if peaks else {}), **({"errors": errors} if errors else {})}
        if device == "cuda":
            found[name]["kept_mib"] = kept_mib(layer, x)
    for (name, way), ms in timed(steps, rounds, device).items():
        found[name]["ms"][way] = ms
    return list(found.values())


def beside_fla(name: str, shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """The layer of fla and ours with its weights, both eager: how far apart, then time and memory."""
    x, d_y = inputs(shape, "cuda")
    mixer = layer_of(name, shape, "cuda")
    sides = {"hybridzoo": mixer, "fla": peer_of(name, mixer, shape)}
    y, expected = (sides[side](x)[0].detach().float() for side in ("hybridzoo", "fla"))
    steps = {side: step_of(layer, "eager", x, d_y) for side, layer in sides.items()}
    return {
        "side": "fla",
        "mixer": name,
        "layer": PEERS[name],
        "apart": round(((y - expected).norm() / expected.norm()).item(), 5),
        "parameters": parameters_of(sides["fla"]),
        "ms": timed(steps, rounds, "cuda"),
        "peak_mib": {side: peak_mib(step) for side, step in steps.items()},
        "kept_mib": {side: kept_mib(layer, x) for side, layer in sides.items()},
    }


def measure(
    job: str, shape: dict[str, int], mixers: list[str], ways: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """One process's results."""
    if job == "hybridzoo":
        yield from ours(shape, mixers, ways, rounds, "cuda")
    else:
        yield beside_fla(job.removeprefix("fla "), shape, rounds)


def prepare(job: str, shape: dict[str, int], mixers: list[str], ways: list[str], rounds: int) -> None:
    """Compile and tune what one process measures."""
    for _ in measure(job, shape, mixers, ways, 1):
        pass


def against_gdn2(found: list[dict[str, Any]]) -> dict[str, Any]:
    """CARVE as a share of Gated DeltaNet-2: parameters, and in each way time and memory."""
    carve, gdn2 = (
        next((r for r in found if r.get("side") == "hybridzoo" and r["mixer"] == name), None)
        for name in ("carve", "gdn2")
    )
    if carve is None or gdn2 is None:
        return {}
    shares: dict[str, Any] = {"parameters": carve["parameters"]["all"] / gdn2["parameters"]["all"]}
    for what in ("ms", "peak_mib"):
        shared = carve.get(what, {}).keys() & gdn2.get(what, {}).keys()
        shares |= {f"{what} {way}": carve[what][way] / gdn2[what][way] for way in WAYS if way in shared}
    if "kept_mib" in carve and "kept_mib" in gdn2:
        shares["kept_mib"] = carve["kept_mib"] / gdn2["kept_mib"]
    return {name: round(share, 4) for name, share in shares.items()}


def show(found: list[dict[str, Any]], console: Console) -> None:
    """Print a line for each mixer and side."""
    table = Table("mixer", "parameters", "ms", "peak MiB", "kept MiB", title="forward + backward")
    for result in found:
        if "error" in result:
            table.add_row(result["job"], "", escape(result["error"]), "", "")
            continue
        columns = [result.get(key, "") for key in ("ms", "peak_mib", "kept_mib")]
        texts = [", ".join(f"{k} {v}" for k, v in c.items()) if isinstance(c, dict) else str(c) for c in columns]
        title = result["mixer"] if result["side"] == "hybridzoo" else f"fla {result['layer']}"
        table.add_row(escape(title), f"{result['parameters']['all']:,}", *texts)
    console.print(table)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS), help="registry names, flags as you like")
    parser.add_argument("--ways", nargs="*", choices=WAYS, help="all of them on a GPU, eager and compiled elsewhere")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    shape = SMALL if options.small else SHAPE
    ways = options.ways or list(WAYS if options.device == "cuda" else WAYS[:2])
    if options.device == "cuda":
        peers = [name for name in PEERS if name in options.mixers] if importlib.util.find_spec("fla") else []
        jobs = ["hybridzoo", *(f"fla {name}" for name in peers)]
        common = (shape, options.mixers, ways, options.rounds)
        found = measured_in_turn([(job, *common) for job in jobs], prepare, measure)
    else:
        found = ours(shape, options.mixers, ways, options.rounds, "cpu")
    whole = {
        "environment": environment(*(["triton"] if installed("triton") else [])),
        "fla-core": installed("fla-core"),
        "shape": shape,
        "weights": "bfloat16, gates float32",
        "carve_over_gdn2": against_gdn2(found),
        "results": found,
    }
    console = Console()
    show(found, console)
    console.print("carve over gdn2:", whole["carve_over_gdn2"])
    console.print(f"written to {record('layer', whole, options.out)}")


if __name__ == "__main__":
    main()
