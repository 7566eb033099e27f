"""The host's side of the staged way: what needs no state runs for all blocks at once, and little is serial.

Without a content gate a block of tokens is known before the state that meets it. The forward pass is `prepare` (all
blocks) and `scan` (block after block); the backward pass `prepare` again, `scan_back`, and the gradients of values and
of keys (all blocks). Figures and what was tried: benchmarks/NOTES.md.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, C slots in a block, N sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.fused.config import StagedConfig, options, power, staged_config
from hybridzoo.kernels.fused.key_gradients import key_gradients_kernel
from hybridzoo.kernels.fused.launch import MODES, Launch, flags, joined, kind
from hybridzoo.kernels.fused.prepare import prepare_kernel
from hybridzoo.kernels.fused.room import n_blocks
from hybridzoo.kernels.fused.scan import scan_kernel
from hybridzoo.kernels.fused.scan_back import scan_back_kernel
from hybridzoo.kernels.fused.value_gradients import value_gradients_kernel
from hybridzoo.kernels.recurrence_op import Call


class _Blocks(NamedTuple):
    """What `prepare` says of every block, `[blocks, HV, ...]`: `[C, K]`, `[C, V]`, `[C, K]` twice, `[C, C]`, `[K]`."""

    W: Tensor | None
    U: Tensor | None
    qE: Tensor
    kZ: Tensor
    P: Tensor
    total: Tensor | None


def forward(call: Call, room: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence on a contiguous `call`: o, S, o_sum and o_mean, and with `save` a full `room`."""
    o, S = torch.empty_like(call.v), torch.empty_like(call.S)
    for launch in forward_launches(call, room, save, o, S):
        launch.start(call.q.device)
    return o, S, call.o_sum.clone(), call.o_mean.clone()


def forward_launches(call: Call, room: list[Tensor], save: bool, o: Tensor, S: Tensor) -> list[Launch]:
    """The kernels of the forward pass, in their order."""
    states, news, inverses = room[:3]
    config = staged_config(call, save)
    blocks = n_blocks(call, config.block)
    corrected = call.correct is not None
    if not save:
        inverses = states.new_empty(blocks if corrected else 0, call.v.shape[2], config.block, config.block)
    # Where nothing is corrected U is N, which the backward pass reads.
    U = news if save and not corrected else states.new_empty(blocks, call.v.shape[2], config.block, call.v.shape[3])
    made = _new_blocks(call, config, blocks, states.dtype, U)
    scan = Launch(
        scan_kernel,
        (call.S.shape[0] * call.v.shape[2], triton.cdiv(call.v.shape[3], config.scan_v)),
        {
            **made._asdict(),
            "S0": call.S,
            "cu": call.cu_seqlens,
            "o": o,
            "S1": S,
            "states": states,
            "news": news if corrected else None,
            **_sizes(call, "T", "HV", "K", "V"),
        },
        {**_scan_constants(call, config), "SAVE": save},
        options(config.scan_warps, config.scan_stages),
    )
    return [_prepare(call, config, blocks, made, inverses, _table(call, config.block), again=False), scan]


def backward(call: Call, room: list[Tensor], d_results: list[Tensor]) -> list[Tensor | None]:
    """Run the backward pass on a contiguous `call`: its first twelve fields' gradients, None where one is off."""
    launches, buffers = backward_launches(call, room, d_results)
    for launch in launches:
        launch.start(call.q.device)
    group = call.v.shape[2] // call.q.shape[2]
    return [
        joined(buffers["dq"][None], call.q, group),
        joined(buffers["dk"][None], call.k, group),
        *(buffers["dv"], buffers["dg"], buffers["dz"], None, None, buffers["de"], buffers["dw"], buffers["dS0"]),
        *(d.clone() for d in d_results[2:]),
    ]


def backward_launches(call: Call, room: list[Tensor], d_results: list[Tensor]) -> tuple[list[Launch], dict[str, Any]]:
    """The kernels of the backward pass, in their order, and the gradients that they write."""
    states, news, inverses = room[:3]
    d_o, d_S = d_results[:2]
    config = staged_config(call, True)
    blocks, grid = states.shape[0], (states.shape[0], call.v.shape[2])
    table = _table(call, config.block)
    made = _new_blocks(call, config, blocks, states.dtype, None)
    corrected = call.correct is not None
    per_value_head = (*call.q.shape[:2], call.v.shape[2], call.q.shape[3])
    grouped = call.q.shape[2] != call.v.shape[2]

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty_like(x)

    buffers: dict[str, Any] = {
        "dq": call.q.new_empty(per_value_head, dtype=torch.float32 if grouped else None),
        "dk": call.q.new_empty(per_value_head, dtype=torch.float32 if grouped else None),
        "dv": torch.empty_like(call.v),
        "dg": like(call.log_decay),
        "dz": like(call.erase_logits),
        "de": like(call.correct),
        "dw": like(call.write),
        "dS0": torch.empty_like(call.S),
    }
    dstates, dnews = torch.empty_like(states), torch.empty_like(news)
    dP, dA = torch.empty_like(made.P), torch.empty_like(made.P) if corrected else None
    scan_back = Launch(
        scan_back_kernel,
        (call.S.shape[0] * call.v.shape[2], triton.cdiv(call.v.shape[3], config.scan_v)),
        {
            **{name: value for name, value in made._asdict().items() if name != "U"},
            "do": d_o,
            "dS1": d_S,
            "cu": call.cu_seqlens,
            "dS0": buffers["dS0"],
            "dstates": dstates,
            "dnews": dnews,
            **_sizes(call, "T", "HV", "K", "V"),
        },
        _scan_constants(call, config),
        options(config.scan_warps, config.scan_stages),
    )
    values = Launch(
        value_gradients_kernel,
        grid,
        {
            "v": call.v,
            "w": call.write,
            "table": table,
            "states": states,
            "dstates": dstates,
            "news": news,
            "dnews": dnews,
            "X": inverses if corrected else None,
            "do": d_o,
            "dv": buffers["dv"],
            "dw": buffers["dw"],
            "dP": dP,
            "dA": dA,
            "d_qE": made.qE,
            "d_kZ": made.kZ,
            "d_eE": made.W,
            "total": made.total,
            **_sizes(call, "T", "H", "HV", "K", "V"),
        },
        {
            "C": config.block,
            "BK": power(call.q.shape[3]),
            "BV": power(call.v.shape[3]),
            "D": config.value_k,
            "DV": config.value_v,
            "DECAYS": made.total is not None,
            "CORRECT": kind(call.correct),
            "WRITE": kind(call.write),
            "VARLEN": call.cu_seqlens is not None,
            "MODE": MODES[call.q.dtype][0],
        },
        options(config.value_warps),
    )
    keys = Launch(
        key_gradients_kernel,
        grid,
        {
            "q": call.q,
            "k": call.k,
            "g": call.log_decay,
            "z": call.erase_logits,
            "e": call.correct,
            "table": table,
            "dP": dP,
            "dA": dA,
            "d_qE": made.qE,
            "d_kZ": made.kZ,
            "d_eE": made.W,
            "d_total": made.total,
            **{name: buffers[name] for name in ("dq", "dk", "dg", "dz", "de")},
            "scale": float(call.scale),
            **_sizes(call, "T", "H", "HV", "K"),
        },
        {**flags(call), "C": config.block, "BK": power(call.q.shape[3]), "D": config.key_k},
        options(config.key_warps),
    )
    return [_prepare(call, config, blocks, made, inverses, table, again=True), scan_back, values, keys], buffers


def _new_blocks(call: Call, config: StagedConfig, blocks: int, dtype: torch.dtype, U: Tensor | None) -> _Blocks:
    HV, K, C = call.v.shape[2], call.q.shape[3], config.block

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return call.q.new_empty(blocks, HV, *shape, dtype=dtype)

    decays = call.log_decay is not None or call.erase_logits is not None
    return _Blocks(
        W=None if call.correct is None else new(C, K),
        U=U,
        qE=new(C, K),
        kZ=new(C, K),
        P=new(C, C),
        total=new(K, dtype=torch.float32) if decays else None,
    )


def _prepare(
    call: Call, config: StagedConfig, blocks: int, made: _Blocks, X: Tensor, table: Tensor | None, again: bool
) -> Launch:
    _, exact = MODES[call.q.dtype]
    return Launch(
        prepare_kernel,
        (blocks, call.v.shape[2]),
        {
            "q": call.q,
            "k": call.k,
            "v": call.v,
            "g": call.log_decay,
            "z": call.erase_logits,
            "e": call.correct,
            "w": call.write,
            "table": table,
            **made._asdict(),
            "X": X if call.correct is not None else None,
            "scale": float(call.scale),
            **_sizes(call, "T", "H", "HV", "K", "V"),
        },
        {
            **flags(call),
            "C": config.block,
            "BK": power(call.q.shape[3]),
            "BV": power(call.v.shape[3]),
            "D": config.prepare_k,
            "WRITE": kind(call.write),
            "EXACT": exact,
            "AGAIN": again,
            # Beside bf16 products one pass of tf32 is exact enough for what joins two inverses of 16.
            "MERGE": "tf32" if call.q.dtype == torch.bfloat16 else exact,
        },
        options(config.prepare_warps),
    )


def _scan_constants(call: Call, config: StagedConfig) -> dict[str, Any]:
    return {
        "C": config.block,
        "BK": power(call.q.shape[3]),
        "BV": config.scan_v,
        "DECAYS": call.log_decay is not None or call.erase_logits is not None,
        "CORRECT": call.correct is not None,
        "VARLEN": call.cu_seqlens is not None,
        "MODE": MODES[call.q.dtype][0],
        "STAGES": config.scan_stages,
    }


def _sizes(call: Call, *names: str) -> dict[str, int]:
    (_, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    sizes = {"T": T, "H": H, "HV": HV, "K": K, "V": V}
    return {name: sizes[name] for name in names}


def _table(call: Call, C: int) -> Tensor | None:
    """Start and length of every block of packed sequences: int32 `[blocks, 2]`; None where rows are of one length."""
    cu = call.cu_seqlens
    if cu is None:
        return None
    N = cu.numel() - 1
    blocks = torch.arange(n_blocks(call, C), device=cu.device)
    first = cu[:-1] // C + torch.arange(N, device=cu.device)
    n = torch.searchsorted(first, blocks, right=True) - 1
    at = (blocks - first[n]) * C
    return torch.stack([cu[n] + at, (cu.diff()[n] - at).clamp(0, C)], 1).int().contiguous()
