"""Functions of tensors: the gated delta rule and the small ops around it. Imports torch only; modules are in mixers."""

from hybridzoo.kernels.flops import gated_delta_rule_flops
from hybridzoo.kernels.gated_delta_rule import gated_delta_rule
from hybridzoo.kernels.state import ContentGate, DeltaState

__all__ = ["ContentGate", "DeltaState", "gated_delta_rule", "gated_delta_rule_flops"]
