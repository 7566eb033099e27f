"""Mamba-2: its recurrence, its words and its costs. Splits and packs are tested over the whole registry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.mixers import SpecError, build_mixer
from hybridzoo.mixers.mamba2 import Mamba2

SMALL: dict[str, Any] = {"d_model": 12, "head_dim": 6, "state_dim": 5, "n_groups": 2}


def make(seed: int = 0, **words: Any) -> Mamba2:
    torch.manual_seed(seed)
    return Mamba2(**{**SMALL, **words}).double()


def inputs(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randn(B, T, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(m: Mamba2, x: Tensor) -> Tensor:
    """The state space recurrence of the paper, one token at a time: `h = exp(dt A) h + dt B x`, `y = C h + D x`."""
    c, T = m.config, x.shape[1]
    H, G, K = c.heads, c.n_groups, c.state_dim
    z, xBC, raw = m.in_proj(x).split([c.inner, c.inner + 2 * G * K, H], -1)
    padded = F.pad(xBC.mT, (c.conv_size - 1, 0))
    xBC = F.silu(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=padded.shape[1])).mT
    values, B, C = xBC.split([c.inner, G * K, G * K], -1)
    values = values.unflatten(-1, (H, -1))
    B, C = (p.unflatten(-1, (G, K)).repeat_interleave(H // G, 2) for p in (B, C))
    dt = F.softplus(raw + m.gates.dt_bias)
    A = torch.zeros(H) if m.gates.A_log is None else -m.gates.A_log.exp()
    A = A[..., None] if A.dim() == 1 else A
    h, rows = torch.zeros(x.shape[0], H, K, values.shape[-1], dtype=x.dtype), []
    for t in range(T):
        step = dt[:, t, :, None]
        h = (step * A).exp()[..., None] * h + torch.einsum("bhk,bhv->bhkv", step * B[:, t], values[:, t])
        rows.append(torch.einsum("bhk,bhkv->bhv", C[:, t], h) + m.D[:, None] * values[:, t])
    y = torch.stack(rows, 1).flatten(2) * F.silu(z)
    groups = (c.norm_groups or G, -1)
    y = F.rms_norm(y.unflatten(-1, groups), (c.inner // groups[0],), eps=c.norm_eps).flatten(-2) * m.norm.weight
    return m.out_proj(y)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("norm_groups", [None, 1])
def test_it_is_the_state_space_recurrence(decay: str, backend: str, norm_groups: int | None) -> None:
    m = make(decay=decay, backend=backend, norm_groups=norm_groups)
    torch.nn.init.normal_(m.norm.weight)
    torch.nn.init.normal_(m.D)
    x = inputs(2, 70)
    torch.testing.assert_close(m(x)[0], by_definition(m, x))


def test_a_channel_decay_with_equal_channels_is_the_scalar_one() -> None:
    scalar, channel, x = make(), make(decay="channel"), inputs(2, 9)
    weights = scalar.state_dict()
    weights["gates.A_log"] = weights["gates.A_log"][:, None].expand(-1, 5)
    channel.load_state_dict(weights)
    torch.testing.assert_close(channel(x)[0], scalar(x)[0])


@pytest.mark.parametrize("words", [{}, {"conv_size": 0}, {"decay": "channel"}])
def test_splits_and_packs_equal_one_call(words: dict[str, Any]) -> None:
    m, x = make(**words), inputs(1, 12)
    whole, last = m(x)
    state, pieces = m.init_state(1, dtype=torch.float64), []
    for piece in x.split([1, 0, 2, 9], 1):
        y, state = m(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)
    lengths = [4, 0, 1, 7]
    packed, state = m(x, cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]))
    alone = [m(piece)[0] for piece in x.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    assert state.length.tolist() == lengths


def test_the_step_size_stays_within_its_limits() -> None:
    m = make(dt_limit_min=0.02, dt_limit_max=0.03)
    dt = m.gates(torch.tensor([-50.0, 50.0]).repeat(2)[None, None].double())[1]
    torch.testing.assert_close(dt.flatten(), torch.tensor([0.02, 0.03] * 2, dtype=torch.float64))


def test_steps_and_rates_start_as_published() -> None:
    m = Mamba2(d_model=256, head_dim=1)
    dt, A = F.softplus(m.gates.dt_bias), m.gates.A_log.exp()
    assert 0.001 <= dt.min() < 0.0015
    assert 0.07 < dt.max() <= 0.1001
    assert 0.4 < (dt < 0.01).double().mean() < 0.6  # even in the logarithm
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16.001
    assert (m.D == 1).all()


def test_gates_stay_in_float32_when_the_input_is_narrow() -> None:
    m = Mamba2(**SMALL).bfloat16()
    log_decay, dt = m.gates(torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    assert log_decay.dtype == dt.dtype == torch.float32
    assert {name for name, _ in m.gates.named_parameters()} == {"A_log", "dt_bias"}
    assert m(inputs(1, 3).bfloat16())[0].dtype == torch.bfloat16


def test_b_may_start_as_c() -> None:
    m = make(qk_init="equal", conv_init="mean")
    _, _, b, c, _ = m.in_proj.weight.split([24, 24, 10, 10, 4])
    torch.testing.assert_close(b, c)
    torch.testing.assert_close(m.conv1d.weight[24:34], m.conv1d.weight[34:])


@pytest.mark.parametrize(
    ("words", "inner", "heads"),
    [
        ({"head_dim": 6}, 24, 4),
        ({"head_dim": None, "n_heads": 8}, 24, 8),
        ({"n_heads": 4, "head_dim": 2}, 8, 4),
        ({"expand": 1.5, "head_dim": 9}, 18, 2),
    ],
)
def test_two_of_expand_heads_and_head_size_give_the_third(words: dict[str, Any], inner: int, heads: int) -> None:
    config = make(**words).config
    assert (config.inner, config.heads) == (inner, heads)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"head_dim": 5}, r"head_dim: 5 does not divide the inner width 24"),
        ({"n_heads": 5, "head_dim": None}, r"n_heads: 5 does not divide the inner width 24"),
        ({"n_heads": 3, "head_dim": 4, "expand": 2.0}, r"3 heads of 4 are not expand 2 times d_model 12"),
        ({"n_groups": 3}, r"n_groups: 3 does not divide 4 heads"),
        ({"norm_groups": 5}, r"norm_groups: 5 does not divide 24"),
        ({"dt_min": 0.2}, r"dt_min: must be positive and at most dt_max 0.1, got 0.2"),
        ({"dt_limit_min": 1.0, "dt_limit_max": 0.5}, r"dt_limit_min"),
        ({"correct": "tied"}, r"correct: 'tied' is not one of none"),
        ({"decay": "chanel"}, r"did you mean 'channel'"),
    ],
)
def test_words_that_cannot_be_built_are_named(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(**words)


def test_costs_agree_with_a_count_by_hand() -> None:
    m = make()  # inner 24: 4 heads of 6; 2 groups of 5
    fixed = 2 * 12 * (24 + 24 + 10 + 10 + 4) + 2 * 4 * 44 + 2 * 24 + 2 * 24 * 12
    assert m.flops_per_token(100, decode=True) == fixed + 4 * 4 * 5 * 6
    assert m.flops_per_token(100) == fixed + 4 * (2 * 64 * (5 + 6) + 4 * 5 * 6)
    state = m.float()(inputs(1, 7).float())[1]
    leaves = torch.utils._pytree.tree_leaves(state)
    assert m.state_bytes(7, torch.float32) == sum(leaf.nbytes for leaf in leaves)
    assert m.kv_bytes(1000) == 0


def test_a_state_of_another_mixer_or_batch_is_refused() -> None:
    m, x = make(), inputs(2, 3)
    other = build_mixer("attention", d_model=12, n_heads=2).double()(x)[1]
    with pytest.raises(ValueError, match="expected a RecurrentState, got AttentionState"):
        m(x, other)
    with pytest.raises(ValueError, match=r"state.length must be \[N\] = \[1\], got \[2\]"):
        m(x[:1], m(x)[1])


def test_training_compiles_whole() -> None:
    m = make()
    x = inputs(2, 20).requires_grad_()
    plain, compiled = (
        torch.autograd.grad(run(x)[0].square().sum(), [x, *m.parameters()])
        for run in (m, torch.compile(m, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(compiled, plain)
