"""Byte-level language modelling of a folder of text, scored in bits a byte on files that were not trained on.

The default folder is the standard library of the running Python, so the text is real and on every machine. May import
training.

Shapes: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.answers import TOKENS_AT_ONCE
from hybridzoo.studies.tasks.base import Shown, StudyTask, register_task
from hybridzoo.training import Batch, ByteCorpus, load_bytes
from hybridzoo.training.data import NOT_SOURCE


@dataclass(frozen=True, kw_only=True)
class ByteLmConfig:
    """The text (see `load_bytes`; `folder: null` is the standard library) and the windows cut from it.

    `length` bytes a window; `examples` windows, spread evenly over the validation text, make the final score and
    `quick_examples` the points on the way.
    """

    folder: str | None = None
    pattern: str = "*.py"
    exclude: tuple[str, ...] = NOT_SOURCE
    validation: float = 0.1
    max_bytes: int = 2**30
    length: int = 256
    examples: int = 256
    quick_examples: int = 32

    def __post_init__(self) -> None:
        if self.length < 2:
            raise SpecError(f".length: a window needs at least 2 bytes, got {self.length}")
        for name in ("examples", "quick_examples", "max_bytes"):
            if getattr(self, name) < 1:
                raise SpecError(f".{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise SpecError(f".validation: must be a share between 0 and 1, got {self.validation}")


@register_task("bytes")
class ByteLm(StudyTask):
    """The task. A token is a byte; every byte of a window but its first is scored, given those before it there.

    Scores: `bits_per_byte` of all of them, and `bits_per_byte@N`, for N each power of two, of those that N bytes or
    more stand before, and fewer than 2 N: whether a stack makes use of what is far back.
    """

    Config = ByteLmConfig
    config: ByteLmConfig

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def longest(self) -> int:
        return self.config.length

    @functools.cached_property
    def corpus(self) -> ByteCorpus:
        """The text, read when first needed; `SpecError` where there is none, or too little for one window."""
        c = self.config
        corpus = load_bytes(c.folder, c.pattern, c.exclude, c.validation, c.max_bytes)
        for name, part in (("train", corpus.train), ("validation", corpus.validation)):
            if part.numel() < c.length:
                raise SpecError(
                    f"text folder {corpus.folder}: its {name} part has {part.numel()} bytes, fewer than one window of "
                    f"length = {c.length}"
                )
        return corpus

    @property
    def shown(self) -> Shown:
        where = "the Python standard library's source" if self.config.folder is None else f"'{self.config.folder}'"
        return Shown(
            metric="bits_per_byte",
            label="bits a byte",
            maximise=False,
            about=(
                f"Byte-level language modelling of {where}, split by file: {len(self.corpus.train_files)} files to "
                f"train on, {len(self.corpus.validation_files)} to validate. The score is the mean bits a byte over "
                f"{self.config.examples} windows of {self.config.length} bytes of the latter; lower is better."
            ),
            level_axis="bytes before the one to be told, from here to twice as many",
            levels=tuple((start, f"bits_per_byte@{start}") for start in self._buckets),
        )

    def fingerprint(self) -> dict[str, Any]:
        # The text itself counts, not where it lies: another Python's library is another task.
        words = dataclasses.asdict(self.config)
        del words["folder"], words["max_bytes"]
        return {"type": self.type, **words, "text": self.corpus.digest}

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        text = self.corpus.train
        starts = torch.randint(text.numel() - self.config.length + 1, (batch_size,), generator=generator)
        ids = self._windows(text, starts)
        return Batch(ids, ids)

    @property
    def _buckets(self) -> list[int]:
        """Where each bucket of positions starts, counted in the bytes before: 1, 2, 4, ..., the last cut short."""
        return [2**i for i in range((self.config.length - 1).bit_length())]

    def evaluate(self, model: nn.Module, device: torch.device, quick: bool = False) -> dict[str, float]:
        text = self.corpus.validation
        count = self.config.quick_examples if quick else self.config.examples
        starts = torch.linspace(0, text.numel() - self.config.length, count, dtype=torch.float64).long()
        nats = torch.zeros(self.config.length - 1, dtype=torch.float64)  # by the bytes before, from 1
        for chunk in starts.split(min(32, max(1, TOKENS_AT_ONCE // self.config.length))):
            ids = self._windows(text, chunk).to(device)
            logits = model(ids).logits[:, :-1].float()
            lost = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            nats += lost.view(len(ids), -1).sum(0).double().cpu()
        bits = nats / count / math.log(2)
        scores = {"bits_per_byte": bits.mean().item()}
        if not quick:
            scores |= {f"bits_per_byte@{n}": bits[n - 1 : 2 * n - 1].mean().item() for n in self._buckets}
        return scores

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(self.config.length)].long()
