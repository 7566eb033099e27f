"""A perfect solver of every synthetic task: plain Python that reads a sequence token by token and says what comes next.

A solver is a generator, so it cannot look ahead: what it says at a token is decided by that token and those before it.
`PerfectSolver(task)` wraps it as a model; `Guesser(task)` is its opposite.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridzoo.studies.tasks import AnswerTask
from hybridzoo.studies.tasks.copying import COPY
from hybridzoo.studies.tasks.mad import INSERT
from hybridzoo.studies.tasks.niah import NEEDLE, QUESTION
from hybridzoo.studies.tasks.state_tracking import GROUPS

NOTHING = 0  # what a solver says where it has no answer


def mqar(task: Any, ids: Iterable[int]) -> Iterator[int]:
    follows: dict[int, int] = {}
    last = None
    for token in ids:
        if last is not None:
            follows.setdefault(last, token)  # the pairs come first, filler and queries later
        yield follows.get(token, NOTHING)
        last = token


def latest_value(task: Any, ids: Iterable[int]) -> Iterator[int]:
    """Keep the latest value that stood after each token."""
    values: dict[int, int] = {}
    last = NOTHING
    for token in ids:
        if token in task.answers:
            values[last] = token
        yield values.get(token, NOTHING)
        last = token


def first_value(task: Any, ids: Iterable[int]) -> Iterator[int]:
    """Keep the first: no solver of `overwrite`, but of all that it leaves alone."""
    values: dict[int, int] = {}
    last = NOTHING
    for token in ids:
        if token in task.answers:
            values.setdefault(last, token)
        yield values.get(token, NOTHING)
        last = token


def niah(task: Any, ids: Iterable[int]) -> Iterator[int]:
    width = task.config.made.value_tokens
    needles: dict[int, list[int]] = {}
    read: list[int] | None = None
    answer: Iterator[int] | None = None
    asked = False
    for token in ids:
        if token == NEEDLE:
            read = []
        elif read is not None:
            read.append(token)
            if len(read) == 1 + width:
                needles[read[0]] = read[1:]
                read = None
        elif token == QUESTION:
            asked = True
        elif asked and answer is None:
            answer = iter(needles[token])
        yield NOTHING if answer is None else next(answer, NOTHING)


def copy(task: Any, ids: Iterable[int]) -> Iterator[int]:
    string: list[int] = []
    answer: Iterator[int] | None = None
    for token in ids:
        if token == COPY:
            answer = iter(string)
        elif answer is None:
            string.append(token)
        yield NOTHING if answer is None else next(answer, NOTHING)


def state_tracking(task: Any, ids: Iterable[int]) -> Iterator[int]:
    things = range(GROUPS[task.config.group])
    every = list(itertools.permutations(things))
    state = tuple(things)
    for token in ids:
        if token:
            state = tuple(every[token - 1][thing] for thing in state)
        yield 1 + every.index(state)


def fuzzy_recall(task: Any, ids: Iterable[int]) -> Iterator[int]:
    values: dict[tuple[int, ...], list[int]] = {}
    key: list[int] = []
    value: list[int] = []
    for token in ids:
        if token in task.answers:
            value.append(token)
        else:
            if value:
                values[tuple(key)] = value
                key, value = [], []
            key.append(token)
        known = values.get(tuple(key), [])
        yield known[len(value)] if len(value) < len(known) else NOTHING


def selective_copy(task: Any, ids: Iterable[int]) -> Iterator[int]:
    items: list[int] = []
    for token in ids:
        if token in task.answers:
            items.append(token)
        yield items.pop(0) if token == INSERT and items else NOTHING


def compression(task: Any, ids: Iterable[int]) -> Iterator[int]:
    content: list[int] = []
    for token in ids:
        if token in task.answers:
            content.append(token)
        place = token - 2
        yield content[place] if 0 <= place < len(content) and token not in task.answers else NOTHING


def memorisation(task: Any, ids: Iterable[int]) -> Iterator[int]:
    facts = task.facts.tolist()
    for token in ids:
        yield facts[token - 1] if token else NOTHING


SOLVERS: dict[str, Callable[[Any, Iterable[int]], Iterator[int]]] = {
    "compression": compression,
    "copy": copy,
    "fuzzy_recall": fuzzy_recall,
    "memorisation": memorisation,
    "mqar": mqar,
    "niah": niah,
    "noisy_recall": latest_value,
    "overwrite": latest_value,
    "selective_copy": selective_copy,
    "state_tracking": state_tracking,
}


class Solver(nn.Module):
    """Says what a generator says: its logits are one for that token and zero elsewhere. `seen` keeps what it read."""

    def __init__(self, task: AnswerTask, solve: Callable[[Any, Iterable[int]], Iterator[int]]) -> None:
        super().__init__()
        self.task, self.solve = task, solve
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> SimpleNamespace:
        self.seen.append(ids)
        said = torch.tensor([list(self.solve(self.task, row)) for row in ids.tolist()])
        return SimpleNamespace(logits=F.one_hot(said, self.task.vocab_size).float())


class PerfectSolver(Solver):
    """The solver of `task`; a task of a new type needs one in `SOLVERS`."""

    def __init__(self, task: AnswerTask) -> None:
        super().__init__(task, SOLVERS[task.type])


class Guesser(nn.Module):
    """Knows which tokens may be answers, and has uniform random logits for them."""

    def __init__(self, task: AnswerTask) -> None:
        super().__init__()
        self.task = task
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        logits = torch.full((*ids.shape, self.task.vocab_size), -1.0)
        answers = self.task.answers
        drawn = torch.rand(*ids.shape, len(answers), generator=self.generator)
        logits[..., answers.start : answers.stop] = drawn
        return SimpleNamespace(logits=logits)
