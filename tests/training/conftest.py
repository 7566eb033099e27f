"""A model and a task small enough that a whole training run takes milliseconds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridzoo.training import Batch


class TinyModel(nn.Module):
    """Predicts the next token from the current one; speaks the same calls as HybridLM."""

    def __init__(self, vocab_size: int = 8, d_model: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)
        self.A_log = nn.Parameter(torch.zeros(2, 2))  # a gate's rate that is a matrix

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.norm(self.embed(ids))) + self.A_log.sum()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class CountingTask:
    """Sequences that count upwards modulo the vocabulary; the score is the share of right next tokens."""

    vocab_size = 8
    metric = "accuracy"
    maximise = True

    def __init__(self) -> None:
        self.quick_calls: list[bool] = []

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        start = torch.randint(self.vocab_size, (batch_size, 1), generator=generator)
        ids = (start + torch.arange(12)) % self.vocab_size
        return Batch(ids, ids)

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.quick_calls.append(quick)
        ids = torch.arange(self.vocab_size, device=device)[None]
        hits = model(ids).logits.argmax(-1) == (ids + 1) % self.vocab_size
        return {"accuracy": hits.float().mean().item()}


@pytest.fixture
def tiny_model() -> type[TinyModel]:
    return TinyModel


@pytest.fixture
def counting_task() -> CountingTask:
    return CountingTask()
