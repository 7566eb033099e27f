"""Recall made harder in two ways (MAD, arXiv 2403.17844): keys and values of several tokens, and noise between them.

Both list key-value pairs, then ask for each. MAD's sequences are one stream of pairs, scored where a key comes again.
Here every key is asked for once, as in mqar.py, so that the number of pairs is the one difficulty. May import training.

Shapes: B batch, T time, P pairs, k tokens of a key, v tokens of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import (
    AnswerTask,
    PairsConfig,
    at_least,
    blank_labels,
    of_runs,
    of_tokens,
    permuted,
    token_ids,
)
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import IGNORED, Batch


@dataclass(frozen=True, kw_only=True)
class FuzzyRecallConfig(PairsConfig):
    """The knobs of difficulty, beside those of `PairsConfig`.

    A key is `key_tokens` tokens of `keys`, so no one of them tells which key it is; a value is `value_tokens` tokens of
    `values`. The keys of a sequence are distinct.
    """

    pairs: int = 8
    keys: int = 8
    values: int = 8
    key_tokens: int = 3
    value_tokens: int = 2

    def __post_init__(self) -> None:
        at_least(self, 1, "key_tokens", "value_tokens")
        super().__post_init__()
        if self.distinct_keys[0] >= 2**63:  # a key is drawn as one integer
            raise SpecError(
                f".key_tokens: keys ** key_tokens must be below 2 ** 63, got {self.keys} ** {self.key_tokens}"
            )

    @property
    def distinct_keys(self) -> tuple[int, str]:
        return self.keys**self.key_tokens, "keys ** key_tokens"


@register_task("fuzzy_recall")
class FuzzyRecall(AnswerTask):
    """Recall of values of several tokens by keys of several tokens. Tokens are `keys` of keys, then `values` of values.

    Scores: `accuracy` of values right in all their tokens, `token_accuracy` of their tokens.
    """

    Config = FuzzyRecallConfig
    config: FuzzyRecallConfig
    level_axis: ClassVar[str] = "key-value pairs in the sequence"

    @property
    def answers(self) -> range:
        return range(self.config.keys, self.config.keys + self.config.values)

    @property
    def chance(self) -> float:
        return float(self.config.values) ** -self.config.value_tokens

    @property
    def label(self) -> str:
        return f"fuzzy recall of {self.config.pairs} pairs"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Fuzzy recall after MAD: {config.pairs} pairs of a key of {config.key_tokens} tokens (of {config.keys} "
            f"each) and a value of {config.value_tokens} (of {config.values}), then the same pairs in another order, "
            "whose values count as right only as a whole."
        )

    def length_of(self, level: int) -> int:
        return 2 * level * (self.config.key_tokens + self.config.value_tokens)

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        config, pairs = self.config, level
        codes = distinct(count, config.distinct_keys[0], pairs, generator)
        powers = config.keys ** torch.arange(config.key_tokens)
        keys = codes[..., None] // powers % config.keys  # the digits of a code are its tokens: [B, P, k]
        values = token_ids(config.keys, config.values, (count, pairs, config.value_tokens), generator)
        listed = torch.cat([keys, values], 2)  # [B, P, k + v]
        order = permuted(count, pairs, generator)
        again = listed.gather(1, order[..., None].expand_as(listed))
        asked = again.masked_fill(torch.arange(listed.shape[2]) < config.key_tokens, IGNORED)
        ids = torch.cat([listed, again], 1).flatten(1)
        labels = torch.cat([torch.full_like(listed, IGNORED), asked], 1).flatten(1)
        return Batch(ids, labels)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        return {"accuracy": of_runs(batch, right), "token_accuracy": of_tokens(batch, right)}


def distinct(count: int, size: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` distinct numbers below `size`, in each of `count` rows: int64 `[count, n]`, `n <= size`."""
    if size < 16 * n * n:
        return permuted(count, size, generator, n)
    # Among so many a repeated number is rare, at most one row in 32: draw such rows again.
    drawn = torch.randint(size, (count, n), generator=generator)
    while True:
        ordered = drawn.sort(1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not repeats.any():
            return drawn
        drawn[repeats] = torch.randint(size, (int(repeats.sum()), n), generator=generator)


@dataclass(frozen=True, kw_only=True)
class NoisyRecallConfig(PairsConfig):
    """The knobs of difficulty, beside those of `PairsConfig`.

    About a share `noise_share` of a sequence is noise, drawn from `noise` tokens that are neither keys nor values.
    """

    pairs: int = 16
    noise: int = 16
    noise_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "noise")
        if not 0 <= self.noise_share < 1:
            raise SpecError(f".noise_share: must be a share from 0 to below 1, got {self.noise_share}")


@register_task("noisy_recall")
class NoisyRecall(AnswerTask):
    """Recall with noise between pairs and between queries. Tokens are `keys` keys, `values` values, `noise` noise."""

    Config = NoisyRecallConfig
    config: NoisyRecallConfig
    level_axis: ClassVar[str] = "key-value pairs in the sequence"

    @property
    def vocab_size(self) -> int:
        return self.answers.stop + self.config.noise

    @property
    def answers(self) -> range:
        return range(self.config.keys, self.config.keys + self.config.values)

    @property
    def label(self) -> str:
        return f"noisy recall of {self.config.pairs} pairs"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Noisy recall after MAD: {config.pairs} key-value pairs from {config.keys} keys and {config.values} "
            f"values, then the keys in another order, with noise between that is {100 * config.noise_share:.0f} % of "
            f"the {self.length_of(config.pairs)} tokens."
        )

    def noise_of(self, pairs: int) -> tuple[int, int]:
        """The noise tokens among `pairs` pairs, and among as many queries."""
        each = pairs * self.config.noise_share / (1 - self.config.noise_share)
        return round(2 * each), round(each)

    def length_of(self, level: int) -> int:
        return 3 * level + sum(self.noise_of(level)) + 1

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        config, pairs = self.config, level
        keys = permuted(count, config.keys, generator, pairs)
        values = token_ids(config.keys, config.values, (count, pairs), generator)
        among, between = self.noise_of(pairs)
        ids = token_ids(config.keys + config.values, config.noise, (count, self.length_of(pairs)), generator)
        # Each pair and each query falls at a uniform place of its part's noise; the last token is noise always, since
        # the last query needs a place for its answer.
        starts = _placed(count, pairs, among, 2, generator)
        ids.scatter_(1, starts, keys)
        ids.scatter_(1, starts + 1, values)
        asked = permuted(count, pairs, generator)
        queries = 2 * pairs + among + _placed(count, pairs, between, 1, generator)
        ids.scatter_(1, queries, keys.gather(1, asked))
        labels = blank_labels(*ids.shape)
        labels.scatter_(1, queries + 1, values.gather(1, asked))  # the model scores position t on label t + 1
        return Batch(ids, labels)


def _placed(count: int, n: int, noise: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw where `n` things of `width` tokens begin among `noise` tokens: int64 `[count, n]`, rising."""
    before = torch.randint(noise + 1, (count, n), generator=generator).sort(1).values
    return before + width * torch.arange(n)
