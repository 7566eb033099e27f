"""Byte-level language modelling of a folder of text, scored in bits a byte on files that were not trained on.

The default folder is the standard library of the running Python, so the text is real and on every machine. May import
training.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.base import Shown, register_task
from hybridzoo.studies.tasks.language import A_BIT, LanguageConfig, LanguageTask
from hybridzoo.training import ByteCorpus, load_bytes
from hybridzoo.training.data import NOT_SOURCE


@dataclass(frozen=True, kw_only=True)
class ByteLmConfig(LanguageConfig):
    """The text (see `load_bytes`; `folder: null` is the standard library), beside the words of `LanguageConfig`."""

    folder: str | None = None
    pattern: str = "*.py"
    exclude: tuple[str, ...] = NOT_SOURCE
    validation: float = 0.1
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_bytes < 1:
            raise SpecError(f".max_bytes: must be at least 1, got {self.max_bytes}")
        if not 0 < self.validation < 1:
            raise SpecError(f".validation: must be a share between 0 and 1, got {self.validation}")


@register_task("bytes")
class ByteLm(LanguageTask):
    """The task. A token is a byte; scores are in bits: `bits_per_byte`, and `bits_per_byte@N` by position."""

    Config = ByteLmConfig
    config: ByteLmConfig
    metric_name = "bits_per_byte"
    a_nat = A_BIT

    @property
    def vocab_size(self) -> int:
        return 256

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
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.corpus.train, self.corpus.validation

    @property
    def shown(self) -> Shown:
        where = "the Python standard library's source" if self.config.folder is None else f"'{self.config.folder}'"
        return Shown(
            metric=self.metric_name,
            label="bits a byte",
            maximise=False,
            about=(
                f"Byte-level language modelling of {where}, split by file: {len(self.corpus.train_files)} files to "
                f"train on, {len(self.corpus.validation_files)} to validate. The score is the mean bits a byte over "
                f"{self.config.examples} windows of {self.config.length} bytes of the latter; lower is better."
            ),
            level_axis="bytes before the one to be told, from here to twice as many",
            levels=self.levels,
        )

    def fingerprint(self) -> dict[str, Any]:
        # The text itself counts, not where it lies: another Python's library is another task.
        words = dataclasses.asdict(self.config)
        del words["folder"], words["max_bytes"]
        return {"type": self.type, **words, "text": self.corpus.digest}
