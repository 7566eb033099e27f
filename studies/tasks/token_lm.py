"""Language modelling of token files: text that a tokenizer has made numbers of, in the nats of a token.

A file is a flat array, raw (`.bin`) or NumPy's (`.npy`), as most pipelines that prepare a corpus write them. It is
mapped into memory, never read whole. May import training.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.tasks.base import Shown, register_task
from hybridzoo.studies.tasks.language import LanguageConfig, LanguageTask

BLOCK, BLOCKS = 2**16, 1024  # bytes, and how many such blocks of a file are looked at to know it again


@dataclass(frozen=True, kw_only=True)
class TokenLmConfig(LanguageConfig):
    """The files, beside the words of `LanguageConfig`.

    `train_file` and `validation_file` are paths of `.bin` or `.npy` files of token numbers, from 0 to below
    `vocab_size`. `dtype` is of raw files; a `.npy` file knows its own.
    """

    train_file: str
    validation_file: str
    vocab_size: int
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_file", "validation_file"):
            if Path(getattr(self, name)).suffix not in (".bin", ".npy"):
                raise SpecError(f".{name}: expected a .bin or .npy file, got '{getattr(self, name)}'")
        if self.train_file == self.validation_file:
            raise SpecError(f".validation_file: is the train_file too, '{self.train_file}': nothing would be held out")
        if self.vocab_size < 2:
            raise SpecError(f".vocab_size: must be at least 2, got {self.vocab_size}")


@register_task("tokens")
class TokenLm(LanguageTask):
    """The task. Scores are in nats: `nats_per_token`, whose exponential is the perplexity, and by position."""

    Config = TokenLmConfig
    config: TokenLmConfig
    metric_name = "nats_per_token"

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @functools.cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Both files, mapped when first needed.

        Raises: `SpecError` where one is missing, is no such array, or has too little for one window.
        """
        return self._map(self.config.train_file), self._map(self.config.validation_file)

    def _map(self, given: str) -> Tensor:
        import numpy as np

        path = Path(given).expanduser()
        try:
            if path.suffix == ".npy":
                array = np.lib.format.open_memmap(path, mode="r")
            else:
                array = np.memmap(path, dtype=self.config.dtype, mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise SpecError(f"token file {path}: {error}") from None
        if array.ndim != 1 or array.dtype.kind not in "ui" or not array.dtype.isnative:
            raise SpecError(
                f"token file {path}: expected a flat array of this machine's whole numbers, got {array.dtype.str} "
                f"{list(array.shape)}"
            )
        if len(array) < self.config.length:
            raise SpecError(
                f"token file {path}: has {len(array):,} tokens, fewer than one window of length = {self.config.length}"
            )
        with warnings.catch_warnings():
            # That it may not be written to. A map that may be would be charged for all of the file's memory.
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)

    def windows(self, text: Tensor, starts: Tensor) -> Tensor:
        ids = super().windows(text, starts)
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.config.vocab_size:
            path = self.config.train_file if text is self.parts[0] else self.config.validation_file
            raise SpecError(
                f"token file {path}: holds the token {low if low < 0 else high:,}, and vocab_size is "
                f"{self.config.vocab_size:,}: another vocabulary, or of another dtype than {text.dtype}"
            )
        return ids

    @property
    def shown(self) -> Shown:
        names = [Path(name).name for name in (self.config.train_file, self.config.validation_file)]
        sizes = [part.numel() for part in self.parts]
        return Shown(
            metric=self.metric_name,
            label="nats a token",
            maximise=False,
            about=(
                f"Language modelling of {names[0]}, {sizes[0]:,} tokens of a vocabulary of {self.vocab_size:,}, "
                f"validated on {names[1]}, {sizes[1]:,} tokens. The score is the mean nats a token over "
                f"{self.config.examples} windows of {self.config.length} tokens of the latter; lower is better, and "
                "its exponential is the perplexity."
            ),
            level_axis="tokens before the one to be told, from here to twice as many",
            levels=self.levels,
        )

    def fingerprint(self) -> dict[str, Any]:
        # What the files hold counts, not where they lie or how they were read.
        words = dataclasses.asdict(self.config)
        del words["train_file"], words["validation_file"], words["dtype"]
        return {"type": self.type, **words, "text": self._digests}

    @functools.cached_property
    def _digests(self) -> list[str]:
        return [_digest(part) for part in self.parts]


def _digest(part: Tensor) -> str:
    """A hash of an array: of all of it up to 64 MiB, of a larger one of its size and of blocks spread over it."""
    content = part.view(torch.uint8)
    found = hashlib.sha256(f"{part.dtype} {part.numel()}".encode())
    starts = torch.linspace(0, max(0, content.numel() - BLOCK), BLOCKS, dtype=torch.float64).long().unique()
    for start in starts.tolist():
        found.update(content[start : start + BLOCK].numpy().tobytes())
    return found.hexdigest()
