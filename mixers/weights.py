"""Weights of published layers, by name and layout, into the mixers here.

A layout says, for every tensor of the published layer, which shapes it may have and which parameters are cut from it.
Everything is checked against it before the first parameter changes. May import kernels; the mixers know nothing of
this file.

Shapes: H key heads, HV value heads, K key dim, V value dim, W taps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hybridzoo.mixers.attention import Attention
from hybridzoo.mixers.base import TokenMixer
from hybridzoo.mixers.delta import DeltaMixer
from hybridzoo.mixers.mamba2 import Mamba2
from hybridzoo.mixers.schema import unknown

Source: TypeAlias = Literal["transformers", "fla"]
Shape: TypeAlias = tuple[int, ...]


def import_weights(mixer: TokenMixer, state_dict: Mapping[str, Tensor], source: Source) -> None:
    """Load the `state_dict` of one published layer into `mixer`, in place.

    The mixer's words must say what weights cannot; where the published default differs from the mixer's:

    | source | layer | mixer |
    |---|---|---|
    | transformers | `LlamaAttention`, `Qwen3Attention` | `attention[rope_base=500000]`; Qwen3 `[qk_norm=rmsnorm]` |
    | transformers | `Qwen3NextGatedDeltaNet` | `gated_delta_net[norm_eps=1e-6]` |
    | transformers | `KimiLinearDeltaAttention` | `kda` (its output gate has no bias: ours is set to zero) |
    | transformers | `Mamba2Mixer` | `mamba2`; up to 5.17, whose norm has no groups, `mamba2[norm_groups=1]` |
    | fla | `Attention` | `attention` |
    | fla | `GatedDeltaNet`, `KimiDeltaAttention`, `GatedDeltaNet2` | `gated_delta_net`, `kda`, `gdn2` |
    | fla | `DeltaNet` | `delta_net`; with `use_gate`, `[output_gate=full,gate_activation=silu]` |
    | fla | `GatedLinearAttention` | `gla` |
    | fla | `Mamba2` | `mamba2` |

    Raises `ValueError`, before anything is loaded, naming every key that is missing, unexpected or of another shape,
    and where the mixer has parameters that such a layer does not have, or the reverse; `SpecError` for an unknown
    source.
    """
    where = f"import_weights: {mixer.registry_name or type(mixer).__name__} from {source}"
    if source not in _SOURCES:
        raise unknown("import_weights", "source", str(source), _SOURCES)
    layout = _SOURCES[source](mixer)
    own = dict(mixer.named_parameters())
    if any(parameter.is_meta for parameter in own.values()):
        raise ValueError(f"{where}: the mixer is on the meta device; give it memory with to_empty() first")
    if layout is None:
        raise ValueError(f"{where}: {source} has no layer of this kind")
    _refuse("; ".join(_misfits(layout, own)), where, "the published layer and the mixer's words differ")
    _refuse("; ".join(_faults(layout, state_dict)), where, "the state dict does not hold this layer")
    with torch.no_grad():
        for key, take in layout.takes.items():
            for name, cut in take.parts.items():
                own[name].copy_(cut(state_dict[key]))
        for name in layout.zeros:
            own[name].zero_()


def _refuse(problems: str, where: str, summary: str) -> None:
    if problems:
        raise ValueError(f"{where}: {summary}: {problems}")


@dataclass(frozen=True)
class Take:
    """One published tensor: the shapes it may have, and how each of our parameters is cut from it."""

    shapes: tuple[Shape, ...]
    parts: dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Layout:
    """All tensors of a published layer, and those of our parameters that are zero there for want of a tensor."""

    takes: dict[str, Take]
    zeros: tuple[str, ...] = field(default=())


def _misfits(layout: Layout, own: Mapping[str, Tensor]) -> list[str]:
    filled = {name: key for key, take in layout.takes.items() for name in take.parts}
    lacking = [f"the mixer has no {name} for {key}" for name, key in filled.items() if name not in own]
    extra = [name for name in own if name not in filled and name not in layout.zeros]
    return lacking + ([f"the layer has nothing for {', '.join(extra)}"] if extra else [])


def _faults(layout: Layout, state_dict: Mapping[str, Tensor]) -> list[str]:
    faults = []
    missing = [key for key in layout.takes if key not in state_dict]
    unexpected = [key for key in state_dict if key not in layout.takes]
    if missing:
        faults.append(f"missing {', '.join(missing)}")
    if unexpected:
        faults.append(f"unexpected {', '.join(unexpected)}")
    for key, take in layout.takes.items():
        if key in state_dict and tuple(state_dict[key].shape) not in take.shapes:
            faults.append(f"{key} is {list(state_dict[key].shape)}, expected {list(take.shapes[0])}")
    return faults


def _same(mixer: TokenMixer, name: str) -> Take:
    """The published tensor is the parameter; Kimi's checkpoints keep `A_log` as `[1, 1, HV, 1]`."""
    shape = _shape(mixer, name)
    shapes = (shape, (1, 1, *shape, 1)) if name == "gates.A_log" else (shape,)
    return Take(shapes, {name: lambda w: w.reshape(shape)})


def _stacked(mixer: TokenMixer, names: Sequence[str], heads: int = 1) -> Take:
    """The published tensor stacks the rows of `names`: all of one after the other, or so within each of `heads`."""
    shapes = [_shape(mixer, name) for name in names]
    sizes = [shape[0] // heads for shape in shapes]
    total = (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def cut(part: int) -> Callable[[Tensor], Tensor]:
        return lambda w: w.unflatten(0, (heads, -1)).split(sizes, dim=1)[part].flatten(0, 1)

    return Take((total,), {name: cut(i) for i, name in enumerate(names)})


def _shape(mixer: TokenMixer, name: str) -> Shape:
    # A parameter that the mixer's words leave out has no shape; _misfits names it.
    parameter = dict(mixer.named_parameters()).get(name)
    return (0,) if parameter is None else tuple(parameter.shape)


def _by_name(mixer: TokenMixer, renamed: Mapping[str, str] | None = None) -> dict[str, Take]:
    """Every parameter under its own name, `gates.` dropped and the first part of it `renamed`."""
    takes = {}
    for name, _ in mixer.named_parameters():
        head, dot, rest = name.removeprefix("gates.").partition(".")
        takes[(renamed or {}).get(head, head) + dot + rest] = _same(mixer, name)
    return takes


_CONVS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")


def _transformers(mixer: TokenMixer) -> Layout | None:
    if isinstance(mixer, (Attention, Mamba2)):
        return Layout(_by_name(mixer))
    if isinstance(mixer, DeltaMixer) and mixer.config.decay == "scalar":
        return _qwen3_next(mixer)
    if isinstance(mixer, DeltaMixer) and mixer.config.decay == "channel":
        return _kimi_linear(mixer)
    return None


def _qwen3_next(mixer: DeltaMixer) -> Layout:
    # Rows of the fused projections are grouped by key head: its q, its k, then v and z of its value heads.
    H = mixer.config.n_heads
    qkvz = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight")
    return Layout(
        {
            "in_proj_qkvz.weight": _stacked(mixer, qkvz, H),
            "in_proj_ba.weight": _stacked(mixer, ("b_proj.weight", "a_proj.weight"), H),
            "conv1d.weight": _stacked(mixer, _CONVS),
            "A_log": _same(mixer, "gates.A_log"),
            "dt_bias": _same(mixer, "gates.dt_bias"),
            "norm.weight": _same(mixer, "o_norm.weight"),
            "out_proj.weight": _same(mixer, "o_proj.weight"),
        }
    )


def _kimi_linear(mixer: DeltaMixer) -> Layout:
    plain = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "o_norm.weight", "o_proj.weight")
    return Layout(
        {
            **{name: _same(mixer, name) for name in plain},
            "conv1d.weight": _stacked(mixer, _CONVS),
            "forget_gate.f_a_proj.weight": _same(mixer, "f_proj.0.weight"),
            "forget_gate.f_b_proj.weight": _same(mixer, "f_proj.1.weight"),
            "forget_gate.A_log": _same(mixer, "gates.A_log"),
            "forget_gate.dt_bias": _same(mixer, "gates.dt_bias"),
            "g_a_proj.weight": _same(mixer, "g_proj.0.weight"),
            "g_b_proj.weight": _same(mixer, "g_proj.1.weight"),
        },
        zeros=("g_proj.1.bias",),
    )


# What fla's delta layers call their parameters; ours that are not here (CARVE's) no such layer has.
_FLA = {"q_proj", "k_proj", "v_proj", "q_conv1d", "k_conv1d", "v_conv1d", "a_proj", "b_proj", "w_proj", "f_proj",
        "gk_proj", "g_proj", "o_norm", "g_norm_swish_gate", "o_proj", "A_log", "dt_bias"}  # fmt: skip


def _fla(mixer: TokenMixer) -> Layout | None:
    if isinstance(mixer, (Attention, Mamba2)):
        return Layout(_by_name(mixer))
    if not isinstance(mixer, DeltaMixer):
        return None
    gla = mixer.config.decay_form == "logsigmoid"
    takes = _by_name(mixer, {"f_proj": "gk_proj", "o_norm": "g_norm_swish_gate"} if gla else None)
    return Layout({key: take for key, take in takes.items() if key.partition(".")[0] in _FLA})


_SOURCES: dict[str, Callable[[TokenMixer], Layout | None]] = {"transformers": _transformers, "fla": _fla}
