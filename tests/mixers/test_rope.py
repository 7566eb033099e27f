"""Stretched rotary positions: their identities, and YaRN as transformers has it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.kernels.rotary import rotary
from hybridzoo.mixers import SpecError
from hybridzoo.mixers.attention import Attention
from hybridzoo.mixers.rope import Rope, amplitude, speeds, turn_to, turned

CPU = torch.device("cpu")


def heads(D: int = 16, T: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, T, 3, D, dtype=torch.float64, generator=generator) for _ in "qk")
    return q, k


def rotate(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    return turned(q, k, turn_to(positions, q.shape[-1], rope, q.dtype))


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling: str) -> None:
    q, k = heads()
    positions = torch.arange(6)[None]
    torch.testing.assert_close(rotate(q, k, positions, Rope(500.0, scaling, 1.0, 64)), rotary(q, k, positions, 500.0))


@given(factor=st.sampled_from([2.0, 4.0, 8.0]), step=st.integers(1, 5))
def test_linear_puts_a_stretched_position_where_the_plain_one_was(factor: float, step: int) -> None:
    q, k = heads()
    positions = step * torch.arange(6)[None]
    stretched = rotate(q, k, (positions * factor).long(), Rope(scaling="linear", factor=factor))
    torch.testing.assert_close(stretched, rotary(q, k, positions))


@given(factor=st.floats(1, 64), D=st.sampled_from([4, 16, 64, 128]))
def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_factor(factor: float, D: int) -> None:
    plain = speeds(D, Rope(), CPU, torch.float64)
    scaled = speeds(D, Rope(scaling="ntk", factor=factor), CPU, torch.float64)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / factor)


@given(factor=st.floats(1, 64), context=st.sampled_from([256, 4096, 32768]))
def test_yarn_slows_what_turns_less_than_once_and_nothing_that_turns_often(factor: float, context: int) -> None:
    plain = speeds(64, Rope(), CPU, torch.float64)
    scaled = speeds(64, Rope(scaling="yarn", factor=factor, context=context), CPU, torch.float64)
    turns = context * plain / (2 * math.pi)
    pace = 10000.0 ** (2 / 64)  # of one pair to the next: the ends of the ramp are rounded to whole pairs
    torch.testing.assert_close(scaled[turns > 32 * pace], plain[turns > 32 * pace])
    torch.testing.assert_close(scaled[turns < 1 / pace], plain[turns < 1 / pace] / factor)
    assert (scaled <= plain * (1 + 1e-12)).all()
    assert (scaled >= plain / factor * (1 - 1e-12)).all()


@pytest.mark.parametrize(("D", "base", "context"), [(64, 10000.0, 4096), (128, 500000.0, 8192), (32, 1e6, 32768)])
def test_yarn_is_that_of_transformers(D: int, base: float, context: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": 4.0,
        "original_max_position_embeddings": context,
    }
    config = LlamaConfig(
        hidden_size=4 * D,
        num_attention_heads=4,
        head_dim=D,
        max_position_embeddings=4 * context,
        rope_parameters=scaling,
    )
    theirs, size = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    rope = Rope(base, "yarn", 4.0, context)
    torch.testing.assert_close(speeds(D, rope, CPU), theirs, rtol=1e-5, atol=0)
    assert amplitude(rope) == pytest.approx(size)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_scores_depend_on_distance_alone(scaling: str) -> None:
    q, k = heads()
    rope = Rope(scaling=scaling, factor=4.0, context=64)
    scores = []
    for shift in (0, 1000):
        turned_q, turned_k = rotate(q, k, shift + torch.arange(6)[None], rope)
        scores.append(torch.einsum("bthd,bshd->bhts", turned_q, turned_k))
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_a_stretched_sequence_may_be_split_into_calls(scaling: str) -> None:
    torch.manual_seed(0)
    mixer = Attention(d_model=16, n_heads=2, rope_scaling=scaling, rope_factor=3.0, rope_context=4).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    whole = mixer(x)[0]
    first, state = mixer(x[:, :5])
    torch.testing.assert_close(torch.cat([first, mixer(x[:, 5:], state)[0]], 1), whole)
    packed = mixer(x, cu_seqlens=torch.tensor([0, 4, 9]))[0]
    torch.testing.assert_close(packed[:, 4:], mixer(x[:, 4:])[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rope_factor": 2.0}, "rope_factor: 2.0 needs a rope_scaling"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor: must be a number from 1 to 1e\\+09, got 0.5"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "rope_context: 'yarn' needs the number of tokens"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "rope": False}, "rope_scaling: 'ntk' needs rope"),
        ({"rope_scaling": "dynamic"}, "rope_scaling: 'dynamic' is not one of none, linear, ntk, yarn"),
    ],
)
def test_scalings_that_cannot_be_built_are_named(words: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Attention(d_model=16, n_heads=2, **words)
