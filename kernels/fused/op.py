"""The Triton backend as an operator (recurrence_op.py). Imports triton when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.checks import check_bounds, check_counts
from hybridzoo.kernels.fused.form import form_of
from hybridzoo.kernels.fused.room import room
from hybridzoo.kernels.recurrence_op import N_FLOATS, N_TENSORS, Call, delta_rule, parted, register


def _forward(call: Call, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from hybridzoo.kernels.fused import forward

    check_values(call)
    dense = contiguous(call)
    return forward.run(dense, form_of(dense), save)


def _backward(call: Call, kept: list[Tensor], o: Tensor | None, d_results: list[Tensor | None]) -> list[Tensor | None]:
    from hybridzoo.kernels.fused import backward

    dense = contiguous(call)
    d_o, *d_ends = d_results
    form = form_of(dense, ends=any(d is not None for d in d_ends))
    d_o = torch.zeros_like(dense.v) if d_o is None else d_o.contiguous()
    if form.ends:
        d_ends = [
            call.q.new_zeros(shape, dtype=torch.float32) if d is None else d.contiguous()
            for d, shape in zip(d_ends, call.of_ends, strict=False)
        ]
    gradients = backward.run(dense, form, kept, o, (d_o, *parted(d_ends)))
    pairs = zip(gradients, call.tensors[:N_FLOATS], strict=True)
    return [d if d is None or x is None or d.dtype == x.dtype else d.to(x.dtype) for d, x in pairs]


def contiguous(call: Call) -> Call:
    """The call as the kernels read it: dense tensors, and the content pair in float32."""
    tensors = call.tensors
    if not all(x is None or x.is_contiguous() for x in tensors):
        dense = [x if x is None else x.contiguous() for x in tensors]
        call = Call(*dense, *call[N_TENSORS:])  # type: ignore[arg-type]
    if call.down is None or call.up is None:
        return call
    return call._replace(down=call.down.float(), up=call.up.float())


def check_values(call: Call) -> None:
    """Refuse wrong counts and bounds where they lie in host memory; elsewhere reading them would stop the host."""
    if call.q.device.type != "cpu":
        return
    if call.count is not None:
        check_counts(call.count.tolist(), call.chunk)
    if call.cu_seqlens is not None:
        check_bounds(call.cu_seqlens.tolist(), call.q.shape[1])


_forward_op = register("fused_delta_rule", room=room, forward=_forward, backward=_backward)
fused_delta_rule = delta_rule(_forward_op)
