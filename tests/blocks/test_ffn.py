"""Channel mixers: widths, formulas and what they refuse."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.blocks.ffn import FeedForward, FfnConfig
from hybridzoo.mixers import SpecError
from hybridzoo.mixers.schema import convert

TYPES = [kind for kind in get_args(get_type_hints(FfnConfig)["type"]) if kind != "none"]


def test_the_paper_s_widths_come_from_expand_or_width() -> None:
    assert FfnConfig(expand=2.667).hidden(768) == 2048
    assert FfnConfig(width=5632, expand=1.0).hidden(2048) == 5632
    assert FfnConfig(width=683).hidden(256) == 683


@pytest.mark.parametrize("d_model", [192, 768, 3072])
def test_default_widths_give_every_type_the_same_parameters(d_model: int) -> None:
    sizes = {sum(p.numel() for p in FeedForward(d_model, FfnConfig(type=kind)).parameters()) for kind in TYPES}
    assert len(sizes) == 1


def test_the_width_is_the_nearest_multiple_and_never_zero() -> None:
    assert FfnConfig(expand=1.0, multiple_of=64).hidden(95) == 64
    assert FfnConfig(expand=1.0, multiple_of=64).hidden(97) == 128
    assert FfnConfig(expand=0.01, multiple_of=64).hidden(64) == 64


def test_each_type_computes_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    for kind, act in {"gelu": lambda u: F.gelu(u, approximate="tanh"), "relu2": lambda u: u.clamp(min=0) ** 2}.items():
        ffn = FeedForward(8, FfnConfig(type=kind, width=5))
        torch.testing.assert_close(ffn(x), act(x @ ffn.up_proj.weight.T) @ ffn.down_proj.weight.T)
    ffn = FeedForward(8, FfnConfig(type="swiglu", width=5))
    gate, up = x @ ffn.gate_proj.weight.T, x @ ffn.up_proj.weight.T
    torch.testing.assert_close(ffn(x), (gate * torch.sigmoid(gate) * up) @ ffn.down_proj.weight.T)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"type": "swigl"}, "ffn.type: 'swigl' is not one of swiglu, gelu, relu2, none (did you mean 'swiglu'?)"),
        ({"expand": 0}, "ffn.expand: must be above 0 and at most 1024, got 0"),
        ({"expand": float("nan")}, "ffn.expand: must be above 0 and at most 1024, got nan"),
        ({"width": 0}, "ffn.width: must be at least 1, got 0 (no channel mixer is type: none)"),
        ({"multiple_of": 0}, "ffn.multiple_of: must be at least 1, got 0"),
        ({"widht": 3}, "(did you mean 'width'?)"),
    ],
)
def test_bad_words_are_refused_with_their_place(words: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        convert(FfnConfig, words, "ffn")
    assert says in str(caught.value)


def test_type_none_has_no_module() -> None:
    with pytest.raises(ValueError, match="has no module"):
        FeedForward(8, FfnConfig(type="none"))
