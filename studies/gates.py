"""What the gates of a trained model do: for every layer and gate its mean and quantiles over one held-out batch.

Listens to the mixers while the task scores the model, so nothing of a model is computed in a second way. May import
architectures and training; trial.py records the rows in a result under `gates`, figures.py draws them.

Shapes: B batch, T time, HV value heads, K key dim, V value dim, L content chunk, C chunks, r content rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hybridzoo.architectures import HybridLM
from hybridzoo.kernels import ContentGate
from hybridzoo.mixers import TokenMixer
from hybridzoo.mixers.delta import DeltaMixer
from hybridzoo.mixers.mamba2 import Mamba2
from hybridzoo.mixers.registry import entry_of
from hybridzoo.studies.tasks import StudyTask
from hybridzoo.training import evaluating

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
MOST = 1 << 20  # values that quantiles are taken of: every so-manieth of more

# What the values of each gate are, for whoever shows them.
GATES = {
    "decay": "share of the state that a token keeps, exp(g): 1 forgets nothing",
    "erase": "share of a key channel that a token clears before it writes, b",
    "content": "what the memory's content adds to the logit of the erase gate, u: 0 adds nothing",
    "correct": "strength of the delta rule's correction, e (beta)",
    "write": "strength of the write, w (Mamba-2: its step size)",
}


class _SeenEnough(Exception):
    """Ends the scoring after its first batch; never leaves this module."""


def gate_statistics(
    model: nn.Module, task: StudyTask, device: torch.device, bf16: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each layer, mixer and gate of `model`: `layer` (from 0), `mixer`, `gate`, `mean` and quantiles.

    The values are of the first batch that `task.evaluate(quick=True)` scores, of all its tokens, heads and channels.
    Attention has no gates and no row; neither have mixers other than the zoo's own recurrent ones and what derives
    from them. With `bf16` the model runs under autocast, as its training scored it. It is left as it was, and so is
    torch's global generator, unless the task's own scoring draws from it.

    Raises: `ValueError` for a gate that is not finite.
    """
    if not isinstance(model, HybridLM):
        return []
    rows: list[dict[str, Any]] = []

    def listen(layer: int, mixer: TokenMixer, stack: ExitStack) -> None:
        seen: dict[str, Any] = {}
        for name, module in mixer.named_children():
            stack.callback(module.register_forward_hook(_keep(seen, name)).remove)

        def collect(*_: object) -> None:
            for gate, values in _gates(mixer, seen):
                rows.append({"layer": layer, "mixer": entry_of(mixer.config).name, "gate": gate, **summary(values)})

        stack.callback(mixer.register_forward_hook(collect).remove)

    def stop(*_: object) -> None:
        raise _SeenEnough

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        for layer, block in enumerate(model.blocks):
            for mixer in block.modules():
                if isinstance(mixer, DeltaMixer | Mamba2):
                    listen(layer, mixer, stack)
        # The last block, since a task may take the hidden states and not call the model as a whole.
        stack.callback(model.blocks[-1].register_forward_hook(stop).remove)
        with suppress(_SeenEnough):
            task.evaluate(model, device, quick=True)
    return rows


def _keep(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Of a norm, what went in: the recurrence's own output, whose means drive the content gate.
        seen[name] = args[0] if name == "o_norm" else output

    return keep


def _gates(mixer: TokenMixer, seen: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The gates of one mixer from what its parts gave in one forward call, as the recurrence receives them."""
    if isinstance(mixer, Mamba2):
        log_decay, step = seen["gates"]
        if log_decay is not None:
            yield "decay", log_decay.exp()
        yield "write", step
        return
    assert isinstance(mixer, DeltaMixer)
    c = mixer.config
    log_decay, content = seen["gates"]
    if log_decay is not None:
        yield "decay", log_decay.exp()
    if "z_proj" in seen:
        logits = seen["z_proj"].unflatten(-1, (c.HV, c.K)).float()
        if content is not None:
            added = content_logits(seen["o_norm"].float(), content)
            logits = logits + added
            if added.shape[1] > content.chunk:  # the first chunk has no content to speak of
                yield "content", added[:, content.chunk :]
        yield "erase", logits.sigmoid()
    if "b_proj" in seen:
        yield "correct", seen["b_proj"].float().sigmoid() * (2 if c.allow_neg_eigval else 1)
    if "w_proj" in seen:
        yield "write", seen["w_proj"].float().sigmoid()


def content_logits(o: Tensor, content: ContentGate) -> Tensor:
    """Return what the content gate adds to the erase logits, `[B, T, HV, K]`, from the outputs `o [B, T, HV, V]`.

    `U2 tanh(U1 m)` with m the mean output of the chunk before, 0 in the first (CARVE, arXiv 2606.27229, eqs. 5-10), of
    sequences from fresh states.
    """
    B, T, HV, V = o.shape
    L = content.chunk
    whole = T // L
    means = o[:, : whole * L].view(B, whole, L, HV, V).mean(2)
    m = torch.cat([means.new_zeros(B, 1, HV, V), means], 1)  # [B, C, HV, V]: what each chunk reads
    inner = torch.einsum("bchv,hrv->bchr", m, content.down.float()).tanh()
    return torch.einsum("bchr,hkr->bchk", inner, content.up.float()).repeat_interleave(L, 1)[:, :T]


def summary(values: Tensor) -> dict[str, float]:
    """Return the mean of all `values` and their `QUANTILES`; of very many, quantiles are of an even sample."""
    flat = values.detach().float().flatten()
    mean = float(flat.double().mean())
    if not math.isfinite(mean):
        raise ValueError(f"a gate's mean is {mean}")
    sample = flat[:: -(-len(flat) // MOST)]
    levels = torch.tensor(list(QUANTILES.values()), device=flat.device)
    return {"mean": mean, **dict(zip(QUANTILES, torch.quantile(sample, levels).tolist(), strict=True))}
