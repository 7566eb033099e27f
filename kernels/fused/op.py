"""The Triton backend as an operator (recurrence_op.py). Imports triton when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.fused.room import room
from hybridzoo.kernels.recurrence_op import N_FLOATS, Call, delta_rule, register


def _forward(call: Call, kept: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hybridzoo.kernels.fused import forward, launch

    launch.check_values(call)
    return forward.run(launch.contiguous(call), kept, save)


def _backward(call: Call, kept: list[Tensor], o: Tensor | None, d_results: list[Tensor | None]) -> list[Tensor | None]:
    from hybridzoo.kernels.fused import backward, launch

    dense = launch.contiguous(call)
    ends = (dense.v, dense.S, dense.o_sum, dense.o_mean)
    given = [torch.zeros_like(x) if d is None else d.contiguous() for d, x in zip(d_results, ends, strict=True)]
    gradients = backward.run(dense, kept, o, given)
    pairs = zip(gradients, call[:N_FLOATS], strict=True)
    return [d.to(x.dtype) if d is not None and isinstance(x, Tensor) else None for d, x in pairs]


_forward_op = register("fused_delta_rule", room=room, forward=_forward, backward=_backward)
fused_delta_rule = delta_rule(_forward_op)
