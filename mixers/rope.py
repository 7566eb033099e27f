"""Rotary positions, also stretched to contexts longer than those a model was trained on.

Angles follow from positions alone, so that layers of one step can share them (`turn_to`); `turned` turns by them.
`none` is RoPE as it is (kernels/rotary.py). A scaling divides the speeds at which channel pairs turn, by `factor` or
by less: `linear` all of them (position interpolation, arXiv 2306.15595), `ntk` by a larger base, which leaves the
fastest alone and slows the slowest by `factor` (NTK-aware scaling), `yarn` those that turn less than once in the
trained context (arXiv 2309.00071). A scaling that depends on the length of a sequence is not here: keys are cached
turned, and would have to be turned anew.

Shapes: B batch, T time, H query heads, H_kv key heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hybridzoo.kernels.rotary import _turn

RopeScaling: TypeAlias = Literal["none", "linear", "ntk", "yarn"]

# Turns within the trained context: pairs with more than FAST are left alone, those with fewer than SLOW are slowed by
# the whole factor (arXiv 2309.00071, section 3.2: alpha and beta, as set for Llama).
FAST, SLOW = 32, 1


class Rope(NamedTuple):
    """How positions turn queries and keys; `context` is the length that a `yarn` model was trained on, in tokens."""

    base: float = 10000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    context: int | None = None


class Turn(NamedTuple):
    """The cosine and the sine of every channel pair's angle, `[B, T, 1, D/2]` (or `[1, T, ...]`) each."""

    cos: Tensor
    sin: Tensor


def turn_to(positions: Tensor, D: int, rope: Rope, dtype: torch.dtype = torch.float32) -> Turn:
    """Return what turns heads of size D to `positions`, integers `[B, T]` or `[1, T]`; in `dtype`."""
    angle = positions.to(dtype)[..., None, None] * speeds(D, rope, positions.device, dtype)
    cos, sin = angle.cos(), angle.sin()
    size = amplitude(rope)
    return Turn(cos, sin) if size == 1 else Turn(size * cos, size * sin)


def turned(q: Tensor, k: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """Turn `q [B, T, H, D]` and `k [B, T, H_kv, D]`; results return in the inputs' dtype."""
    both = _turn(torch.cat([q, k], 2), *turn)  # at once, since a step's kernels are many and small
    q, k = both.split([q.shape[2], k.shape[2]], 2)
    return q, k


def speeds(D: int, rope: Rope, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The angle by which each channel pair turns a token, in radians, `[D/2]`."""
    pair = torch.arange(D // 2, device=device, dtype=dtype)
    base = rope.base
    if rope.scaling == "ntk" and D > 2:  # one pair turns by 1 whatever the base
        base = base * rope.factor ** (D / (D - 2))
    plain = base ** (-2 * pair / D)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "yarn":
        assert rope.context is not None
        first, last = math.floor(_pair_of(FAST, D, rope)), math.ceil(_pair_of(SLOW, D, rope))
        first, last = max(first, 0), min(last, D - 1)
        slowed = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
        return plain * (1 - slowed) + plain / rope.factor * slowed
    return plain


def _pair_of(turns: float, D: int, rope: Rope) -> float:
    """The place, not a whole number, of the pair that turns so often within the trained context."""
    assert rope.context is not None
    return D * math.log(rope.context / (2 * math.pi * turns)) / (2 * math.log(rope.base))


def amplitude(rope: Rope) -> float:
    """What cosine and sine are multiplied by: YaRN sharpens scores as the context grows (eq. 22 of its paper)."""
    return 0.1 * math.log(rope.factor) + 1 if rope.scaling == "yarn" else 1.0
