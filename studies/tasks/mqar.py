"""Multi-query associative recall (Zoology, arXiv 2312.04927): what a fixed state must hold, made a number.

A sequence lists key-value pairs, then asks for the value of its keys, one query a position. The solver must keep every
pair; a state that is too small cannot, and no amount of training helps it. May import training.

Shapes: B batch, T time, n pairs, m queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import BLANK, AnswerTask, PairsConfig, blank_labels, permuted, token_ids
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import Batch


@dataclass(frozen=True, kw_only=True)
class MqarConfig(PairsConfig):
    """The knobs of difficulty, beside those of `PairsConfig`.

    `length` (default 3 pairs) is the whole sequence: the pairs, then the queries, at gaps whose power law has exponent
    `power` (as in the paper, 0.01 puts most near the pairs), with `filler` between. Fewer or more pairs than `pairs`
    come in sequences shorter or longer in proportion.
    """

    length: int | None = None
    power: float = 0.01
    filler: Literal["blank", "random"] = "blank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise SpecError(f".power: must be above 0, got {self.power}")
        if self.length is not None and self.length < 2 * self.pairs + 2:
            raise SpecError(
                f".length: {self.pairs} pairs and one query take {2 * self.pairs + 2} positions, got {self.length}"
            )


@register_task("mqar")
class Mqar(AnswerTask):
    """The task. Tokens are `BLANK`, then `keys` keys, then `values` values; only queries are scored."""

    Config = MqarConfig
    config: MqarConfig
    level_axis: ClassVar[str] = "key-value pairs in the sequence"

    @property
    def answers(self) -> range:
        first = 1 + self.config.keys
        return range(first, first + self.config.values)

    @property
    def label(self) -> str:
        return f"recall of {self.config.pairs} pairs"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Multi-query associative recall: {config.pairs} key-value pairs from {config.keys} keys and "
            f"{config.values} values, then the keys again in another order, {self.length_of(config.pairs)} tokens in "
            "all."
        )

    def length_of(self, level: int) -> int:
        config = self.config
        full = config.length if config.length is not None else 3 * config.pairs
        return max(2 * level + 2, round(full * level / config.pairs))

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` sequences of `level` pairs; ids and labels `[count, length_of(level)]`.

        Each pair is asked for at most once. The last position has no next token to be scored on, so it holds no query:
        a sequence with room for fewer queries than pairs asks for some of them.
        """
        config, pairs = self.config, level
        length = self.length_of(pairs)
        keys = 1 + permuted(count, config.keys, generator, pairs)
        values = token_ids(1 + config.keys, config.values, (count, pairs), generator)
        ids = torch.full((count, length), BLANK)
        if config.filler == "random":
            ids = torch.randint(1, self.vocab_size, (count, length), generator=generator)
        ids[:, 0 : 2 * pairs : 2] = keys
        ids[:, 1 : 2 * pairs : 2] = values
        slots = length - 2 * pairs - 1
        # Adding Gumbel noise to log-probabilities and sorting is a weighted draw without replacement (Zoology's gaps).
        gaps = torch.arange(1, slots + 1, dtype=torch.float64).log() * (config.power - 1)
        noise = -torch.rand(count, slots, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
        order = (gaps - noise.log()).argsort(1, descending=True)
        queries = min(pairs, slots)
        asked = permuted(count, pairs, generator, queries)
        places = 2 * pairs + order[:, :queries]
        ids.scatter_(1, places, keys.gather(1, asked))
        labels = blank_labels(count, length)
        labels.scatter_(1, places + 1, values.gather(1, asked))  # the model scores position t on label t + 1
        return Batch(ids, labels)
