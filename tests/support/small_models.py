"""Small hybrids whose caches are of every kind, for tests of caches and of serving."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.architectures import HybridCache, HybridLM, Spec, build_model


def small_model(dtype: torch.dtype | None = None, seed: int = 0, **changes: object) -> HybridLM:
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
    torch.manual_seed(seed)
    model = build_model(Spec.from_dict(data | changes), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "content_up" in name:
            torch.nn.init.normal_(parameter)
    return model


def exact_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> HybridLM:
    """The same in float64 as `c c+w a`, with two mixers side by side in a layer, grouped heads and convolutions."""
    mixers = {
        "a": {"type": "attention", "n_heads": 2, "n_kv_heads": 1},
        "w": {"type": "attention", "n_heads": 2, "window": 5, "conv_size": 3},
        "c": {"type": "carve", "n_heads": 2, "head_dim": 4, "content_chunk": 4, "content_rank": 2},
    }
    return small_model(dtype, seed, **{"mixers": mixers, "layers": "c c+w a", **changes})


def random_ids(vocab_size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def copies(cache: HybridCache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.contents().items()}


def assert_unchanged(cache: HybridCache, before: dict[str, Tensor], lengths: list[int]) -> None:
    after = cache.contents()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert cache.lengths == lengths
