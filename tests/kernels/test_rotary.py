"""Rotary embedding: only distances matter, and Llama's layout is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridzoo.kernels.rotary import rotary


def make(T: int = 6, D: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(2, T, 4, D, dtype=torch.float64), torch.randn(2, T, 2, D, dtype=torch.float64)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = make()
    here = torch.arange(6)[None]
    near, far = (rotary(q, k, here + shift) for shift in (0, 1000))
    scores = [torch.einsum("bthd,bshd->bhts", a, b.repeat_interleave(2, 2)) for a, b in (near, far)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


def test_it_turns_the_pairs_that_llama_turns() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = make()
    angle = torch.arange(6, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2) / 8)
    angle = torch.cat([angle, angle], -1)[None].expand(2, -1, -1)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
    ours = rotary(q, k, torch.arange(6)[None], base=500.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_rows_may_stand_at_different_positions() -> None:
    q, k = make(T=1)
    both = rotary(q, k, torch.tensor([[3], [70]]))[0]
    torch.testing.assert_close(both[1:], rotary(q[1:], k[1:], torch.tensor([[70]]))[0])


def test_lengths_are_kept_and_dtypes_returned() -> None:
    q, k = make()
    turned = rotary(q, k, torch.arange(6)[None])[0]
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert rotary(q.bfloat16(), k.bfloat16(), torch.arange(6)[None])[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("D", "positions", "base", "message"),
    [
        (7, torch.arange(6)[None], 1e4, "even head size, got 7"),
        (8, torch.arange(6), 1e4, "positions must be"),
        (8, torch.arange(5)[None], 1e4, "positions must be"),
        (8, torch.arange(6)[None], 0.0, "base must be positive, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(D: int, positions: Tensor, base: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(*make(D=D), positions, base)
