"""On a GPU, a training whose steps are replayed as CUDA graphs is the training without them."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from hybridzoo.architectures import Spec, build_model
from hybridzoo.training import Batch, Checkpoint, TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Calm enough that rounding does not grow: at a rate of 2e-2 one part in 10^7 became a sixth of the loss in 60 steps. A
# graph reads its rate as float32, and with these words a change of that size moves losses by 6e-6 and norms by 4e-4.
CONFIG = TrainConfig(
    steps=40, batch_size=16, lr=5e-3, eps=1e-4, warmup=4, log_every=1, amp="none", compile=False, seed=3
)


class TwoLengths:
    """Repeats of a word of four tokens, short ones for ten steps and then long ones."""

    vocab_size = 16
    metric = "loss"
    maximise = False

    def batch(self, step, batch_size, generator):
        word = torch.randint(self.vocab_size, (batch_size, 4), generator=generator)
        ids = word.repeat(1, 8 if step < 10 else 16)
        return Batch(ids, ids)

    def evaluate(self, model, device, quick=False):
        batch = self.batch(0, 8, torch.Generator().manual_seed(9))
        ids = batch.ids.to(device)
        return {"loss": model(ids, labels=ids).loss.item()}


def history(config, layers, task=None, checkpoint=None):
    spec = {
        "name": "graphed",
        "d_model": 32,
        "vocab_size": 16,
        "mixers": {
            "a": {"type": "attention", "n_heads": 2},
            "c": {"type": "carve", "n_heads": 2, "head_dim": 16, "content_chunk": 16, "content_rank": 4},
            "g": {"type": "gdn2", "n_heads": 2, "head_dim": 16},
        },
        "layers": layers,
        "ffn": {"type": "swiglu", "width": 32},
    }
    torch.manual_seed(0)
    return train(build_model(Spec.from_dict(spec, "graphed")), task or TwoLengths(), config, checkpoint=checkpoint)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one_replays_the_same_training():
    with torch.cuda.device(0):
        plain = history(dataclasses.replace(CONFIG, device="cuda:1"), "a g")
        graphed = history(dataclasses.replace(CONFIG, device="cuda:1", graph=True), "a g")
    assert graphed.device == "cuda:1"
    assert graphed.loss == pytest.approx(plain.loss, rel=1e-3)


@pytest.mark.parametrize("layers", ("a g", "c a"))
def test_a_replayed_training_is_the_same_training(layers):
    plain = history(CONFIG, layers)
    graphed = history(dataclasses.replace(CONFIG, graph=True), layers)
    assert plain.loss[-1] < 0.9 * plain.loss[0]
    assert graphed.loss == pytest.approx(plain.loss, rel=1e-3)
    assert graphed.grad_norm == pytest.approx(plain.grad_norm, rel=2e-2)
    assert graphed.lr == plain.lr
    assert graphed.tokens == plain.tokens
    assert graphed.metrics == pytest.approx(plain.metrics, rel=1e-3)


def test_in_bfloat16_it_learns_too():
    graphed = history(dataclasses.replace(CONFIG, graph=True, amp="bf16"), "c a")
    assert graphed.loss[-1] < 0.9 * graphed.loss[0]


class Stopped(TwoLengths):
    """Has the process told to stop while the batch of step 17 is drawn."""

    def batch(self, step, batch_size, generator):
        if step == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(step, batch_size, generator)


def test_a_replayed_training_that_was_stopped_goes_on_to_the_same_end(tmp_path):
    config = dataclasses.replace(CONFIG, graph=True, device="cuda")
    whole = history(config, "c a")
    path = tmp_path / "unfinished.pt"
    with pytest.raises(KeyboardInterrupt):
        history(config, "c a", Stopped(), Checkpoint(path, config))
    checkpoint = Checkpoint(path, config)
    assert checkpoint.step == 18
    resumed = history(config, "c a", checkpoint=checkpoint)
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-4)
