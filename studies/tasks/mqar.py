"""Multi-query associative recall (Zoology, arXiv 2312.04927): what a fixed state must hold, made a number.

A sequence lists key-value pairs, then asks for the value of its keys, one query a position. The solver must keep every
pair; a state that is too small cannot, and no amount of training helps it. May import training.

Shapes: B batch, T time, n pairs, m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.base import Shown, StudyTask, register_task
from hybridzoo.training import IGNORED, Batch

BLANK = 0  # the token where nothing is said; keys follow it, then values


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the curriculum: `pairs` a sequence for `steps` steps."""

    pairs: int
    steps: int

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.steps < 1:
            raise SpecError(f": pairs and steps must be at least 1, got {self.pairs} and {self.steps}")


@dataclass(frozen=True, kw_only=True)
class MqarConfig:
    """The knobs of difficulty.

    `pairs` from `keys` distinct keys and `values` values (drawn with replacement, so that guessing is right once in
    `values`). `length` (default 3 pairs) is the whole sequence: the pairs, then the queries, at gaps whose power law
    has exponent `power` (as in the paper, 0.01 puts most near the pairs), with `filler` between. `curriculum` begins
    with fewer pairs, in sequences shorter in proportion and correspondingly more of them. `levels` are further numbers
    of pairs to score at the end; the score that ranks is the one at `pairs`.
    """

    pairs: int = 32
    keys: int = 64
    values: int = 32
    length: int | None = None
    power: float = 0.01
    filler: Literal["blank", "random"] = "blank"
    curriculum: tuple[Stage, ...] = field(default=())
    levels: tuple[int, ...] = ()
    examples: int = 256
    quick_examples: int = 32
    data_seed: int = 20231204

    def __post_init__(self) -> None:
        for name in ("pairs", "keys", "values", "examples", "quick_examples"):
            if getattr(self, name) < 1:
                raise SpecError(f".{name}: must be at least 1, got {getattr(self, name)}")
        if not self.power > 0:
            raise SpecError(f".power: must be above 0, got {self.power}")
        for name, pairs in [("pairs", self.pairs), *(("levels", level) for level in self.levels)]:
            if not 1 <= pairs <= self.keys:
                raise SpecError(f".{name}: {pairs} pairs need as many distinct keys, and keys is {self.keys}")
        for stage in self.curriculum:
            if stage.pairs > self.pairs:
                raise SpecError(f".curriculum: a stage of {stage.pairs} pairs is harder than the task's {self.pairs}")
        if self.length is not None and self.length < 2 * self.pairs + 2:
            raise SpecError(
                f".length: {self.pairs} pairs and one query take {2 * self.pairs + 2} positions, got {self.length}"
            )

    def length_of(self, pairs: int) -> int:
        """The length of a sequence of `pairs` pairs: in proportion to that of the task's own."""
        full = self.length if self.length is not None else 3 * self.pairs
        return max(2 * pairs + 2, round(full * pairs / self.pairs))


@register_task("mqar")
class Mqar(StudyTask):
    """The task. Tokens are `BLANK`, then `keys` keys, then `values` values; only queries are scored."""

    Config = MqarConfig
    config: MqarConfig

    @property
    def vocab_size(self) -> int:
        return 1 + self.config.keys + self.config.values

    @property
    def shown(self) -> Shown:
        config = self.config
        levels = sorted({*config.levels, config.pairs})
        ends, step = [], 0
        for stage in config.curriculum:
            step += stage.steps
            ends.append(step)
        return Shown(
            metric="accuracy",
            label=f"recall of {config.pairs} pairs",
            maximise=True,
            percent=True,
            chance=1 / config.values,
            about=(
                f"Multi-query associative recall: {config.pairs} key-value pairs from {config.keys} keys and "
                f"{config.values} values, then the keys again in another order, {config.length_of(config.pairs)} "
                f"tokens in all. A query counts as right only if the most likely of all {self.vocab_size} tokens is "
                "its value."
            ),
            level_axis="key-value pairs in the sequence",
            levels=tuple((level, self._metric(level)) for level in levels) if len(levels) > 1 else (),
            stages=tuple(ends),
        )

    def _metric(self, pairs: int) -> str:
        return "accuracy" if pairs == self.config.pairs else f"accuracy@{pairs}"

    def pairs_at(self, step: int) -> int:
        """The number of pairs in the sequences of `step` (from 0)."""
        for stage in self.config.curriculum:
            if step < stage.steps:
                return stage.pairs
            step -= stage.steps
        return self.config.pairs

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        pairs = self.pairs_at(step)
        longer = self.config.length_of(self.config.pairs) / self.config.length_of(pairs)
        return self.sample(pairs, round(batch_size * longer), generator)

    def sample(self, pairs: int, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` sequences of `pairs` pairs; ids and labels `[count, length_of(pairs)]`.

        Each pair is asked for at most once. The last position has no next token to be scored on, so it holds no query:
        a sequence with room for fewer queries than pairs asks for some of them.
        """
        config = self.config
        length = config.length_of(pairs)
        keys = 1 + torch.rand(count, config.keys, generator=generator).argsort(1)[:, :pairs]
        values = 1 + config.keys + torch.randint(config.values, (count, pairs), generator=generator)
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
        asked = torch.rand(count, pairs, generator=generator).argsort(1)[:, :queries]
        places = 2 * pairs + order[:, :queries]
        ids.scatter_(1, places, keys.gather(1, asked))
        labels = torch.full((count, length), IGNORED)
        labels.scatter_(1, places + 1, values.gather(1, asked))  # the model scores position t on label t + 1
        return Batch(ids, labels)

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        levels = (self.config.pairs,) if quick else sorted({*self.config.levels, self.config.pairs})
        count = self.config.quick_examples if quick else self.config.examples
        return {self._metric(level): self._accuracy(model, device, level, count) for level in levels}

    def _accuracy(self, model: nn.Module, device: torch.device, pairs: int, count: int) -> float:
        hits, asked = 0, 0
        for batch in self._held_out(pairs, count):
            logits = model(batch.ids.to(device)).logits
            right, scored = score(logits, batch.labels.to(device))
            hits, asked = hits + right, asked + scored
        return hits / asked

    def _held_out(self, pairs: int, count: int, size: int = 32) -> Iterator[Batch]:
        # The same sequences for every model and every call. Whether one of them was also trained on hardly matters:
        # there are more than keys! / (keys - pairs)! of them.
        generator = torch.Generator().manual_seed(self.config.data_seed + pairs)
        for start in range(0, count, size):
            yield self.sample(pairs, min(size, count - start), generator)


def score(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the right answers and the questions; `logits [B, T, vocabulary]`, `labels [B, T]` of the task's own form.

    An answer is right if the most likely token of the whole vocabulary is the value asked for; positions without a
    query do not count.
    """
    targets = labels[:, 1:]
    asked = targets != IGNORED
    hits = (logits[:, :-1].argmax(-1) == targets) & asked
    return int(hits.sum()), int(asked.sum())
