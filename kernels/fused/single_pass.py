"""The host's side of the single pass: one kernel holds a head's state and goes through its tokens, tile after tile.

The way of the content gate, which must know the output of one content chunk before it knows the decays of the next.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences, P parts that a gradient is summed of.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.fused.backward import backward_kernel
from hybridzoo.kernels.fused.config import Config, configs, options, power
from hybridzoo.kernels.fused.forward import forward_kernel
from hybridzoo.kernels.fused.launch import MODES, Launch, flags, joined, kind
from hybridzoo.kernels.fused.room import chunk_starts
from hybridzoo.kernels.recurrence_op import Call


def forward(call: Call, room: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel on a contiguous `call`: o, S, o_sum and o_mean, and with `save` a full `room`."""
    results = tuple(torch.empty_like(x) for x in (call.v, call.S, call.o_sum, call.o_mean))
    forward_launch(call, room, save, results).start(call.q.device)
    return results  # type: ignore[return-value]


def forward_launch(call: Call, room: list[Tensor], save: bool, results: tuple[Tensor, ...]) -> Launch:
    """The forward kernel on a contiguous `call`, writing `results`."""
    K, V = call.q.shape[3], call.v.shape[3]
    o, S1, sum1, mean1 = results
    states, news, inverses, means = room
    config = configs(K, V, call.chunk > 0, call.q.dtype)[0]
    arguments = {
        **_inputs(call),
        "S0": call.S,
        "sum0": call.o_sum,
        "mean0": call.o_mean,
        "o": o,
        "S1": S1,
        "sum1": sum1,
        "mean1": mean1,
        "states": states,
        "news": news,
        "inverses": inverses,
        "means": means,
        **_sizes(call),
    }
    constants = {**_constants(call, config), "SAVE": save, "EXACT": MODES[call.q.dtype][1]}
    return _launch(forward_kernel, call, config, arguments, constants)


def backward(call: Call, room: list[Tensor], d_results: list[Tensor]) -> list[Tensor | None]:
    """Run the backward kernel on a contiguous `call`: its first twelve fields' gradients, None where one is off."""
    launch, buffers = backward_launch(call, room, d_results)
    launch.start(call.q.device)
    d_down = d_up = None
    if call.down is not None and call.up is not None:
        d_down, d_up = _content_gradients(call.down, call.up, room[3], buffers["du_out"])
    group = call.v.shape[2] // call.q.shape[2]
    return [
        joined(buffers["dq"], call.q, group),
        joined(buffers["dk"], call.k, group),
        buffers["dv"],
        joined(buffers["dg"], call.log_decay),
        joined(buffers["dz"], call.erase_logits),
        d_down,
        d_up,
        joined(buffers["de"], call.correct),
        joined(buffers["dw"], call.write),
        buffers["dS0"],
        buffers["dsum0"],
        buffers["dmean0"],
    ]


def backward_launch(call: Call, room: list[Tensor], d_results: list[Tensor]) -> tuple[Launch, dict[str, Any]]:
    """The backward kernel on a contiguous `call`, and the buffers it writes, gradients of several parts still apart."""
    (B, T, _, K), (HV, V) = call.q.shape, call.v.shape[2:]
    config = configs(K, V, call.chunk > 0, call.q.dtype)[1]
    parts = triton.cdiv(V, config.block_v)
    d_o, d_S, d_sum, d_mean = d_results

    def partial(x: Tensor | None, shape: torch.Size | tuple[int, ...] | None = None) -> Tensor | None:
        if x is None:
            return None
        shape = x.shape if shape is None else shape
        whole = parts == 1 and tuple(shape) == tuple(x.shape)
        return x.new_empty(parts, *shape, dtype=x.dtype if whole else torch.float32)

    buffers = {
        "dq": partial(call.q, (B, T, HV, K)),
        "dk": partial(call.k, (B, T, HV, K)),
        "dv": torch.empty_like(call.v),
        "dg": partial(call.log_decay),
        "dz": partial(call.erase_logits),
        "de": partial(call.correct),
        # A write gate of one number a value channel has its gradient in that channel's own program.
        "dw": call.write.new_empty(1, *call.write.shape) if kind(call.write) == 2 else partial(call.write),  # type: ignore[union-attr]
        "dS0": torch.empty_like(call.S),
        "dsum0": torch.empty_like(call.o_sum),
        "dmean0": torch.empty_like(call.o_mean),
        "du_out": room[3].new_zeros(*room[3].shape[:2], K) if call.chunk else None,
    }
    arguments = {
        **_inputs(call),
        **dict(zip(("states", "news", "inverses", "means"), room, strict=True)),
        "do": d_o,
        "dS1": d_S,
        "dsum1": d_sum,
        "dmean1": d_mean,
        **buffers,
        **_sizes(call),
        "tokens": B * T,
    }
    return _launch(backward_kernel, call, config, arguments, _constants(call, config)), buffers


def _launch(kernel: Any, call: Call, config: Config, arguments: dict[str, Any], constants: dict[str, Any]) -> Launch:
    blocks = triton.cdiv(call.v.shape[3], config.block_v)
    return Launch(
        kernel,
        (call.S.shape[0] * call.v.shape[2], blocks),
        arguments,
        constants,
        options(config.num_warps, config.num_stages),
    )


def _inputs(call: Call) -> dict[str, Any]:
    return {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "g": call.log_decay,
        "z": call.erase_logits,
        "e": call.correct,
        "w": call.write,
        "down": call.down,
        "up": call.up,
        "count0": call.count,
        "cu": call.cu_seqlens,
        "chunk_at": chunk_starts(call) if call.chunk else None,
    }


def _sizes(call: Call) -> dict[str, Any]:
    (_, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    return {"T": T, "scale": float(call.scale), "H": H, "HV": HV, "K": K, "V": V}


def _constants(call: Call, config: Config) -> dict[str, Any]:
    """What the compiler knows: block sizes, the flags, and the precision of products."""
    rank = 1 if call.down is None else call.down.shape[1]
    return {
        "BK": power(call.q.shape[3]),
        "BV": config.block_v,
        "BR": power(rank),
        "RANK": rank,
        **flags(call),
        "WRITE": kind(call.write),
        "CONTENT": call.chunk,
    }


def _content_gradients(down: Tensor, up: Tensor, means: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the content pair, given `u`'s `[chunks, HV, K]` and the means `[chunks, HV, V]` it was read from."""
    hidden = torch.tanh(torch.einsum("hrv,nhv->nhr", down, means))
    d_hidden = torch.einsum("hkr,nhk->nhr", up, du) * (1 - hidden * hidden)
    return torch.einsum("nhr,nhv->hrv", d_hidden, means), torch.einsum("nhk,nhr->hkr", du, hidden)
