"""How a model is trained: one frozen config, the same words in Python, YAML and on the command line.

May import mixers (for the strict schema). loop.py reads it; a study holds one for each task.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hybridzoo.mixers.schema import SpecError

MOST_SEED = 2**63 - 1  # that torch's generators take


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with warm-up and decay, over `steps` batches drawn from `seed`.

    `warmup` counts steps; it is cut to half of `steps`. `schedule` takes the rate from `lr` to `lr * final_lr` over the
    steps after it. `clip` bounds the gradient's norm (0: no bound). `device`, `amp` and `compile` left at `auto` mean:
    a GPU where there is one, and on it bf16 autocast and torch.compile. `graph` replays each step as a CUDA graph (on a
    GPU; a shape of batch is captured once): what a small model takes is mostly the host's time to start its kernels.
    `eval_every` counts steps between evaluations on the way (0: only at the end); `log_every` steps are averaged into
    one point of the history.

    Raises: `SpecError` naming the key, for a value that cannot train.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    final_lr: float = 0.0
    warmup: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    amp: Literal["auto", "bf16", "none"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    graph: bool = False
    eval_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise SpecError(f".{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay", "final_lr", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise SpecError(f".{name}: must not be negative, got {getattr(self, name)}")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SpecError(f".{name}: must be a finite number above 0, got {getattr(self, name)}")
        if self.seed > MOST_SEED:
            raise SpecError(f".seed: must be at most {MOST_SEED:,}, got {self.seed:,}")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise SpecError(f".betas: each must be in [0, 1), got {beta}")
        self._named_device()

    def _named_device(self) -> torch.device | None:
        # Whether the device is there is asked only when training starts: a config may be read on another machine.
        if self.device == "auto":
            return None
        try:
            return torch.device(self.device)
        except RuntimeError:
            raise SpecError(f".device: '{self.device}' is not auto, cpu, cuda or cuda:N") from None

    def device_type(self) -> str:
        """Return `cpu`, `cuda` or another type that `device` stands for here, be there such a device or not."""
        device = self._named_device()
        if device is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return device.type

    def in_bf16(self) -> bool:
        """Whether forward passes run under bf16 autocast."""
        return self.amp == "bf16" or (self.amp == "auto" and self.device_type() == "cuda")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that forward passes run in, of training and of scoring."""
        return torch.autocast(self.device_type(), torch.bfloat16) if self.in_bf16() else contextlib.nullcontext()

    def compiled(self) -> bool:
        """Whether the training step goes through torch.compile."""
        return self.device_type() == "cuda" if self.compile == "auto" else self.compile

    def resolved(self) -> TrainConfig:
        """Return the config with each `auto` replaced by what it stands for here; which GPU stays open."""
        return replace(
            self,
            device=self.device_type() if self.device == "auto" else self.device,
            amp="bf16" if self.in_bf16() else "none",
            compile=self.compiled(),
        )

    def resolve_device(self) -> torch.device:
        """Return the device that `device` stands for here.

        Raises: `SpecError` that names `train.device`, as specs, studies and the command line call it, where there is no
        such device.
        """
        device = self._named_device()
        if device is None:
            return torch.device(self.device_type())
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SpecError(f"train.device: '{self.device}' is asked for, but torch sees no GPU here")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
            raise SpecError(f"train.device: '{self.device}' is asked for, but torch sees only {there} here")
        return device
