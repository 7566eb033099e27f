"""What every synthetic task shares: answers scored exactly, at several difficulties, on sequences that never change.

A task says how a sequence is drawn (`sample`) and how long it is; the curriculum, the batches, the held-out sequences
and the scores are here, once. May import architectures (to ask for logits only where there is a question) and training.

Shapes: B batch, T time, V vocabulary, N asked positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridzoo.architectures import HybridLM
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.base import Shown, StudyTask
from hybridzoo.training import IGNORED, Batch

BLANK = 0  # the token where nothing is said, in every task that needs one

# Tokens of one forward pass in evaluation: 65,536 of a narrow model fit a laptop's memory and fill a GPU well enough.
TOKENS_AT_ONCE = 2**16
# Sequences drawn at once in evaluation. Part of the data: another number draws other sequences from the same seed.
DRAWN_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a curriculum, `steps` steps long; what is easier in it is a subclass's other field."""

    steps: int

    def __post_init__(self) -> None:
        at_least(self, 1, *(field.name for field in dataclasses.fields(self)))


@dataclass(frozen=True, kw_only=True)
class PairStage(Stage):
    """`pairs` a sequence for `steps` steps."""

    pairs: int


@dataclass(frozen=True, kw_only=True)
class LengthStage(Stage):
    """Sequences of `length` for `steps` steps, in the task's own count of length."""

    length: int


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How much is scored: `examples` sequences at the end, `quick_examples` on the way, drawn from `data_seed`.

    `knob` names the word that is the task's difficulty, for tasks that have `levels` and a `curriculum` of it.
    """

    knob: ClassVar[str] = ""

    examples: int = 256
    quick_examples: int = 32
    data_seed: int = 20231204

    def __post_init__(self) -> None:
        at_least(self, 1, "examples", "quick_examples")

    @property
    def own(self) -> int:
        """The difficulty that ranks stacks, and that training ends at."""
        return int(getattr(self, self.knob))

    @property
    def scored(self) -> tuple[int, ...]:
        """Every difficulty that is scored at the end, rising."""
        return (self.own,)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """The curriculum before `own`: difficulties, and for how many steps."""
        return ()


@dataclass(frozen=True, kw_only=True)
class PairsConfig(AnswerConfig):
    """`pairs` key-value pairs a sequence, of `keys` distinct keys and `values` values.

    Values are drawn with replacement, so that guessing is right once in `values`. `curriculum` begins with fewer pairs,
    in shorter sequences and correspondingly more of them; `levels` are further numbers of pairs to score at the end.
    """

    knob: ClassVar[str] = "pairs"

    pairs: int = 32
    keys: int = 64
    values: int = 32
    levels: tuple[int, ...] = ()
    curriculum: tuple[PairStage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "keys", "values")
        check_knob(self, self.levels, 1)
        distinct, said = self.distinct_keys
        for name, pairs in [("pairs", self.pairs), *(("levels", level) for level in self.levels)]:
            if pairs > distinct:
                raise SpecError(f".{name}: {pairs} pairs need as many distinct keys, and {said} is {distinct}")

    @property
    def distinct_keys(self) -> tuple[int, str]:
        """The number of keys that there are, and the words that decide it."""
        return self.keys, "keys"

    @property
    def scored(self) -> tuple[int, ...]:
        return tuple(sorted({*self.levels, self.pairs}))

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        return tuple((stage.pairs, stage.steps) for stage in self.curriculum)


@dataclass(frozen=True, kw_only=True)
class LengthConfig(AnswerConfig):
    """A `length` to train at, a `curriculum` of shorter ones before it, and further `levels` to score at the end."""

    knob: ClassVar[str] = "length"

    length: int = 64
    levels: tuple[int, ...] = ()
    curriculum: tuple[LengthStage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_knob(self, self.levels, 1)

    @property
    def scored(self) -> tuple[int, ...]:
        return tuple(sorted({*self.levels, self.length}))

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        return tuple((stage.length, stage.steps) for stage in self.curriculum)

    def check_least(self, least: int, why: str) -> None:
        """Refuse every length below `least`, saying `why`: `SpecError`."""
        named = [("length", self.length), *(("levels", level) for level in self.levels)]
        for name, length in [*named, *(("curriculum", stage.length) for stage in self.curriculum)]:
            if length < least:
                raise SpecError(f".{name}: {why} {least} positions, got {length}")


@dataclass(frozen=True, kw_only=True)
class TokensConfig(LengthConfig):
    """A `LengthConfig` with the number of `tokens` that a sequence's content is drawn from, with replacement."""

    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "tokens")


def at_least(config: Any, bound: int, *names: str) -> None:
    """Refuse a config whose words `names` are below `bound`: `SpecError` naming the word."""
    for name in names:
        if getattr(config, name) < bound:
            raise SpecError(f".{name}: must be at least {bound}, got {getattr(config, name)}")


def check_knob(config: AnswerConfig, levels: Sequence[int], bound: int) -> None:
    """Refuse a difficulty below `bound`, and a curriculum that is harder than the task: `SpecError`."""
    at_least(config, bound, config.knob)
    if levels and min(levels) < bound:
        raise SpecError(f".levels: must be at least {bound}, got {min(levels)}")
    for level, _ in config.stages:
        if level > config.own:
            raise SpecError(f".curriculum: a stage of {config.knob} {level} is harder than the task's {config.own}")
        if level < bound:
            raise SpecError(f".curriculum: {config.knob} must be at least {bound}, got {level}")


class AnswerTask(StudyTask):
    """A task whose labels are answers. What a model is asked at position t is the label at t + 1, as in training.

    The score that ranks is named `accuracy`, at other levels `accuracy@LEVEL`, and other scores likewise. An answer of
    several tokens is shown to the model as it goes: what is likeliest everywhere, given the right tokens before it, is
    also what greedy decoding says, so an answer that is right as a whole would be produced.
    """

    config: AnswerConfig
    level_axis: ClassVar[str] = ""  # what the levels count

    @property
    def answers(self) -> range:
        """The tokens that may be an answer: a guesser who knows this much is right at `chance`."""
        raise NotImplementedError(f"{self.__class__.__name__} does not say which tokens may be answers")

    @property
    def vocab_size(self) -> int:
        """The answers are the last tokens of the vocabulary; tasks that have others after them override it."""
        return self.answers.stop

    @property
    def chance(self) -> float:
        return 1 / len(self.answers)

    @property
    def label(self) -> str:
        """What the score's axis says."""
        raise NotImplementedError(f"{self.__class__.__name__} has no label")

    @property
    def about(self) -> str:
        """What a sequence is, in a plain sentence or two."""
        raise NotImplementedError(f"{self.__class__.__name__} does not say what it is about")

    def length_of(self, level: int) -> int:
        """The tokens of a sequence at a level of difficulty."""
        raise NotImplementedError(f"{self.__class__.__name__} does not say how long its sequences are")

    @property
    def longest(self) -> int:
        return max(map(self.length_of, self.config.scored))

    def sample(self, level: int, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` sequences at `level`: ids and labels, int64 `[count, length_of(level)]`."""
        raise NotImplementedError(f"{self.__class__.__name__} draws no sequences")

    def sample_training(self, level: int, count: int, generator: torch.Generator) -> Batch:
        """Draw what is trained on; tasks that train on a mixture of lengths override it."""
        return self.sample(level, count, generator)

    def tally(self, batch: Batch, right: Tensor) -> dict[str, tuple[int, int]]:
        """Count hits and questions, by the name of the score; `right`: bool `[B, T]`, false where nothing is asked."""
        return {"accuracy": of_tokens(batch, right)}

    @property
    def shown(self) -> Shown:
        config = self.config
        levels = config.scored if len(config.scored) > 1 else ()
        ends, step = [], 0
        for _, steps in config.stages:
            step += steps
            ends.append(step)
        return Shown(
            metric="accuracy",
            label=self.label,
            maximise=True,
            percent=True,
            chance=self.chance,
            about=f"{self.about} What counts as an answer is the most likely of all {self.vocab_size} tokens.",
            level_axis=self.level_axis,
            levels=tuple((level, self._name("accuracy", level)) for level in levels),
            stages=tuple(ends),
        )

    def level_at(self, step: int) -> int:
        """The difficulty of the sequences of `step` (from 0)."""
        for level, steps in self.config.stages:
            if step < steps:
                return level
            step -= steps
        return self.config.own

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        level = self.level_at(step)
        longer = self.length_of(self.config.own) / self.length_of(level)  # as many tokens at every stage
        return self.sample_training(level, round(batch_size * longer), generator)

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        config = self.config
        levels = (config.own,) if quick else config.scored
        count = config.quick_examples if quick else config.examples
        scores: dict[str, float] = {}
        for level in levels:
            totals: dict[str, list[int]] = {}
            for batch in self.held_out(level, count):
                for name, counts in self.tally(batch, answered(model, batch, device)).items():
                    totals[name] = [a + b for a, b in zip(totals.get(name, [0, 0]), counts, strict=True)]
            scores |= {self._name(name, level): hits / asked for name, (hits, asked) in totals.items()}
        return scores

    def held_out(self, level: int, count: int) -> Iterator[Batch]:
        """The `count` sequences that are scored at `level`: the same ones for every model and every call.

        They are drawn apart from training, but not kept from it: there are so many possible ones that it hardly matters
        whether one was also trained on.
        """
        generator = torch.Generator().manual_seed(self.config.data_seed + level)
        for start in range(0, count, DRAWN_AT_ONCE):
            yield self.sample(level, min(DRAWN_AT_ONCE, count - start), generator)

    def _name(self, score: str, level: int) -> str:
        return score if level == self.config.own else f"{score}@{level}"


def answered(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return where `model`'s most likely token, of the whole vocabulary, is the label: bool `[B, T]`, in host memory.

    `right[:, t]` is about the label at t, which the model is asked for at t - 1; it is false where nothing is asked.
    Long sequences go through the model few at a time, and a `HybridLM` makes logits for questions only.
    """
    labels = batch.labels[:, 1:]
    asked = labels != IGNORED
    right = torch.zeros_like(batch.labels, dtype=torch.bool)
    rows = max(1, TOKENS_AT_ONCE // batch.ids.shape[1])
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        ids, where = batch.ids[part].to(device), asked[part].to(device)
        if isinstance(model, HybridLM):
            hidden, _ = model.hidden(ids, return_state=False)
            guess = model.logits(hidden[:, :-1][where]).argmax(-1)  # [N, V] -> [N]
        else:
            guess = model(ids).logits[:, :-1][where].argmax(-1)
        right[part, 1:][asked[part]] = guess.cpu() == labels[part][asked[part]]
    return right


def of_tokens(batch: Batch, right: Tensor, counted: Tensor | None = None) -> tuple[int, int]:
    """Count right answer tokens and asked ones, of those that `counted` (bool `[B, T]`) marks, or of all."""
    asked = batch.labels != IGNORED
    if counted is not None:
        asked, right = asked & counted, right & counted
    return int(right.sum()), int(asked.sum())


def of_runs(batch: Batch, right: Tensor) -> tuple[int, int]:
    """Count answers right in all their tokens, and all answers; an answer is a run of labels that is as long as can be.

    For tasks whose answers are never next to each other.
    """
    asked = batch.labels != IGNORED
    before = asked.roll(1, 1)
    before[:, 0] = False
    run = (asked & ~before).flatten().cumsum(0) - 1  # which answer a labelled position belongs to
    wrong = (asked & ~right).flatten().long()
    runs = int(run[-1]) + 1
    missed = torch.zeros(runs, dtype=torch.int64).scatter_add_(0, run.clamp_min(0), wrong)
    return int((missed == 0).sum()), runs


def permuted(count: int, size: int, generator: torch.Generator, first: int | None = None) -> Tensor:
    """Draw random orders of `range(size)`, or their first few: int64 `[count, first or size]`, no entry twice a row."""
    return torch.rand(count, size, generator=generator).argsort(1)[:, :first]


def token_ids(low: int, size: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw tokens from `low` to `low + size - 1` with replacement: int64 of `shape`."""
    return low + torch.randint(size, tuple(shape), generator=generator)


def blank_labels(count: int, length: int) -> Tensor:
    """Return labels `[count, length]` that ask for nothing."""
    return torch.full((count, length), IGNORED)
