"""Copying a string (arXiv 2402.01032): trained on short ones, tested on longer ones.

A string of random tokens, a separator, and the string again. What it takes is to find the place reached in the string,
at any distance, which a state of fixed size can do only for strings that it can hold. May import training.

Shapes: B batch, T time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import (
    BLANK,
    AnswerTask,
    TokensConfig,
    at_least,
    of_runs,
    of_tokens,
    token_ids,
)
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import IGNORED, Batch

COPY = 1  # the separator: say it again


@dataclass(frozen=True, kw_only=True)
class CopyConfig(TokensConfig):
    """The knobs of difficulty, beside those of `TokensConfig`, whose length is that of the string.

    Training draws each string's length from `shortest` to `length`, as in the paper; scores are on strings of exactly
    `length` and of the levels.
    """

    length: int = 32
    shortest: int = 1
    tokens: int = 26

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "shortest")
        if self.shortest > self.length:
            raise SpecError(f".shortest: must be at most length = {self.length}, got {self.shortest}")


class CopyingTask(AnswerTask):
    """What tasks share that ask for tokens again, in order. Tokens are `BLANK`, one mark, then `tokens` to copy.

    Scores: `accuracy` of the tokens asked for, `exact` of sequences right in all of them.
    """

    config: TokensConfig

    @property
    def answers(self) -> range:
        return range(2, 2 + self.config.tokens)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        return {"accuracy": of_tokens(batch, right), "exact": of_runs(batch, right)}


@register_task("copy")
class Copy(CopyingTask):
    """The task: the mark is `COPY`, after the string, and the copy is scored."""

    Config = CopyConfig
    config: CopyConfig
    level_axis: ClassVar[str] = "tokens to copy"

    @property
    def label(self) -> str:
        return f"tokens of {self.config.length} copied right"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Copying: a string of {config.length} tokens from {config.tokens}, a separator, and the string again; "
            f"training has strings of {config.shortest} to {config.length}. The score is the share of right tokens."
        )

    def length_of(self, level: int) -> int:
        return 2 * level + 1

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        return self._drawn(level, torch.full((count,), level), generator)

    def sample_training(self, level: int, count: int, generator: torch.Generator) -> Batch:
        shortest = min(self.config.shortest, level)
        lengths = torch.randint(shortest, level + 1, (count,), generator=generator)
        return self._drawn(level, lengths, generator)

    def _drawn(self, longest: int, lengths: Tensor, generator: torch.Generator) -> Batch:
        """Draw strings of `lengths [B]`, in sequences long enough for `longest`; blank after the copy."""
        count = len(lengths)
        string = token_ids(2, self.config.tokens, (count, longest), generator)
        string[torch.arange(longest) >= lengths[:, None]] = BLANK
        ids = torch.full((count, self.length_of(longest)), BLANK)
        ids[:, :longest] = string
        ids.scatter_(1, lengths[:, None] + 1 + torch.arange(longest), string)
        ids.scatter_(1, lengths[:, None], COPY)
        place = torch.arange(ids.shape[1])
        copied = (place > lengths[:, None]) & (place <= 2 * lengths[:, None])
        return Batch(ids, ids.masked_fill(~copied, IGNORED))
