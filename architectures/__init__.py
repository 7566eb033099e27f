"""Specs, the model builder and its accounting. May import blocks; training comes next."""

from hybridzoo.architectures.account import Account, Cost, LayerCost, account
from hybridzoo.architectures.cache import HybridCache
from hybridzoo.architectures.generate import generate, stream
from hybridzoo.architectures.loader import list_specs, load_spec, spec_path
from hybridzoo.architectures.model import HybridLM, ModelOutput, ModelState, build_model
from hybridzoo.architectures.pattern import parse_pattern
from hybridzoo.architectures.sampling import Ending, Sampling
from hybridzoo.architectures.serving import Batcher
from hybridzoo.architectures.spec import Layer, Spec, idle_content_gates

__all__ = [
    "Account",
    "Batcher",
    "Cost",
    "Ending",
    "HybridCache",
    "HybridLM",
    "Layer",
    "LayerCost",
    "ModelOutput",
    "ModelState",
    "Sampling",
    "Spec",
    "account",
    "build_model",
    "generate",
    "idle_content_gates",
    "list_specs",
    "load_spec",
    "parse_pattern",
    "spec_path",
    "stream",
]
