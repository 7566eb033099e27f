"""The loop learns, repeats itself exactly, and says where it broke."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from hybridzoo.architectures import Spec, build_model
from hybridzoo.mixers.schema import SpecError, convert
from hybridzoo.training import DivergedError, History, Progress, TrainConfig, train

CONFIG = TrainConfig(steps=60, batch_size=8, lr=3e-2, warmup=5, eval_every=20, log_every=7, device="cpu")


def run(model_class, task, config=CONFIG, seed=0, on_progress=None):
    torch.manual_seed(seed)
    model = model_class()
    return model, train(model, task, config, on_progress)


def test_training_learns_what_can_be_learned(tiny_model, counting_task):
    _, history = run(tiny_model, counting_task)
    assert history.loss[-1] < 0.2 * history.loss[0]
    assert history.metrics == {"accuracy": 1.0}


def test_two_runs_from_one_seed_are_equal_to_the_last_bit(tiny_model, counting_task):
    model_a, a = run(tiny_model, counting_task)
    torch.rand(3)  # the caller's own draws must not matter
    model_b, b = run(tiny_model, counting_task)
    assert a.loss == b.loss
    assert a.grad_norm == b.grad_norm
    assert a.evaluations == b.evaluations
    for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_data_seed_gives_another_run(tiny_model, counting_task):
    _, a = run(tiny_model, counting_task)
    _, b = run(tiny_model, counting_task, convert(TrainConfig, {"steps": 60, "seed": 1, "device": "cpu"}, "train"))
    assert a.loss[0] != b.loss[0]


def test_training_leaves_the_global_random_state_alone(tiny_model, counting_task):
    model = tiny_model()
    before = torch.get_rng_state()
    train(model, counting_task, CONFIG)
    assert torch.equal(before, torch.get_rng_state())


def test_points_fall_on_log_steps_and_on_evaluations(tiny_model, counting_task):
    seen: list[Progress] = []
    _, history = run(tiny_model, counting_task, on_progress=seen.append)
    assert history.steps == [7, 14, 20, 21, 28, 35, 40, 42, 49, 56, 60]
    assert [e.step for e in history.evaluations] == [20, 40, 60]
    assert [p.step for p in seen] == history.steps
    assert counting_task.quick_calls == [True, True, False, True]  # the score is the full one, the curve's end is not


def test_a_curve_is_of_the_same_held_out_data_throughout(tiny_model, counting_task, monkeypatch):
    size = {True: 0.0, False: 100.0}
    monkeypatch.setattr(counting_task, "evaluate", lambda model, device, quick=False: {"accuracy": size[quick]})
    _, history = run(tiny_model, counting_task)
    assert history.metrics == {"accuracy": 100.0}
    assert history.curve("accuracy") == ([20, 40, 60], [0.0, 0.0, 0.0])
    _, history = run(tiny_model, counting_task, dataclasses.replace(CONFIG, eval_every=0))
    assert history.curve("accuracy") == ([60], [100.0])
    assert not history.quick_at_end


def test_tokens_are_all_counted_and_timed(tiny_model, counting_task):
    _, history = run(tiny_model, counting_task)
    assert history.tokens == 60 * 8 * 12
    assert history.seconds > 0
    assert history.tokens_per_second == pytest.approx(history.tokens / history.seconds)


def test_the_loss_of_a_point_is_the_mean_since_the_point_before(tiny_model, counting_task):
    every = TrainConfig(steps=10, lr=1e-2, log_every=1, device="cpu")
    grouped = TrainConfig(steps=10, lr=1e-2, log_every=5, device="cpu")
    _, a = run(tiny_model, counting_task, every)
    _, b = run(tiny_model, counting_task, grouped)
    assert b.loss == pytest.approx([sum(a.loss[:5]) / 5, sum(a.loss[5:]) / 5], rel=1e-6)


@pytest.mark.parametrize("log_every", [1, 4, 50])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny_model, counting_task, log_every):
    class Breaks(tiny_model):
        calls = 0

        def forward(self, ids, labels=None):
            out = super().forward(ids, labels)
            if self.training:
                type(self).calls += 1
                if self.calls >= 11:
                    out.loss = out.loss * float("nan")
            return out

    Breaks.calls = 0
    config = TrainConfig(steps=50, log_every=log_every, device="cpu")
    with pytest.raises(DivergedError, match=r"step 11 of 50: the loss is nan \(learning rate") as caught:
        train(Breaks(), counting_task, config)
    assert caught.value.step == 11


def test_a_gradient_that_is_not_finite_is_named_before_it_shows_in_the_loss(tiny_model, counting_task):
    class Breaks(tiny_model):
        def forward(self, ids, labels=None):
            out = super().forward(ids, labels)
            if labels is not None:  # sqrt has an infinite slope at 0, and a finite value
                out.loss = out.loss + (self.A_log * 0).abs().sum().sqrt()
            return out

    with pytest.raises(DivergedError, match="step 1 of 50: the norm of the gradient is nan"):
        train(Breaks(), counting_task, TrainConfig(steps=50, device="cpu"))


def test_bf16_autocast_runs_on_the_cpu_and_leaves_float32_weights(tiny_model, counting_task):
    config = TrainConfig(steps=20, lr=3e-2, amp="bf16", device="cpu")
    model, history = run(tiny_model, counting_task, config)
    assert history.loss[-1] < history.loss[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_model_keeps_training_mode_after_evaluations(tiny_model, counting_task):
    model, _ = run(tiny_model, counting_task)
    assert model.training


def test_a_history_survives_plain_data(tiny_model, counting_task):
    _, history = run(tiny_model, counting_task)
    assert History.from_dict(history.to_dict()) == history
    assert history.curve("accuracy")[0] == [20, 40, 60]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"steps": 0}, "train.steps: must be at least 1, got 0"),
        ({"lr": 0}, "train.lr: must be a finite number above 0"),
        ({"lr": float("inf")}, "train.lr: must be a finite number above 0"),
        ({"seed": 2**63}, "train.seed: must be at most 9,223"),
        ({"betas": [0.9, 1.0]}, "train.betas: each must be in"),
        ({"betas": [0.9]}, "train.betas: expected 2 values"),
        ({"warmpu": 3}, r"unknown key 'warmpu'.*did you mean 'warmup'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"device": "gpu0"}, "train.device: 'gpu0' is not auto, cpu, cuda"),
        ({"steps": "many"}, "train.steps: expected integer, got 'many'"),
    ],
)
def test_a_config_that_cannot_train_is_refused_by_key(words, message):
    with pytest.raises(SpecError, match=message):
        convert(TrainConfig, words, "train")


def test_a_gpu_of_a_number_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match=r"train.device: 'cuda:2' is asked for, but torch sees only cuda:0, cuda:1"):
        TrainConfig(device="cuda:2").resolve_device()
    assert TrainConfig(device="cuda:1").resolve_device() == torch.device("cuda:1")
    assert TrainConfig(device="cuda").resolve_device() == torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_a_gpu_that_is_not_there_is_named_when_training_starts(tiny_model, counting_task):
    with pytest.raises(SpecError, match="'cuda' is asked for, but torch sees no GPU here"):
        train(tiny_model(), counting_task, TrainConfig(device="cuda"))


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_compiled_step_makes_the_loss_alone_and_trains_as_the_plain_one_does(counting_task, monkeypatch, amp):
    """Logits and states that a compiled step returned would be held, and their gradients made of zeros."""
    data = {
        "name": "small",
        "d_model": 16,
        "vocab_size": counting_task.vocab_size,
        "mixers": {"a": {"type": "attention", "n_heads": 2}, "c": {"type": "carve", "n_heads": 2, "head_dim": 8}},
        "layers": "c a",
    }

    def small():
        return build_model(Spec.from_dict(data))

    returned = []

    def backend(graph, inputs):
        (outputs,) = graph.graph.output_node().args
        returned.append([tuple(output.meta["example_value"].shape) for output in outputs])
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # At the longer steps what bfloat16 rounds makes two thirds of a gradient within three of them.
    lr = 1e-2 if amp == "none" else 1e-4
    plain = TrainConfig(steps=4, batch_size=4, lr=lr, log_every=1, amp=amp, device="cpu", compile=False)
    _, expected = run(small, counting_task, plain)
    assert not returned
    _, found = run(small, counting_task, dataclasses.replace(plain, compile=True))
    assert returned == [[()]]
    assert found.loss == pytest.approx(expected.loss, rel=1e-5 if amp == "none" else 2e-2)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4 if amp == "none" else 5e-2)
