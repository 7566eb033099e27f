"""Selective key overwrite, small: writes, flagged overwrites of some of the keys, then queries for keys of both kinds.

The paper's Definition 6, with key and value in one token, so that what is learned is what to do with a full memory and
not how to bind two tokens. A model of one mixer comes with it. May import mixers and training.

Shapes: B batch, T time, n pairs, m overwrites, p queries (of all rounds), d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.mixers import TokenMixer, build_mixer
from hybridzoo.training import IGNORED, Batch

WRITE, OVERWRITE, QUERY = 0, 1, 2  # what a token does; an overwrite is a flagged write


@dataclass(frozen=True)
class Overwrite:
    """`rounds` one after another of `pairs` of `keys` and `values`, `overwrites` of them written anew, then `queries`.

    Each round draws keys and values of its own; what earlier rounds wrote is never asked for again.

    `skew` is the exponent of the law by which queries choose among the pairs in random order: 0 asks for every pair
    alike, 1.5 mostly for a few. A token's id is `(kind * keys + key) * values + value`.
    """

    pairs: int = 8
    overwrites: int = 4
    queries: int = 8
    keys: int = 32
    values: int = 16
    skew: float = 0.0
    rounds: int = 1
    examples: int = 256
    metric: str = "accuracy"
    maximise: bool = True

    @property
    def vocab_size(self) -> int:
        return 3 * self.keys * self.values

    @property
    def length(self) -> int:
        return self.rounds * (self.pairs + self.overwrites + self.queries)

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        return self.sample(batch_size, generator)[0]

    def sample(self, count: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Draw `count` sequences; with them, which of all rounds' queries `[B, p]` ask for an overwritten key."""
        drawn = [self._round(count, generator) for _ in range(self.rounds)]
        ids, labels, changed = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        return Batch(ids, labels), changed

    def _round(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        n, m = self.pairs, self.overwrites
        keys = torch.rand(count, self.keys, generator=generator).argsort(1)[:, :n]
        values = torch.randint(self.values, (count, n), generator=generator)
        changed = torch.rand(count, n, generator=generator).argsort(1)[:, :m]
        newer = torch.randint(self.values, (count, m), generator=generator)
        final = values.scatter(1, changed, newer)
        weights = torch.arange(1, n + 1, dtype=torch.float64).pow(-self.skew)
        order = torch.rand(count, n, generator=generator).argsort(1)  # which pair has which weight
        ranks = torch.multinomial(weights.expand(count, n), self.queries, replacement=True, generator=generator)
        asked = order.gather(1, ranks)
        parts = (
            self._ids(WRITE, keys, values),
            self._ids(OVERWRITE, keys.gather(1, changed), newer),
            self._ids(QUERY, keys.gather(1, asked), torch.zeros_like(asked)),
        )
        ids = torch.cat(parts, dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, n + m :] = final.gather(1, asked)
        return ids, labels, (asked[:, :, None] == changed[:, None, :]).any(2)

    def _ids(self, kind: int, keys: Tensor, values: Tensor) -> Tensor:
        return (kind * self.keys + keys) * self.values + values

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        batch, changed = self.sample(self.examples, torch.Generator().manual_seed(20260625))
        guess = model(batch.ids.to(device)).logits.argmax(-1).cpu()
        right = (guess == batch.labels)[batch.labels != IGNORED].view(changed.shape)
        return {
            "accuracy": float(right.double().mean()),
            "overwritten": float(right[changed].double().mean()),
            "intact": float(right[~changed].double().mean()),
        }


class Output(NamedTuple):
    """What `train` reads of a model."""

    logits: Tensor
    loss: Tensor | None


class OneMixer(nn.Module):
    """Embeddings of kind, key and value added up, one mixer, and a readout of one hidden layer `width` wide.

    Answers stand at the query itself: `labels[:, t]` is the value that token t asks for.
    """

    def __init__(self, mixer: str, task: Overwrite, d_model: int, width: int, **words: object) -> None:
        super().__init__()
        self.task = task
        self.kind, self.key = nn.Embedding(3, d_model), nn.Embedding(task.keys, d_model)
        self.value = nn.Embedding(task.values, d_model)
        self.mixer: TokenMixer = build_mixer(mixer, d_model=d_model, **words)
        self.readout = nn.Sequential(nn.Linear(d_model, width), nn.SiLU(), nn.Linear(width, task.values))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Output:
        values, keys = self.task.values, self.task.keys
        kind = ids // (keys * values)
        said = self.value(ids % values) * (kind != QUERY)[..., None]  # a query holds no value
        y, _ = self.mixer(self.kind(kind) + self.key(ids // values % keys) + said)
        logits = self.readout(y)
        if labels is None:
            return Output(logits, None)
        return Output(logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))
