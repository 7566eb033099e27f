"""Small models trained on key overwrite, and the gates that they then use. May import training and the zoo below it.

A model is trained once in a process, whichever probes ask for it.

Shapes: B batch, T time, K key dim, V value dim, r content rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import ContentGate
from hybridzoo.kernels.fused.support import refusal
from hybridzoo.mixers.delta import DeltaMixer
from hybridzoo.studies.theory.overwrite import OneMixer, Overwrite
from hybridzoo.studies.theory.result import Settings
from hybridzoo.studies.theory.rule import F64, Tokens, run
from hybridzoo.training import TrainConfig, evaluating, train

D_MODEL, HEAD, RANK, CHUNK, WIDTH = 32, 8, 4, 8, 64
FITS = Overwrite(pairs=8, overwrites=4, queries=8, keys=16, values=8)  # as many pairs as the state has key channels
FULL = Overwrite(pairs=16, overwrites=8, queries=16, keys=32, values=8)  # twice as many
SKEWED = Overwrite(pairs=16, overwrites=8, queries=16, keys=32, values=8, skew=1.5)


@dataclass(frozen=True)
class Form:
    """How a model's one head is made: its size, its content chunk, what computes it, and where its gates start.

    The erase gate starts at `erase_bias`, the readout `U2` at entries of standard deviation `readout`: as a mixer
    starts, all but shut and not read.
    """

    head: int = HEAD
    chunk: int = CHUNK
    backend: str = "auto"
    erase_bias: float = -5.0
    readout: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A trained model, its size and its scores."""

    model: OneMixer
    parameters: int
    scores: dict[str, float]
    loss: float


AS_IT_STARTS = Form()


def build(mixer: str, task: Overwrite, target: int | None = None, form: Form = AS_IT_STARTS) -> OneMixer:
    """Build a model of one `mixer` with one head; `target` parameters by the width of its readout."""
    words: dict[str, Any] = {
        "n_heads": 1,
        "head_dim": form.head,
        "conv_size": 0,
        "qk_init": "equal",
        "output_gate": "none",
        "backend": form.backend,
    }
    if mixer.startswith("carve"):
        words |= {"content_chunk": form.chunk, "content_rank": RANK, "erase_bias_init": form.erase_bias}
    state = torch.random.get_rng_state()
    model = OneMixer(mixer, task, D_MODEL, WIDTH, **words)
    if target is not None:
        width = WIDTH + round((target - count(model)) / (D_MODEL + task.values + 1))
        torch.random.set_rng_state(state)
        model = OneMixer(mixer, task, D_MODEL, width, **words)
    up = content_up(model)
    if form.readout and up is not None:
        nn.init.normal_(up, 0.0, form.readout)  # last, so that all else starts as without it
    return model


def content_up(model: OneMixer) -> Tensor | None:
    """Return `U2`, the last of what a content gate reads memory with, or None where there is no such gate."""
    mixer = model.mixer
    return mixer.gates.content_up if isinstance(mixer, DeltaMixer) else None


def count(model: nn.Module) -> int:
    """Count a model's parameters."""
    return sum(p.numel() for p in model.parameters())


@functools.lru_cache(maxsize=256)
def train_one(
    mixer: str,
    task: Overwrite,
    steps: int,
    seed: int,
    like: str = "",
    form: Form = AS_IT_STARTS,
    batch_size: int = 32,
    device: str = "cpu",
) -> Trained:
    """Train one model from `seed`, with as many parameters as `like` has, within one unit of the readout's width.

    In float32 on `device`, from where it comes back to the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        target = count(build(like or mixer, task, form=form))
        torch.manual_seed(seed)
        model = build(mixer, task, target, form)
        config = TrainConfig(
            steps=steps,
            batch_size=batch_size,
            lr=2e-2,
            warmup=10,
            weight_decay=0.0,
            seed=seed,
            device=device,
            amp="none",
            compile=False,
            graph=captures(form, torch.device(device)),
        )
        history = train(model, task, config)
    return Trained(model.cpu(), count(model), history.metrics, history.loss[-1])


def captures(form: Form, device: torch.device) -> bool:
    """Say whether a step on `device` can be replayed as a CUDA graph: only what the fused kernels take can.

    The others ask the device where a content chunk stands, for which a capture has no answer.
    """
    if device.type != "cuda" or form.backend not in ("auto", "triton"):
        return False
    x = torch.empty(1, 1, 1, form.head, device=device)
    content = ContentGate(x.new_empty(1, RANK, form.head), x.new_empty(1, form.head, RANK), form.chunk)
    return refusal(x, x, content) is None


def steps(settings: Settings) -> int:
    """Return how many steps the trained parts take."""
    return settings.pick(3, 80, 600)


def trained_carve(settings: Settings) -> OneMixer:
    """Return the `carve` whose gates count as trained: on more pairs than it has keys."""
    return train_one("carve", FULL, steps(settings), settings.seed).model


def trained_tokens(settings: Settings, batch: int) -> tuple[Tokens, ContentGate]:
    """Return what the trained `carve` reads on a batch of its task, and its content gate."""
    tokens, content = recorded(trained_carve(settings), batch, settings.seed)
    assert content is not None
    return tokens, content


def recorded(model: OneMixer, batch: int, seed: int) -> tuple[Tokens, ContentGate | None]:
    """Return what the recurrence of `model`'s mixer reads on a batch of its own task, in float64, and its content gate.

    Raises: `TypeError` for a mixer that is no `DeltaMixer` with one head and a scalar tied gate.
    """
    mixer = model.mixer
    if not isinstance(mixer, DeltaMixer) or mixer.config.HV != 1 or not mixer.config.writes_scalar:
        raise TypeError("gates are recorded from a DeltaMixer with one head and correct=tied, write=scalar")
    seen: dict[str, Any] = {}
    modules: dict[str, nn.Module | None] = {
        "q": mixer.q_proj,
        "k": mixer.k_proj,
        "v": mixer.v_proj,
        "b": mixer.b_proj,
        "z": mixer.z_proj,
    }
    modules["gates"] = mixer.gates

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output})

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items() if module is not None]
    try:
        with evaluating(model):
            model(model.task.sample(batch, torch.Generator().manual_seed(seed))[0].ids)
    finally:
        for handle in handles:
            handle.remove()
    log_decay, content = seen["gates"]
    q, k, v = (F.silu(seen[name]).to(F64) for name in "qkv")  # what a mixer without convolution does
    beta = torch.sigmoid(seen["b"][..., 0].to(F64))
    tokens = Tokens(
        q=F.normalize(q, dim=-1),
        k=F.normalize(k, dim=-1),
        v=v,
        log_decay=None if log_decay is None else log_decay[:, :, 0].to(F64),
        erase_logits=seen["z"].to(F64) if "z" in seen else None,
        correct=beta,
        write=beta,
    )
    if content is not None:
        content = ContentGate(content.down.detach().to(F64), content.up.detach().to(F64), content.chunk)
    return tokens, content


def frozen_gates(tokens: Tokens, content: ContentGate | None, predict: str, scale: float) -> Tokens:
    """Return `tokens` with the content readout of this very run written into the erase logits: gates as they were."""
    if content is None or tokens.erase_logits is None:
        return tokens
    o, _ = run(tokens, predict, content, scale=scale)
    return tokens._replace(erase_logits=tokens.erase_logits + readout(o, content))


def readout(o: Tensor, content: ContentGate) -> Tensor:
    """Return `u` of every token, `[B, T, K]`, from a run's outputs `o [B, T, V]`: read from the chunk before."""
    B, T, V = o.shape
    L = content.chunk
    full = T // L
    means = torch.zeros(B, full + 1, V, dtype=o.dtype)
    means[:, 1:] = o[:, : full * L].reshape(B, full, L, V).mean(2)
    u = torch.tanh(means @ content.down[0].T) @ content.up[0].T
    return u.repeat_interleave(L, dim=1)[:, :T]
