"""AdamW as language models use it: which parameters decay, and the learning rate at each step.

May import nothing of hybridzoo but config.py; loop.py puts the two to work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hybridzoo.training.config import TrainConfig

# Gate parameters that may be matrices ([HV, K]: one a head and channel) and are rates or offsets all the same.
_RATES = frozenset({"A_log", "dt_bias", "D"})


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Say whether weight decay applies: matrices and convolutions, but no norm, bias, or rate of a gate.

    A parameter marked `_no_weight_decay` (as Mamba's code marks its own) is left alone too.
    """
    leaf = name.rpartition(".")[2]
    if parameter.ndim < 2 or leaf in _RATES or leaf.endswith("bias"):
        return False
    return not getattr(parameter, "_no_weight_decay", False)


def build_optimiser(model: nn.Module, config: TrainConfig, capturable: bool = False) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of `model`, in two groups: with weight decay and without.

    With `capturable` its steps can be captured in a CUDA graph: the learning rate is then a tensor on the device.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameters")
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.tensor(config.lr, device=named[0][1].device) if capturable else config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        capturable=capturable,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` (from 0): a linear warm-up that starts above 0, then the schedule.

    A warm-up longer than half of the steps is cut to that, so that a short training reaches the peak too.
    """
    warmup = min(config.warmup, config.steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    left = (step - warmup) / max(1, config.steps - warmup)
    left = min(left, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * left)) if config.schedule == "cosine" else 1 - left
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of `optimiser` the same rate."""
    groups: Iterable[dict[str, object]] = optimiser.param_groups
    for group in groups:
        if isinstance(group["lr"], Tensor):  # a captured step reads it where it lies
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
