"""The Triton backend as an operator (recurrence_op.py). Imports triton, through launch.py, when it first runs."""

from __future__ import annotations

from torch import Tensor

from hybridzoo.kernels.fused.room import room
from hybridzoo.kernels.recurrence_op import Call, delta_rule, register


def _forward(call: Call, kept: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hybridzoo.kernels.fused import launch

    return launch.forward(call, kept, save)


def _backward(call: Call, kept: list[Tensor], d_results: list[Tensor | None]) -> list[Tensor | None]:
    from hybridzoo.kernels.fused import launch

    return launch.backward(call, kept, d_results)


_forward_op = register("fused_delta_rule", room=room, forward=_forward, backward=_backward)
fused_delta_rule = delta_rule(_forward_op)
