"""A small hybrid whose caches are of every kind, for tests of serving."""

from __future__ import annotations

import torch

from hybridzoo.architectures import HybridLM, Spec, build_model


def small_model(**changes: object) -> HybridLM:
    """A stack of `c w a` unless `changes`, keys of its spec, say otherwise; its content gates act from the start."""
    data = {
        "name": "small",
        "d_model": 16,
        "vocab_size": 11,
        "mixers": {
            "a": {"type": "attention", "n_heads": 2},
            "w": {"type": "attention", "n_heads": 2, "window": 5},
            "c": {"type": "carve", "n_heads": 2, "head_dim": 8, "content_chunk": 8, "content_rank": 2},
            "m": {"type": "mamba2", "n_heads": 4, "head_dim": 8, "state_dim": 8},
        },
        "layers": "c w a",
        "init": {"std": 0.5},
        "tie_embeddings": False,
    }
    torch.manual_seed(0)
    model = build_model(Spec.from_dict(data | changes))
    for name, parameter in model.named_parameters():
        if "content_up" in name:
            torch.nn.init.normal_(parameter)
    return model
