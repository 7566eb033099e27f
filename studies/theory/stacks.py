"""The separation at a stack's size: four layers trained on the task `overwrite`, where key and value are two tokens.

What `--full` adds to the tiny models of trained.py. May import architectures, training and the tasks.
"""

from __future__ import annotations

import torch

from hybridzoo.architectures import Spec, build_model
from hybridzoo.mixers.schema import SpecError
from hybridzoo.studies.equalise import equalise, parameters
from hybridzoo.studies.tasks import StudyTask, build_task
from hybridzoo.training import TrainConfig, train

# Learnt in some hundred steps, and with more pairs than a head has key channels.
PAIRS = {"type": "overwrite", "pairs": 16, "overwrites": 8, "keys": 32, "values": 16, "examples": 256}
TOLERANCE = 0.01


def overwrite_task(steps: int) -> StudyTask:
    """Build the task, with fewer pairs in the first half of `steps`."""
    quarter = max(1, steps // 4)
    return build_task({**PAIRS, "curriculum": [{"pairs": 4, "steps": quarter}, {"pairs": 8, "steps": quarter}]})


def stack(mixer: str, task: StudyTask) -> Spec:
    """Return a stack of four layers of `mixer`, with what lets recall be found in few steps (see yaml/studies)."""
    return Spec.from_dict(
        {
            "name": mixer,
            "d_model": 64,
            "vocab_size": task.vocab_size,
            "mixer_defaults": {"conv_size": 4, "conv_init": "mean", "qk_init": "equal"},
            "mixers": {"m": {"type": mixer, "n_heads": 4, "head_dim": 8, "content_chunk": 16, "content_rank": 8}},
            "layers": "m*4",
            "ffn": {"type": "swiglu", "width": 96},
            "tie_embeddings": False,
            "init": {"std": 1.0, "head_std": 0.6, "residual_scale": False},
        }
    )


def train_stack(mixer: str, like: str, steps: int, seed: int) -> tuple[int, dict[str, float], float]:
    """Train a stack of `mixer` with the parameters of one of `like`; return its size, its scores and its last loss.

    Raises: `SpecError` where the sizes cannot be brought within 1 % of each other.
    """
    task = overwrite_task(steps)
    held = equalise(stack(mixer, task), parameters(stack(like, task)), TOLERANCE)
    if not held.reached:
        raise SpecError(f"stack of {mixer}: {held.why}")
    config = TrainConfig(steps=steps, batch_size=16, lr=1e-2, seed=seed, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        history = train(build_model(held.spec), task, config)
    return round(held.value), history.metrics, history.loss[-1]
