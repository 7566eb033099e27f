"""One stack of a study: what it is, what kind it is of, and what it costs.

May import architectures. plan.py makes them, findings.py groups them by kind.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridzoo.architectures import Spec, account, parse_pattern
from hybridzoo.mixers import MixerConfig, build_mixer
from hybridzoo.mixers.registry import GATE_FLAGS, entry_of


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A stack without its ratio and order: the words of its recurrent mixers, of its attention, and of the rest.

    `parallel` says whether some layer holds several mixers side by side.
    """

    recurrent: dict[str, Any]
    attention: dict[str, Any]
    rest: dict[str, Any]
    parallel: bool


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of the study as it is trained, with its costs.

    `family` names its recurrent mixers (`attention` where there are none); `attention` is the share of its mixers that
    keep keys and values; `kind` is all else that may differ between stacks but the order of layers and what met the
    budget, so that a ratio curve joins only what differs in the ratio. Training FLOPs are of the task's own lengths;
    decoding FLOPs and bytes are for one sequence after the study's `context` tokens, in bfloat16 where a cache is.

    `budget` is what it was made equal in to the others (`params`, `train_flops`, `inference_bytes`, or nothing), and
    `solved` a sentence: what that changed, and how close it came. One label may stand under several budgets.
    `placement` says where the attention stands, if the study asked for one: `even`, `first` and so on.
    """

    label: str
    budget: str = ""
    solved: str = ""
    placement: str = ""
    pattern: str
    family: str
    attention: float
    kind: Kind
    ffn_width: int | None
    specs: dict[str, dict[str, Any]]  # by task: the vocabulary differs
    parameters: dict[str, int]
    train_flops: dict[str, int]
    decode_flops: dict[str, int]
    state_bytes: int
    kv_bytes: int


def mixer_classes(spec: Spec) -> set[type]:
    """Return the classes of the mixers that stand in a spec's layers."""
    return {entry_of(config).cls for layer in spec.layers for _, config in layer.mixers}


def trained_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a model, of what `Spec.to_dict` gives: its layers, each with the words of its mixers.

    What is only said is left out: the name, how the pattern is written, and mixers that no layer has. It needs none of
    the mixers' code, so that the results of a user's own can be read without that.
    """
    said = ("name", "mixers", "layers")
    layers = [[[label, spec["mixers"][label]] for label in layer] for layer in parse_pattern(spec["layers"])]
    return {**{word: value for word, value in spec.items() if word not in said}, "layers": layers}


def make_stack(
    label: str,
    spec: Spec,
    declared: Spec,
    vocabularies: Mapping[str, int],
    lengths: Mapping[str, int],
    context: int,
    **facts: str,
) -> Stack:
    """Count a stack. `declared` is its spec before a budget was met: what met it makes no other kind of stack.

    `vocabularies` and `lengths` are by task; `facts` are the budget, what met it, and the placement.
    """
    by_task = {name: replace(spec, name=label, vocab_size=size) for name, size in vocabularies.items()}
    accounts = {name: account(one, context=context) for name, one in by_task.items()}
    trained = {name: account(one, context=lengths[name]) for name, one in by_task.items()}
    first = next(iter(accounts.values()))
    return Stack(
        label=label,
        pattern=spec.pattern,
        family=_family(spec),
        attention=_attention(spec),
        kind=_kind(declared),
        ffn_width=None if spec.ffn.type == "none" else spec.ffn.hidden(spec.d_model),
        specs={name: one.to_dict() for name, one in by_task.items()},
        parameters={name: a.parameters for name, a in accounts.items()},
        train_flops={name: a.train_flops_per_token for name, a in trained.items()},
        decode_flops={name: a.decode_flops_per_token for name, a in accounts.items()},
        state_bytes=first.state_bytes,
        kv_bytes=first.kv_bytes,
        **facts,
    )


@functools.cache
def keeps_keys(config: MixerConfig) -> bool:
    """Whether a mixer is attention, whoever wrote it: what it keeps grows with the context as keys and values."""
    with torch.device("meta"):
        return build_mixer(config).kv_bytes(64) > 0


def _attention(spec: Spec) -> float:
    # Mixers in parallel share their layer, so each counts for its part of it.
    shares = [sum(keeps_keys(config) for _, config in layer.mixers) / len(layer.mixers) for layer in spec.layers]
    return sum(shares) / len(shares)


def _family(spec: Spec) -> str:
    names = dict.fromkeys(
        mixer_name(config) for layer in spec.layers for _, config in layer.mixers if not keeps_keys(config)
    )
    return " + ".join(names) or "attention"


def _kind(spec: Spec) -> Kind:
    # What the task, the budget and the order of layers decide is not the stack's kind, nor is its name.
    chosen = {name: value for name, value in spec.to_dict().items() if name not in _NOT_OF_A_KIND}
    configs = {config for layer in spec.layers for _, config in layer.mixers}
    return Kind(
        # d_model is every mixer's, so it is among the rest.
        recurrent=_words(config for config in configs if not keeps_keys(config)),
        attention=_words(config for config in configs if keeps_keys(config)),
        rest={key: value for key, value in _flat(chosen).items() if key not in ("ffn.width", "ffn.expand")},
        parallel=any(len(layer.mixers) > 1 for layer in spec.layers),
    )


_NOT_OF_A_KIND = ("name", "layers", "mixers", "vocab_size")


def _words(configs: Iterable[MixerConfig]) -> dict[str, Any]:
    """The words of distinct mixers as one flat mapping, whatever order they come in."""
    entries: dict[str, dict[str, Any]] = {}
    for name, words in sorted(((entry_of(one).name, dataclasses.asdict(one)) for one in configs), key=json.dumps):
        place = name if name not in entries else f"{name} {len(entries) + 1}"
        entries[place] = {key: value for key, value in words.items() if key != "d_model"}
    return _flat(entries)


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat.update({f"{name}.{key}".rstrip("."): one for key, one in inner})
    return flat


def mixer_name(config: MixerConfig) -> str:
    """Return a mixer as a registry string: its name, and the gate flags that are not its defaults."""
    entry = entry_of(config)
    changed = [f"{flag}={getattr(config, flag)}" for flag in GATE_FLAGS if flag in entry.flags]
    defaults = [f"{flag}={entry.flags[flag].default}" for flag in GATE_FLAGS if flag in entry.flags]
    words = [word for word, default in zip(changed, defaults, strict=True) if word != default]
    return f"{entry.name}[{','.join(words)}]" if words else entry.name
