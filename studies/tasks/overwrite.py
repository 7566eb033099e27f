"""Selective key overwrite (CARVE, Definition 6): some associations change, all others must stay as they were.

A stream of writes, in which some keys are written again with a flag and another value, then a query of every key. A
state that only adds keeps the old value beside the new; one that clears too much loses its neighbours: so overwritten
and intact keys are also scored apart. May import training.

Shapes: B batch, T time, P pairs, O overwrites.
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
    PairsConfig,
    at_least,
    blank_labels,
    check_knob,
    of_tokens,
    permuted,
    token_ids,
)
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import Batch

FLAG = 1  # before a key that has a value already: the next value takes its place


@dataclass(frozen=True, kw_only=True)
class OverwriteConfig(PairsConfig):
    """The knobs of difficulty, beside those of `PairsConfig`.

    `overwrites` of the `pairs` get another value, each once, anywhere after their first. `distance` blank tokens stand
    between the last write and the first query. At other numbers of pairs the overwrites change in proportion.
    """

    pairs: int = 16
    overwrites: int = 8
    distance: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_knob(self, self.levels, 2)
        at_least(self, 2, "values")
        at_least(self, 1, "overwrites")
        at_least(self, 0, "distance")
        if self.overwrites >= self.pairs:
            raise SpecError(
                f".overwrites: of {self.pairs} pairs at most {self.pairs - 1} can be overwritten, so that one stays "
                f"intact; got {self.overwrites}"
            )


@register_task("overwrite")
class Overwrite(AnswerTask):
    """The task. Tokens are `BLANK`, `FLAG`, then `keys` keys, then `values` values; only queries are scored.

    Scores: `accuracy` of all queries, `overwritten` and `intact` of those of each kind.
    """

    Config = OverwriteConfig
    config: OverwriteConfig
    level_axis: ClassVar[str] = "key-value pairs in the sequence"

    @property
    def answers(self) -> range:
        first = 2 + self.config.keys
        return range(first, first + self.config.values)

    @property
    def label(self) -> str:
        return f"recall of {self.config.pairs} pairs, {self.config.overwrites} overwritten"

    @property
    def about(self) -> str:
        config = self.config
        return (
            f"Selective key overwrite: {config.pairs} key-value pairs from {config.keys} keys and {config.values} "
            f"values, {config.overwrites} of them later overwritten, then every key, {self.length_of(config.pairs)} "
            "tokens in all. The score is of overwritten and intact keys together; each kind is also scored alone."
        )

    def overwrites_of(self, pairs: int) -> int:
        """The keys that are overwritten among `pairs`: in proportion, at least one, and never all."""
        return min(pairs - 1, max(1, round(self.config.overwrites * pairs / self.config.pairs)))

    def length_of(self, level: int) -> int:
        return 2 * level + 3 * self.overwrites_of(level) + self.config.distance + level + 1

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        config, pairs, overwrites = self.config, level, self.overwrites_of(level)
        first_value = 2 + config.keys
        keys = 2 + permuted(count, config.keys, generator, pairs)  # the first O of them, in no order, are overwritten
        values = token_ids(0, config.values, (count, pairs), generator)
        other = token_ids(1, config.values - 1, (count, overwrites), generator)
        later = (values[:, :overwrites] + other) % config.values  # never the old value again

        # Writes come at random times, an overwrite at a random time between its write and the end.
        when = torch.rand(count, pairs, generator=generator)
        again = when[:, :overwrites]
        again = again + (1 - again) * torch.rand(count, overwrites, generator=generator)
        order = torch.cat([when, again], 1).argsort(dim=1, stable=True)  # stable: at equal times the write is first
        widths = torch.tensor([2] * pairs + [3] * overwrites)[order]
        starts = torch.empty_like(order).scatter_(1, order, widths.cumsum(1) - widths)  # [B, P + O], by event

        ids = torch.full((count, self.length_of(pairs)), BLANK)
        writes, flags = starts[:, :pairs], starts[:, pairs:]
        ids.scatter_(1, writes, keys)
        ids.scatter_(1, writes + 1, first_value + values)
        ids.scatter_(1, flags, FLAG)
        ids.scatter_(1, flags + 1, keys[:, :overwrites])
        ids.scatter_(1, flags + 2, first_value + later)

        asked = permuted(count, pairs, generator)
        values[:, :overwrites] = later
        ids[:, -pairs - 1 : -1] = keys.gather(1, asked)
        labels = blank_labels(*ids.shape)
        labels[:, -pairs:] = first_value + values.gather(1, asked)  # the model scores position t on label t + 1
        return Batch(ids, labels)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        changed = overwritten(batch.ids, self.vocab_size)
        return {
            "accuracy": of_tokens(batch, right),
            "overwritten": of_tokens(batch, right, changed),
            "intact": of_tokens(batch, right, ~changed),
        }


def overwritten(ids: Tensor, vocab_size: int) -> Tensor:
    """Return where the token before, of `ids [B, T]`, is a key that has a flag somewhere in its row: bool `[B, T]`."""
    flagged = torch.zeros(len(ids), vocab_size, dtype=torch.bool)
    row, place = torch.nonzero(ids[:, :-1] == FLAG, as_tuple=True)
    flagged[row, ids[row, place + 1]] = True
    return flagged.gather(1, ids).roll(1, 1)
