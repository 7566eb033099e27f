"""How many operators a decode step takes: on a GPU each is a kernel, and to start it costs more than a small step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.architectures import Spec, build_model
from hybridzoo.architectures.decoding import Decoder

# Of a layer without an FFN, its norm included, on a CPU. There a short convolution is twelve operators, on a GPU one.
MOST = {"attention": 30, "windowed": 40, "gdn2": 69}
NOTHING = ("aten::_unsafe_view", "aten::promote_types")  # operators that start no kernel


class Operators(TorchDispatchMode):
    """Within, `names` counts every operator called, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and function._schema.name not in NOTHING:
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operators(layers: str) -> Counter[str]:
    data = {
        "name": "small",
        "d_model": 32,
        "vocab_size": 16,
        "mixers": {
            "gdn2": {"type": "gdn2", "n_heads": 2, "head_dim": 16},
            "attention": {"type": "attention", "n_heads": 2},
            "windowed": {"type": "attention", "n_heads": 2, "n_kv_heads": 1, "window": 8, "qk_norm": "l2"},
        },
        "layers": layers,
        "ffn": {"type": "none"},
    }
    model = build_model(Spec.from_dict(data))
    cache = model.init_cache(3)
    model(torch.zeros(3, 5, dtype=torch.int64), state=cache)
    decoder, tokens, live = Decoder(model, cache), torch.zeros(3, dtype=torch.int64), [True, True, False]
    decoder(tokens, live)
    with Operators() as found:
        decoder(tokens, live)
    return found.names


@pytest.mark.parametrize("mixer", MOST)
def test_a_layer_takes_no_more_operators_than_it_did(mixer: str) -> None:
    two, eight = operators(f"{mixer}*2"), operators(f"{mixer}*8")
    assert (eight.total() - two.total()) / 6 <= MOST[mixer]


@pytest.mark.parametrize("layers", ["attention windowed", "(attention windowed)*4"])
def test_what_follows_from_positions_is_made_once_a_step(layers: str) -> None:
    found = operators(layers)
    assert found["aten::cos"] == found["aten::sin"] == 1
    assert found["aten::gt"] == 2  # the slots not to be seen: of a ring, and of full attention
    assert found["aten::remainder"] == 1
