"""What the tests of whole models share: the shipped specs by size, and small models of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from hybridzoo.architectures import HybridLM, build_model, list_specs, load_spec

TINY = [name for name in list_specs() if name.endswith("-tiny")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `tiny_spec` every tiny spec, and one that asks for `any_spec` every spec."""
    if "tiny_spec" in metafunc.fixturenames:
        metafunc.parametrize("tiny_spec", TINY)
    if "any_spec" in metafunc.fixturenames:
        metafunc.parametrize("any_spec", list_specs())


@pytest.fixture
def shallow() -> Callable[..., HybridLM]:
    """Build the last two layers of a spec, which hold each of its mixers, with every gate of theirs at work."""

    def build(name: str, overrides: Sequence[str] = (), dtype: torch.dtype = torch.float64) -> HybridLM:
        spec = load_spec(name, overrides)
        end = dataclasses.replace(spec, layers=spec.layers[-2:])
        assert {layer.label for layer in end.layers} == {layer.label for layer in spec.layers}
        torch.manual_seed(0)
        model = build_model(end, dtype=dtype)
        for key, parameter in model.named_parameters():
            if key.endswith("content_up"):  # zero at init, which would leave CARVE's readout untested
                nn.init.normal_(parameter, std=0.5)
        return model

    return build
