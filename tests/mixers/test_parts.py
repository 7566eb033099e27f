"""The modules mixers share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridzoo.mixers.parts import GatedRMSNorm, LowRank, RMSNorm, ShortConvolution

PARTS = {
    "short convolution": lambda: ShortConvolution(6, bias=True),
    "rms norm": lambda: RMSNorm(6),
    "gated rms norm": lambda: GatedRMSNorm(6),
    "low rank": lambda: LowRank(6, 2, 5, bias=True),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_built_on_meta_becomes_usable_by_reset_parameters(part: str) -> None:
    with torch.device("meta"):
        module = PARTS[part]()
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_convolution_takes_the_weights_of_a_depthwise_conv1d() -> None:
    theirs = nn.Conv1d(6, 6, 4, groups=6, padding=3)
    ours = ShortConvolution(6, 4, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 6)
    y, tail = ours(x)
    torch.testing.assert_close(y, F.silu(theirs(x.mT)[..., :9]).mT)
    torch.testing.assert_close(ours(x[:, :1], ours.init_tail(2)).y, y[:, :1])
    assert tail.shape == ours.init_tail(2).shape


def test_the_convolution_starts_as_conv1d_does_or_near_a_running_mean() -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(1000, 4, bias=True)
    theirs = nn.Conv1d(1000, 1000, 4, groups=1000).weight
    assert conv.weight.abs().max() <= 0.5
    assert abs(conv.weight.std() / theirs.std() - 1) < 0.05
    conv.reset_parameters("mean")
    assert abs(conv.weight.mean() - 0.25) < 1e-3
    assert 0.02 < conv.weight.std() < 0.03
    assert (conv.bias == 0).all()
    with pytest.raises(ValueError, match="'default' or 'mean', got 'median'"):
        conv.reset_parameters("median")  # type: ignore[arg-type]


def test_a_grouped_norm_is_the_norm_of_each_group() -> None:
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    whole = GatedRMSNorm(8, norm_before_gate=False, group_size=4)
    nn.init.normal_(whole.weight)
    for group in (slice(0, 4), slice(4, 8)):
        one = GatedRMSNorm(4, norm_before_gate=False)
        one.weight = nn.Parameter(whole.weight[group])
        torch.testing.assert_close(whole(x, gate)[..., group], one(x[..., group], gate[..., group]))


def test_low_rank_maps_are_named_as_a_sequential_and_biased_once() -> None:
    assert set(LowRank(6, 2, 5, bias=True).state_dict()) == {"0.weight", "1.weight", "1.bias"}
    assert set(LowRank(6, 2, 5).state_dict()) == {"0.weight", "1.weight"}


def test_sizes_and_activations_that_cannot_be_built_are_named() -> None:
    with pytest.raises(ValueError, match="group_size 3 does not divide dim 8"):
        GatedRMSNorm(8, group_size=3)
    with pytest.raises(ValueError, match="'silu' or 'sigmoid', got 'relu'"):
        GatedRMSNorm(8, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 4 and 0"):
        ShortConvolution(4, 0)
