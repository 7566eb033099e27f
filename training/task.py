"""What a training task is: batches to learn from, and a score that says how well.

May import nothing of hybridzoo. The tasks themselves live in studies/tasks; loop.py trains on any of them.

Shapes: B batch, T time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

IGNORED = -100  # a label that is not scored, as in torch's cross_entropy


class Batch(NamedTuple):
    """One step's sequences. The model shifts: position t is scored on `labels[:, t + 1]`, unless it is `IGNORED`."""

    ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]


class Task(Protocol):
    """What `train` needs of a task. `vocab_size` is the model's; `metric` names the score that ranks models."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def metric(self) -> str: ...

    @property
    def maximise(self) -> bool: ...

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw the batch of `step` (from 0); all randomness comes from `generator`, a CPU generator.

        A task that begins with shorter sequences may draw more of them, to keep the tokens of a step alike.
        """
        ...

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        """Score `model(ids).logits` on held-out sequences, the same ones on every call; `metric` is among the keys.

        `quick` asks for a smaller set, for the curve on the way.
        """
        ...
