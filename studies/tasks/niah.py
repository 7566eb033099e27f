"""Needles in a haystack, in the manner of RULER (arXiv 2404.06654): one fact, far away, among many tokens.

The four variants are RULER's S-NIAH-1, -2, -3 and MK-NIAH-1 with tokens in place of words, so that a small model can be
trained on short sequences and tested on long ones. May import training.

Shapes: B batch, T time, n needles, v tokens of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import (
    AnswerTask,
    LengthConfig,
    at_least,
    blank_labels,
    of_runs,
    of_tokens,
    permuted,
    token_ids,
)
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import Batch

NEEDLE, QUESTION = 0, 1  # "the number of ... is ...", and "what is the number of ...?"


@dataclass(frozen=True)
class _Variant:
    haystack: Literal["noise", "text"]
    value_tokens: int
    distractors: int
    rulers: str  # RULER's name


_VARIANTS = {
    "single_1": _Variant("noise", 2, 0, "S-NIAH-1"),
    "single_2": _Variant("text", 2, 0, "S-NIAH-2"),
    "single_3": _Variant("text", 8, 0, "S-NIAH-3"),
    "multikey_1": _Variant("text", 2, 3, "MK-NIAH-1"),
}


@dataclass(frozen=True, kw_only=True)
class NiahConfig(LengthConfig):
    """The knobs of difficulty, beside those of `LengthConfig`, whose length is the whole sequence.

    `variant` decides the haystack, the tokens of a value and the needles of other keys, unless `haystack`,
    `value_tokens` and `distractors` say otherwise. A `noise` haystack says its `words` tokens over and over in one
    order; a `text` one draws them by Zipf's law. Keys are one of `keys` tokens, a value's tokens each one of `values`.
    """

    variant: Literal["single_1", "single_2", "single_3", "multikey_1"] = "single_1"
    length: int = 128
    keys: int = 64
    values: int = 16
    words: int = 64
    haystack: Literal["noise", "text"] | None = None
    value_tokens: int | None = None
    distractors: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "keys", "values", "words")
        if self.value_tokens is not None:
            at_least(self, 1, "value_tokens")
        if self.distractors is not None:
            at_least(self, 0, "distractors")
        made = self.made
        if made.distractors >= self.keys:
            raise SpecError(
                f".keys: the asked key and {made.distractors} distractors need as many distinct keys, got {self.keys}"
            )
        least = (made.distractors + 2) * (2 + made.value_tokens)
        values = f"values of {made.value_tokens} tokens"
        self.check_least(least, f"{made.distractors + 1} needles and the question, with {values}, take")

    @property
    def made(self) -> _Variant:
        """The variant, with what the other words say instead."""
        variant = _VARIANTS[self.variant]
        return _Variant(
            self.haystack or variant.haystack,
            variant.value_tokens if self.value_tokens is None else self.value_tokens,
            variant.distractors if self.distractors is None else self.distractors,
            variant.rulers,
        )


@register_task("niah")
class Niah(AnswerTask):
    """The task. Tokens are `NEEDLE`, `QUESTION`, `keys` keys, `values` value tokens, then `words` of the haystack.

    Scores: `accuracy` of values right in all their tokens, `token_accuracy` of their tokens.
    """

    Config = NiahConfig
    config: NiahConfig
    level_axis: ClassVar[str] = "tokens in the sequence"

    @property
    def vocab_size(self) -> int:
        return self.answers.stop + self.config.words

    @property
    def answers(self) -> range:
        first = 2 + self.config.keys
        return range(first, first + self.config.values)

    @property
    def chance(self) -> float:
        return float(self.config.values) ** -self.config.made.value_tokens

    @property
    def label(self) -> str:
        return f"values found in {self.config.length} tokens"

    @property
    def about(self) -> str:
        config, made = self.config, self.config.made
        needles = "One needle" if not made.distractors else f"{made.distractors + 1} needles of different keys"
        hay = "of one phrase repeated" if made.haystack == "noise" else "of varied tokens"
        return (
            f"Needle retrieval after RULER's {made.rulers}: {needles} anywhere in a haystack {hay}, {config.length} "
            f"tokens in all, then the key of one, whose value of {made.value_tokens} tokens (of {config.values} each) "
            "is right only as a whole."
        )

    def length_of(self, level: int) -> int:
        return level

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        config, made = self.config, self.config.made
        needles, width = made.distractors + 1, 2 + made.value_tokens
        hay = level - width  # where needles may stand; the question follows
        ids = torch.empty(count, level, dtype=torch.int64)
        ids[:, :hay] = self._haystack(count, hay, generator)

        keys = 2 + permuted(count, config.keys, generator, needles)
        values = token_ids(2 + config.keys, config.values, (count, needles, made.value_tokens), generator)
        mark = torch.full((count, needles, 1), NEEDLE)
        written = torch.cat([mark, keys[..., None], values], 2)  # [B, n, width]
        # Each needle falls at a uniform place of the haystack without needles, in no order of keys.
        places = torch.randint(hay - needles * width + 1, (count, needles), generator=generator).sort(1).values
        starts = places + width * torch.arange(needles)
        ids.scatter_(1, (starts[..., None] + torch.arange(width)).flatten(1), written.flatten(1))

        asked = torch.randint(needles, (count,), generator=generator)
        row = torch.arange(count)
        ids[:, hay] = QUESTION
        ids[:, hay + 1] = keys[row, asked]
        ids[:, hay + 2 :] = values[row, asked]
        labels = blank_labels(count, level)
        labels[:, hay + 2 :] = values[row, asked]
        return Batch(ids, labels)

    def _haystack(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        config = self.config
        first = 2 + config.keys + config.values
        if config.made.haystack == "noise":
            return first + torch.arange(length) % config.words
        shares = (1 / torch.arange(1, config.words + 1, dtype=torch.float64)).cumsum(0)
        drawn = torch.rand(count, length, generator=generator)
        return first + torch.searchsorted((shares / shares[-1]).float()[:-1], drawn, right=True)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        return {"accuracy": of_runs(batch, right), "token_accuracy": of_tokens(batch, right)}
