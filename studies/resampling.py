"""Resampling over seeds: what a number made of several stacks' means could have been with other seeds.

One draw moves all stacks together, so pairs by seed stay pairs. May import nothing of hybridzoo. Source of the
weighting: the multiplier bootstrap (van der Vaart and Wellner, Weak Convergence, 2.9), its normal multipliers made
Student's.

Shapes: K stacks, S seeds, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 4000


def draw_means(scores: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Draw means `[R, K]` of `scores [K][S]`, around the measured ones and as uncertain as these are.

    Value j of every stack is of the same seed. Each draw adds the seeds' residuals with random weights to the means:
    normal ones, divided by the root of a chi-square over its S - 1 degrees of freedom. The draws of the difference of
    two stacks are then distributed exactly as its paired Student's t interval says, at any S; drawing seeds with
    replacement, the usual bootstrap, is too narrow by sqrt((S - 1) / S) and knows ten different draws at S = 3.

    Raises: `ValueError` below two seeds, or where stacks have different numbers of them.
    """
    if not scores or len({len(values) for values in scores}) != 1 or len(scores[0]) < 2:
        raise ValueError(f"need two seeds or more of every stack, got {[len(values) for values in scores]}")
    values = torch.tensor([list(row) for row in scores], dtype=torch.float64)
    means = values.mean(1, keepdim=True)
    freedom = values.shape[1] - 1
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(draws, width, generator=generator, dtype=torch.float64)

    chi = (normal(freedom).square().sum(1, keepdim=True) / freedom).sqrt()
    weights = normal(freedom + 1) / chi / math.sqrt((freedom + 1) * freedom)
    return means[:, 0] + weights @ (values - means).T


def percentiles(draws: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Return the draws' quantiles that leave half of `1 - confidence` on either side."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
