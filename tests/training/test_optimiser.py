"""Which parameters decay, and the learning rate at every step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hybridzoo.training import TrainConfig, build_optimiser, learning_rate
from hybridzoo.training.optimiser import set_learning_rate


def test_matrices_decay_and_norms_biases_and_gate_rates_do_not(tiny_model):
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = build_optimiser(model, TrainConfig(weight_decay=0.3)).param_groups
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "head.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"norm.weight", "norm.bias", "head.bias", "A_log"}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


def test_a_parameter_marked_as_mamba_marks_its_own_does_not_decay():
    model = nn.Linear(2, 2)
    model.weight._no_weight_decay = True
    assert [group["weight_decay"] for group in build_optimiser(model, TrainConfig()).param_groups] == [0.0]


def test_frozen_parameters_are_left_out_and_a_model_without_any_is_refused():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(g["params"]) for g in build_optimiser(model, TrainConfig()).param_groups) == 1
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimiser(model, TrainConfig())


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    final=st.floats(0, 1),
)
def test_the_rate_rises_to_its_peak_then_never_rises_again(steps, warmup, schedule, final):
    config = TrainConfig(steps=steps, warmup=warmup, schedule=schedule, final_lr=final, lr=0.5)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert all(0 <= rate <= 0.5 + 1e-12 for rate in rates)
    peak = max(min(warmup, steps // 2) - 1, 0)
    assert rates[peak] == 0.5
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[peak:]))
    assert rates[0] > 0


@pytest.mark.parametrize("steps", [100, 145])
def test_a_warmup_that_fits_is_as_long_as_asked(steps):
    config = TrainConfig(steps=steps, warmup=20, lr=1.0)
    assert [learning_rate(step, config) for step in range(21)] == [*[(step + 1) / 20 for step in range(20)], 1.0]


def test_the_schedules_end_at_the_final_rate():
    for schedule in ("cosine", "linear"):
        config = TrainConfig(steps=100, warmup=10, schedule=schedule, final_lr=0.1, lr=1.0)
        assert learning_rate(10, config) == pytest.approx(1.0)
        assert learning_rate(99, config) == pytest.approx(0.1, abs=0.02)


def test_one_clipped_step_moves_no_further_than_the_clip_allows(tiny_model, counting_task):
    # With Adam the size of a step hides the clip; what it bounds is the gradient itself.
    model = tiny_model()
    batch = counting_task.batch(0, 4, torch.Generator().manual_seed(0))
    (model(batch.ids, labels=batch.labels).loss * 1e4).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert total <= 1.0 + 1e-4


def test_a_rate_that_a_captured_step_reads_is_changed_where_it_lies(tiny_model):
    optimiser = build_optimiser(tiny_model(), TrainConfig(lr=0.5), capturable=True)
    rates = [group["lr"] for group in optimiser.param_groups]
    set_learning_rate(optimiser, 0.25)
    assert all(group["lr"] is rate for group, rate in zip(optimiser.param_groups, rates, strict=True))
    assert [float(rate) for rate in rates] == [0.25, 0.25]
