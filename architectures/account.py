"""What a spec costs, before it is trained: parameters, FLOPs a token, and the memory a sequence takes at inference.

Each mixer counts its own FLOPs and state beside its code; here they are summed over the stack. Conventions: a
multiply-add is 2 FLOPs; projections, convolutions, the recurrence or the attention products, the FFN and the head are
counted; norms, activations, residual sums and the embedding lookup are not. Training is three times the forward pass
(once more for each of the gradients by input and by weight, arXiv 2001.08361), without recomputation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridzoo.architectures.spec import Layer, Spec, require_spec
from hybridzoo.blocks.residual import Block
from hybridzoo.mixers.registry import GATE_FLAGS, entry_of
from hybridzoo.mixers.schema import SpecError

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stack, or a part of it, costs.

    train_flops_per_token: forward and backward, the mean over a sequence of the context's length.
    decode_flops_per_token: forward, for the one token that follows the context.
    state_bytes: all that one sequence needs to go on from the context, kv_bytes included.
    kv_bytes: the part of it that is cached keys and values.
    """

    parameters: int
    train_flops_per_token: int
    decode_flops_per_token: int
    state_bytes: int
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerCost(Cost):
    """A row of the account: layer `index`, its label in the pattern, its mixers by registry name, and their flags."""

    index: int
    label: str
    mixers: tuple[str, ...]
    flags: dict[str, dict[str, str]]  # of each mixer's label: its gate flags


@dataclass(frozen=True, kw_only=True)
class Account(Cost):
    """The cost of a spec at a context length. `layers` and `ends` (embedding, last norm, head) sum to the whole."""

    context: int
    layers: tuple[LayerCost, ...]
    ends: Cost


def account(spec: Spec, context: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Account:
    """Count what a spec costs at `context` tokens, with keys, values and convolution tails held in `dtype`.

    `context=None` is 4,096 tokens, or the spec's `max_context` where that is less; the result's `context` says which.
    Nothing is allocated: each distinct layer is built once on the meta device and counted. Recurrent states are
    float32, whatever the dtype.

    Raises: `SpecError` for a context below 1 or over the spec's `max_context`, `TypeError` for anything but a `Spec`.
    """
    require_spec(spec)
    if context is None:
        context = min(DEFAULT_CONTEXT, spec.max_context or DEFAULT_CONTEXT)
    if context < 1:
        raise SpecError(f"context must be at least 1, got {context}")
    if spec.max_context is not None and context > spec.max_context:
        raise SpecError(f"context {context} is over the spec's max_context {spec.max_context}")
    costs = {layer: _layer_cost(spec, layer, context, dtype) for layer in dict.fromkeys(spec.layers)}
    rows = tuple(_row(index, layer, costs[layer]) for index, layer in enumerate(spec.layers))
    ends = _ends_cost(spec)
    return Account(**vars(_sum((*rows, ends))), context=context, layers=rows, ends=ends)


def _layer_cost(spec: Spec, layer: Layer, context: int, dtype: torch.dtype) -> Cost:
    with torch.device("meta"):
        block = Block([config for _, config in layer.mixers], layer.ffn, spec.norm_eps)
    return Cost(
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        train_flops_per_token=3 * block.flops_per_token(context),
        decode_flops_per_token=block.flops_per_token(context, decode=True),
        state_bytes=block.state_bytes(context, dtype),
        kv_bytes=block.kv_bytes(context, dtype),
    )


def _ends_cost(spec: Spec) -> Cost:
    table = spec.vocab_size * spec.d_model
    return Cost(
        parameters=table * (1 if spec.tie_embeddings else 2) + spec.d_model,  # and the last norm
        train_flops_per_token=3 * 2 * table,
        decode_flops_per_token=2 * table,
        state_bytes=0,
        kv_bytes=0,
    )


def _row(index: int, layer: Layer, cost: Cost) -> LayerCost:
    flags = {
        label: {flag: str(getattr(config, flag)) for flag in GATE_FLAGS if hasattr(config, flag)}
        for label, config in layer.mixers
    }
    names = tuple(entry_of(config).name for _, config in layer.mixers)
    return LayerCost(**vars(cost), index=index, label=layer.label, mixers=names, flags=flags)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(**{field.name: sum(getattr(cost, field.name) for cost in costs) for field in dataclasses.fields(Cost)})
