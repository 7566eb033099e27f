"""Decoding whole models: tokens a second and bytes a sequence against the context, transformers' Llama beside them.

The 1.3B specs in bfloat16 with random weights go on from caches whose contents are random too, as long as the context
says: what a step costs does not depend on what is in them. A step is the model, the head and the likeliest token of
each row. `graph` replays it as a CUDA graph, `eager` does not. The peer is a Llama of the Transformer's sizes, over a
static cache that ends with the context's page, as ours does; its step is captured in the same way.

    python benchmarks/inference.py                  # on a GPU: prints, and writes benchmarks/results/inference.json
    python benchmarks/inference.py --small          # anywhere: whether it runs

Shapes: B sequences, C tokens of context.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from recording import environment, record
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from turns import installed

from hybridzoo.architectures import HybridCache, HybridLM, Spec, account, build_model, load_spec
from hybridzoo.architectures.decoding import Decoder
from hybridzoo.mixers.kv_cache import PAGE

SPECS = ("transformer-1.3b", "carve-hybrid-1.3b", "carve-1.3b")
SMALL_SPECS = ("transformer-tiny", "carve-hybrid-tiny", "carve-tiny")
PEER = "transformers Llama"
CONTEXTS, BATCHES = (1024, 8192, 65536), (1, 64)
STEPS = 16  # between two looks at the clock
SPARE = 0.92  # of the GPU's memory that is free, for the cache
GIB = 2**30

Step = Callable[[Tensor], Tensor]


def dtype_on(device: str) -> torch.dtype:
    """What weights and keys are in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def room(C: int) -> int:
    """Tokens up to the end of the page that the next one goes into."""
    return (C // PAGE + 1) * PAGE


def filled(model: HybridLM, B: int, C: int) -> HybridCache:
    """A cache of B rows that have seen C tokens, of random contents, with the rest of a page free."""
    cache = model.init_cache(B)
    cache.reserve(room(C))
    for name, tensor in cache.tensors().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.1)
        elif name.endswith("length"):
            tensor.fill_(C)
    cache.advance([C] * B)
    return cache


def our_steps(model: HybridLM, B: int, C: int, ways: list[str]) -> Iterator[tuple[str, Step, int]]:
    """For each way: its name, a step, and the bytes that its cache holds."""
    for way in ways:
        cache = filled(model, B, C)
        decoder = Decoder(model, cache, way == "graph")

        def step(tokens: Tensor, decoder: Decoder = decoder) -> Tensor:
            return decoder(tokens).argmax(-1)

        yield way, step, cache.state_bytes
        del cache, decoder, step


def llama(spec: Spec, device: str) -> Any:
    """A Llama of transformers, of the Transformer's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a, ffn = spec.layers[0].mixers[0][1], spec.ffn
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=ffn.hidden(spec.d_model),
        num_hidden_layers=len(spec.layers),
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.dim,
        max_position_embeddings=max(CONTEXTS) + 2 * PAGE,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype_on(device)).eval()


def peer_steps(model: Any, B: int, C: int, ways: list[str]) -> Iterator[tuple[str, Step, int]]:
    """The same of the peer, over its static cache."""
    from transformers import StaticCache

    config = model.config
    word = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    for way in ways:
        cache = StaticCache(config=config, max_cache_len=room(C))
        cache.early_initialization(B, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
        for layer in cache.layers:
            layer.keys.normal_(0, 0.1)
            layer.values.normal_(0, 0.1)
            layer.cumulative_length.fill_(C)

        def step(tokens: Tensor, cache: Any = cache) -> Tensor:
            return model(tokens[:, None], use_cache=True, **{word: cache}).logits[:, -1].argmax(-1)

        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        yield way, captured(step, B) if way == "graph" else step, held
        del cache, step


def captured(step: Step, B: int) -> Step:
    """A step as a CUDA graph, recorded once."""
    tokens = torch.zeros(B, dtype=torch.int64, device="cuda")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step(tokens)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = step(tokens)

    def replay(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return chosen

    return replay


def seconds_a_step(step: Step, B: int, device: str, rounds: int) -> float:
    """The median over rounds of STEPS steps, each from the last one's tokens; the first round does not count."""
    tokens, found = torch.zeros(B, dtype=torch.int64, device=device), []
    for _ in range(rounds + 1):
        synchronize(device)
        before = time.perf_counter()
        for _ in range(STEPS):
            tokens = step(tokens)
        synchronize(device)
        found.append((time.perf_counter() - before) / STEPS)
    return statistics.median(found[1:])


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def emptied(device: str) -> float:
    """Give back what nobody holds; returns the bytes that are free."""
    gc.collect()
    if device != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def measure(
    name: str, spec: Spec, contexts: list[int], batches: list[int], ways: list[str], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """One model's cells. What does not fit is said, with what it would take; a way that fails is its error."""
    torch.manual_seed(0)
    peer = name == PEER
    model = llama(spec, device) if peer else build_model(spec, device, dtype_on(device)).eval()
    for B in batches:
        for C in contexts:
            cost = account(spec, C, dtype_on(device))
            cell: dict[str, Any] = {"model": name, "B": B, "context": C}
            cell |= {"bytes_a_sequence": cost.state_bytes, "kv_bytes_a_sequence": cost.kv_bytes}
            needed, free = B * account(spec, room(C), dtype_on(device)).state_bytes, emptied(device)
            if needed > SPARE * free:
                yield {**cell, "without": f"needs {needed / GIB:.0f} GiB for caches, {free / GIB:.0f} are free"}
                continue
            times: dict[str, float] = {}
            errors: dict[str, str] = {}
            for way in ways:
                try:
                    for _, step, held in (peer_steps if peer else our_steps)(model, B, C, [way]):
                        cell["bytes_held"] = held
                        times[way] = seconds_a_step(step, B, device, rounds)
                        del step
                except Exception as error:
                    errors[way] = f"{type(error).__name__}: {error}"[:300]
                emptied(device)
            yield {
                **cell,
                "ms_a_step": {way: round(1e3 * s, 4) for way, s in times.items()},
                "tokens_per_s": {way: round(B / s, 1) for way, s in times.items()},
                **({"errors": errors} if errors else {}),
            }


def against_context(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds a step as a multiple of those at the shortest context, for each model and batch, the fastest way."""
    fastest = {(r["model"], r["B"], r["context"]): min(r["ms_a_step"].values()) for r in found if r.get("ms_a_step")}
    growth: dict[str, dict[str, float]] = {}
    for (name, B, C), ms in fastest.items():
        first = fastest[name, B, min(c for n, b, c in fastest if (n, b) == (name, B))]
        growth.setdefault(f"{name} B{B}", {})[str(C)] = round(ms / first, 3)
    return growth


def show(found: list[dict[str, Any]], console: Console) -> None:
    """A line for each cell."""
    table = Table("model", "B", "context", "KiB a sequence", "tokens/s", "ms a step")
    for r in found:
        columns = [
            ", ".join(f"{way} {x}" for way, x in r.get(key, {}).items()) for key in ("tokens_per_s", "ms_a_step")
        ]
        if "without" in r:
            columns = [r["without"], ""]
        table.add_row(r["model"], str(r["B"]), str(r["context"]), f"{r['bytes_a_sequence'] / 1024:,.0f}", *columns)
        for way, error in r.get("errors", {}).items():
            console.print(f"{r['model']} B{r['B']} at {r['context']}: {way}: {escape(error)}")
    console.print(table)


@torch.no_grad()
def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="shipped specs; the peer is always there")
    parser.add_argument("--contexts", nargs="*", type=int, help="tokens that a sequence has seen")
    parser.add_argument("--batch", nargs="*", type=int, help="how many sequences")
    parser.add_argument("--ways", nargs="*", choices=("graph", "eager"), help="both on a GPU, eager elsewhere")
    parser.add_argument("--rounds", type=int, default=5, help=f"timings of {STEPS} steps")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the result instead of benchmarks/results")
    options = parser.parse_args()
    names = options.models or list(SMALL_SPECS if options.small else SPECS)
    contexts = options.contexts or list((8, 40) if options.small else CONTEXTS)
    batches = options.batch or list((1, 2) if options.small else BATCHES)
    if (longest := (options.rounds + 2) * STEPS + max(C % PAGE for C in contexts)) > PAGE:
        parser.error(
            f"--rounds: steps go {longest} tokens into a page of {PAGE}, so that caches would grow: take fewer"
        )
    ways = options.ways or (["graph", "eager"] if options.device == "cuda" else ["eager"])
    transformer = load_spec((SMALL_SPECS if options.small else SPECS)[0])
    found = []
    for name in [*names, PEER]:
        spec = transformer if name == PEER else load_spec(name)
        for cell in measure(name, spec, contexts, batches, ways, options.rounds, options.device):
            found.append(cell)
            print(cell, flush=True)
    whole = {
        "environment": environment("transformers"),
        "triton": installed("triton"),
        "dtype": str(dtype_on(options.device)).removeprefix("torch.") + ", recurrent states float32",
        "against_context": against_context(found),
        "results": found,
    }
    console = Console()
    show(found, console)
    console.print(f"written to {record('inference', whole, options.out)}")


if __name__ == "__main__":
    main()
