"""Specs, the model builder and its accounting. May import blocks; training comes next."""

from hybridzoo.architectures.account import Account, Cost, LayerCost, account
from hybridzoo.architectures.generate import generate
from hybridzoo.architectures.loader import list_specs, load_spec, spec_path
from hybridzoo.architectures.model import HybridLM, ModelOutput, ModelState, build_model
from hybridzoo.architectures.pattern import parse_pattern
from hybridzoo.architectures.spec import Layer, Spec

__all__ = [
    "Account",
    "Cost",
    "HybridLM",
    "Layer",
    "LayerCost",
    "ModelOutput",
    "ModelState",
    "Spec",
    "account",
    "build_model",
    "generate",
    "list_specs",
    "load_spec",
    "parse_pattern",
    "spec_path",
]
