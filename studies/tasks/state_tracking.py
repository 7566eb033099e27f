"""State tracking: the product, so far, of a word of permutations (arXiv 2411.12537).

Parity is the word problem of S2, S3 is the smallest group whose order of factors matters, and S5 the smallest symmetric
one that is not solvable. A linear recurrence whose transitions have only positive eigenvalues cannot follow parity at
every length; attention of fixed depth is believed unable to follow S5. May import training.

Shapes: B batch, T time, G elements of the group.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridzoo.studies.tasks.answers import BLANK, AnswerTask, LengthConfig, blank_labels, of_tokens
from hybridzoo.studies.tasks.base import register_task
from hybridzoo.training import Batch

GROUPS = {"parity": 2, "S3": 3, "S5": 5}  # things that are permuted


@dataclass(frozen=True, kw_only=True)
class StateTrackingConfig(LengthConfig):
    """The knobs of difficulty, beside those of `LengthConfig`, whose length is that of the word.

    `elements` are what words are made of: all of the group, or `swaps`, the identity and what exchanges two things.
    """

    group: Literal["parity", "S3", "S5"] = "parity"
    length: int = 32
    elements: Literal["all", "swaps"] = "all"


@register_task("state_tracking")
class StateTracking(AnswerTask):
    """The task. Tokens are `BLANK`, then the elements of the group, which are also the answers, one a position.

    Scores: `accuracy` of all positions, `last` of the last one, which is the whole word's product.
    """

    Config = StateTrackingConfig
    config: StateTrackingConfig
    level_axis: ClassVar[str] = "elements in the word"

    @property
    def answers(self) -> range:
        return range(1, 1 + len(elements(self.config.group)))

    @property
    def label(self) -> str:
        return f"states of {self.config.length} steps told right"

    @property
    def about(self) -> str:
        config = self.config
        what = "bits, and their parity so far" if config.group == "parity" else f"permutations of {config.group}"
        asked = "" if config.group == "parity" else ", and their product so far"
        drawn = " Only swaps and the identity are drawn." if config.elements == "swaps" else ""
        return f"State tracking: a word of {config.length} {what}{asked}, asked for after every one.{drawn}"

    def length_of(self, level: int) -> int:
        return level + 1

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        drawn = _drawn(self.config.group, self.config.elements)
        word = drawn[torch.randint(len(drawn), (count, level), generator=generator)]
        ids = torch.full((count, level + 1), BLANK)  # the last answer needs a place, so the last token is blank
        ids[:, :-1] = 1 + word
        labels = blank_labels(count, level + 1)
        labels[:, 1:] = 1 + products(word, table(self.config.group))
        return Batch(ids, labels)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        last = torch.zeros_like(right)
        last[:, -1] = True
        return {"accuracy": of_tokens(batch, right), "last": of_tokens(batch, right, last)}


@functools.cache
def elements(group: str) -> tuple[tuple[int, ...], ...]:
    """Return the permutations of a group, in the order of their numbers; the identity is the first."""
    return tuple(itertools.permutations(range(GROUPS[group])))


@functools.cache
def table(group: str) -> Tensor:
    """Return `[G, G]`: the number of "first a, then b", where a permutation takes i to its i-th entry."""
    every = elements(group)
    number = {one: n for n, one in enumerate(every)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in every] for a in every])


def products(word: Tensor, times: Tensor) -> Tensor:
    """Return the product of every prefix of `word [B, T]`, by the table `times [G, G]`.

    Log2 T lookups: after the k-th, each entry is the product of up to 2^k elements that end there.
    """
    reached, step = word, 1
    while step < word.shape[1]:
        longer = times[reached[:, :-step], reached[:, step:]]
        reached = torch.cat([reached[:, :step], longer], 1)
        step *= 2
    return reached


@functools.cache
def _drawn(group: str, which: str) -> Tensor:
    """The numbers `[n]` of the elements that words are made of."""
    moved = [sum(to != i for i, to in enumerate(one)) for one in elements(group)]
    return torch.tensor([n for n, count in enumerate(moved) if which == "all" or count <= 2])
