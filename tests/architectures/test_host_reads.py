"""How often a served step asks the device for a value, which a GPU answers only when it has caught up."""

from __future__ import annotations

import pytest
import torch
from host_reads import HostReads
from small_models import small_model

from hybridzoo.architectures import Batcher, Ending, Sampling, stream

# Of a step on a CPU: its tokens, and what is looked at only in host memory (ids in range, finite logits of live rows).
A_STEP = 1 + 2


def reads_of_steps(layers: str, requests: int) -> dict[str, int]:
    """Reads of a step that requests join, one that goes on, and one in which all but the first leave."""
    batcher = Batcher(small_model(layers=layers), requests)
    for n in range(requests):
        sampling = Sampling(temperature=1.0, seed=n) if n % 2 else None
        batcher.add([n % 11] * (3 + n % 2), 3 if n else 9, sampling=sampling)
    found = {}
    for what in ("join", "go on", "leave"):
        with HostReads() as reads:
            batcher.step()
        found[what] = reads.places.total()
    assert len(batcher) == 1
    return found


def test_a_step_asks_no_more_of_eight_layers_than_of_two_nor_for_more_requests() -> None:
    found = {(layers, n): reads_of_steps(layers, n) for layers in ("w c", "(w c a m)*2") for n in (2, 8)}
    first = found["w c", 2]
    assert all(reads == first for reads in found.values()), found
    assert first["go on"] == first["leave"] == A_STEP
    # Packed prompts: looked at in host memory (3) and cut into groups of like length there (5).
    assert first["join"] <= A_STEP + 8


@pytest.mark.parametrize("ending", [Ending(), Ending(eos=10), Ending(eos=10, stop=("none",), decode=str)])
def test_a_stream_reads_its_tokens_once_a_step(ending: Ending) -> None:
    steps = stream(
        small_model(layers="w c"), [[1, 2], [3, 4]], 9, sampling=Sampling(temperature=1.0, seed=0), ending=ending
    )
    next(steps)
    with HostReads() as reads:
        next(steps)
    assert reads.places.total() == A_STEP


def test_a_read_in_each_layer_would_be_seen() -> None:
    model, found = small_model(layers="w c w c"), []

    def look(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, object]) -> None:
        assert bool(output[0].isfinite().all())

    for block in model.blocks:
        block.register_forward_hook(look)
    batcher = Batcher(model, 1)
    batcher.add([1, 2], 4)
    for _ in range(2):
        with HostReads() as reads:
            batcher.step()
        found.append(reads.places.total())
    assert found[1] == A_STEP + 4
