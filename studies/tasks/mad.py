"""Selective copying, compression and memorisation (MAD, arXiv 2403.17844); its two recalls are in mad_recall.py.

docs/tasks.md says where a task differs from MAD's. May import training.

Shapes: B batch, T time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import (
    BLANK,
    AnswerConfig,
    AnswerTask,
    TokensConfig,
    at_least,
    blank_labels,
    permuted,
    token_ids,
)
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.studies.tasks.copying import CopyingTask
from hybridzoo.training import Batch

INSERT = 1  # where an answer belongs, or (compression) where the sequence ends that is to be compressed


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyConfig(TokensConfig):
    """The knobs of difficulty, beside those of `TokensConfig`, whose length is that of the noisy stretch.

    `items` of its positions hold one of `tokens` tokens, the rest are blank.
    """

    length: int = 64
    items: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "items")
        self.check_least(self.items, "the items take")


@register_task("selective_copy")
class SelectiveCopy(CopyingTask):
    """Say the items of a blank-ridden stretch in their order.

    The mark is `INSERT`, and stands where answers are asked for, so that none shows the one before.
    """

    Config = SelectiveCopyConfig
    config: SelectiveCopyConfig
    level_axis: ClassVar[str] = "positions that the items stand among"

    @property
    def label(self) -> str:
        return f"items of {self.config.items} copied right"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Selective copying after MAD: {config.items} tokens, of {config.tokens}, at random places among "
            f"{config.length} positions that are blank otherwise, then asked for in order."
        )

    def length_of(self, level: int) -> int:
        return level + self.config.items + 1

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        config = self.config
        items = token_ids(2, config.tokens, (count, config.items), generator)
        places = permuted(count, level, generator, config.items).sort(1).values
        ids = torch.full((count, self.length_of(level)), BLANK)
        ids.scatter_(1, places, items)
        ids[:, level:] = INSERT
        labels = blank_labels(*ids.shape)
        labels[:, level + 1 :] = items  # the model scores position t on label t + 1
        return Batch(ids, labels)


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(TokensConfig):
    """The knobs of difficulty: those of `TokensConfig`, whose length is that of the sequence to be compressed."""

    length: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels and max(self.levels) > self.length:
            raise SpecError(
                f".levels: at most length = {self.length}, since training never asks for later positions, got "
                f"{max(self.levels)}"
            )


@register_task("compression")
class Compression(AnswerTask):
    """Give back any position of a random sequence. Tokens: `BLANK`, `INSERT`, `length` positions, `tokens` of content.

    Each position is asked for once, in random order, by a token of its own.
    """

    Config = CompressionConfig
    config: CompressionConfig
    level_axis: ClassVar[str] = "tokens to compress"

    @property
    def answers(self) -> range:
        first = 2 + self.config.length
        return range(first, first + self.config.tokens)

    @property
    def label(self) -> str:
        return f"tokens of {self.config.length} given back right"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Compression after MAD: {config.length} random tokens, of {config.tokens}, then each position asked for "
            "by its number, in random order. Attention may look back instead of compressing."
        )

    def length_of(self, level: int) -> int:
        return 2 * level + 2

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        content = token_ids(2 + self.config.length, self.config.tokens, (count, level), generator)
        asked = permuted(count, level, generator)
        ids = torch.full((count, self.length_of(level)), BLANK)
        ids[:, :level] = content
        ids[:, level] = INSERT
        ids[:, level + 1 : -1] = 2 + asked
        labels = blank_labels(*ids.shape)
        labels[:, level + 2 :] = content.gather(1, asked)  # the model scores position t on label t + 1
        return Batch(ids, labels)


@dataclass(frozen=True, kw_only=True)
class MemorisationConfig(AnswerConfig):
    """`keys` facts, each a key with one of `values` values that `data_seed` fixes; `length` keys a sequence."""

    knob: ClassVar[str] = "length"

    keys: int = 256
    values: int = 32
    length: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "keys", "values", "length")


@register_task("memorisation")
class Memorisation(AnswerTask):
    """Say the value of a key, which no sequence shows. Tokens are `BLANK`, then `keys` keys, then `values` values.

    The facts are the same in every sequence, trained on or scored, so what is scored is what the weights hold.
    """

    Config = MemorisationConfig
    config: MemorisationConfig

    @property
    def answers(self) -> range:
        first = 1 + self.config.keys
        return range(first, first + self.config.values)

    @functools.cached_property
    def facts(self) -> Tensor:
        """The value token of each key, int64 `[keys]`."""
        generator = torch.Generator().manual_seed(self.config.data_seed)
        return token_ids(1 + self.config.keys, self.config.values, (self.config.keys,), generator)

    @property
    def label(self) -> str:
        return f"facts of {self.config.keys} known"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Memorisation after MAD: {config.keys} keys, each with one of {config.values} values that is the same in "
            f"every sequence and shown in none, asked for {config.length} at a time. The labels of training are all "
            "there is to learn it from."
        )

    def length_of(self, level: int) -> int:
        return 2 * level

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        keys = token_ids(0, self.config.keys, (count, level), generator)
        ids = torch.full((count, 2 * level), BLANK)
        ids[:, ::2] = 1 + keys
        labels = blank_labels(*ids.shape)
        labels[:, 1::2] = self.facts[keys]  # the blank after a key is where its value would stand
        return Batch(ids, labels)
