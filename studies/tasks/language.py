"""Language modelling: every token of a window but its first is scored, given those before it there.

byte_lm.py reads the bytes of a folder's files, token_lm.py files of token numbers; what they share is here. May import
training.

Shapes: B batch, T time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import TOKENS_AT_ONCE
from hybridzoo.studies.tasks.base import StudyTask
from hybridzoo.training import Batch


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The windows cut from a text: `length` tokens each.

    `examples` windows, spread evenly over the validation text, make the final score and `quick_examples` the points on
    the way.
    """

    length: int = 256
    examples: int = 256
    quick_examples: int = 32

    def __post_init__(self) -> None:
        if self.length < 2:
            raise SpecError(f".length: a window needs at least 2 tokens, got {self.length}")
        for name in ("examples", "quick_examples"):
            if getattr(self, name) < 1:
                raise SpecError(f".{name}: must be at least 1, got {getattr(self, name)}")


class LanguageTask(StudyTask):
    """What tasks on a text share. Subclasses say `metric_name`, how many of its `unit`s a nat has, and give `parts`.

    Scores: the mean of all, and `metric_name@N`, for N each power of two, of those that N tokens or more stand before,
    and fewer than 2 N: whether a stack makes use of what is far back.
    """

    metric_name: ClassVar[str]
    a_nat: ClassVar[float] = 1.0
    config: LanguageConfig

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The text to train on and that to validate on, whole numbers `[T]` each."""
        raise NotImplementedError(f"{self.__class__.__name__} has no text")

    @property
    def longest(self) -> int:
        return self.config.length

    @property
    def levels(self) -> tuple[tuple[int, str], ...]:
        """For `Shown`: where each bucket of positions starts, in the tokens before, and its score's name."""
        return tuple((start, f"{self.metric_name}@{start}") for start in self._buckets)

    @property
    def _buckets(self) -> list[int]:
        """1, 2, 4, ..., the last cut short."""
        return [2**i for i in range((self.config.length - 1).bit_length())]

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        text = self.parts[0]
        starts = torch.randint(text.numel() - self.config.length + 1, (batch_size,), generator=generator)
        ids = self.windows(text, starts)
        return Batch(ids, ids)

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        text = self.parts[1]
        count = self.config.quick_examples if quick else self.config.examples
        starts = torch.linspace(0, text.numel() - self.config.length, count, dtype=torch.float64).long()
        nats = torch.zeros(self.config.length - 1, dtype=torch.float64)  # by the tokens before, from 1
        for chunk in starts.split(min(32, max(1, TOKENS_AT_ONCE // self.config.length))):
            ids = self.windows(text, chunk).to(device)
            logits = model(ids).logits[:, :-1].float()
            lost = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            nats += lost.view(len(ids), -1).sum(0).double().cpu()
        mean = self.a_nat * nats / count
        scores = {self.metric_name: mean.mean().item()}
        if not quick:
            scores |= {f"{self.metric_name}@{n}": mean[n - 1 : 2 * n - 1].mean().item() for n in self._buckets}
        return scores

    def windows(self, text: Tensor, starts: Tensor) -> Tensor:
        """Return the windows of `text [T]` from `starts [B]` on, int64 `[B, length]`."""
        return text[starts[:, None] + torch.arange(self.config.length)].long()


A_BIT = 1 / math.log(2)  # bits in a nat
