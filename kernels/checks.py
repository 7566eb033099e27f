"""What `gated_delta_rule` refuses, and how it says so.

Shapes: B batch, T time, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank,
N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hybridzoo.kernels.state import ContentGate, DeltaState


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    content: ContentGate | None,
    correct: Tensor | None,
    write: Tensor | None,
    erase_value: Tensor | None,
    predict: str,
) -> None:
    """Raise `ValueError` or `TypeError` that names the first argument whose shape, dtype or device is wrong."""
    given: dict[str, object] = {"q": q, "k": k, "v": v}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if v.ndim != 4 or q.ndim != 4:
        raise ValueError(f"q and v must be [B, T, heads, dim]; got q {_dims(q)}, v {_dims(v)}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    _expect("k", k, [(B, T, H, K)])
    _expect("v", v, [(B, T, HV, V)])
    if H == 0 or HV == 0 or HV % H:
        raise ValueError(f"v has {HV} heads, which is not a multiple of the {H} heads of q and k")
    if K == 0 or V == 0:
        raise ValueError(f"head sizes must be at least 1, got K = {K} and V = {V}")
    _expect("log_decay", log_decay, [(B, T, HV), (B, T, HV, K)])
    _expect("erase_logits", erase_logits, [(B, T, HV, K)])
    _expect("correct", correct, [(B, T, HV), (B, T, HV, K)])
    _expect("write", write, [(B, T, HV), (B, T, HV, V)])
    _expect("erase_value", erase_value, [(B, T, HV, V)])
    if predict not in ("decayed", "stored"):
        raise ValueError(f"predict must be 'decayed' or 'stored', got {predict!r}")
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "erase_logits": erase_logits, "correct": correct}
    tensors |= {"write": write, "erase_value": erase_value}
    if content is not None:
        _check_content(content, erase_logits, HV, K, V)
        tensors |= {"content.down": content.down, "content.up": content.up}
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _check_content(content: ContentGate, erase_logits: Tensor | None, HV: int, K: int, V: int) -> None:
    if not isinstance(content, ContentGate):
        raise TypeError(f"content must be a ContentGate, got {type(content).__name__}")
    if erase_logits is None:
        raise ValueError("content needs erase_logits: the readout is added to them")
    if not isinstance(content.chunk, int) or not 1 <= content.chunk < 2**31:
        raise ValueError(f"content.chunk must be a whole number of tokens, at least 1, got {content.chunk!r}")
    r = content.down.shape[1] if content.down.ndim == 3 else 0
    _expect("content.down", content.down, [(HV, r, V)])
    _expect("content.up", content.up, [(HV, K, r)])


def check_state(
    state: DeltaState, n: int, HV: int, K: int, V: int, content: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise for a state of another batch, mixer, dtype or device."""
    if not isinstance(state, DeltaState):
        raise TypeError(f"state must be a DeltaState, got {type(state).__name__}")
    tail = V if content else 0
    expected = {"S": (n, HV, K, V), "o_sum": (n, HV, tail), "o_mean": (n, HV, tail), "count": (n,)}
    for name, shape in expected.items():
        field: Tensor = getattr(state, name)
        if not isinstance(field, Tensor):
            raise TypeError(f"state.{name} must be a tensor, got {type(field).__name__}")
        if tuple(field.shape) != shape:
            why = ""
            if name in ("o_sum", "o_mean"):
                kind = "with" if content else "without"
                why = f" (a state {kind} content accumulators: it must come from a call {kind} a content gate)"
            raise ValueError(f"state.{name} must be {list(shape)} for {n} sequences, got {_dims(field)}{why}")
        want = torch.int32 if name == "count" else dtype
        if field.dtype != want:
            raise TypeError(f"state.{name} must be {want}, got {field.dtype}")
        if field.device != device:
            raise ValueError(f"state.{name} is on {field.device}, but q is on {device}")


def check_counts(counts: Sequence[int], chunk: int) -> None:
    """Raise unless each count lies within a content chunk."""
    if any(not 0 <= seen < chunk for seen in counts):
        raise ValueError(f"state.count must lie in 0 to {chunk - 1} for a content chunk of {chunk}, got {list(counts)}")


def check_cu_seqlens(cu_seqlens: Tensor, B: int, device: torch.device) -> None:
    """Raise unless `cu_seqlens` is a 1-D integer tensor on `device` for one packed row; `check_bounds` reads it."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but what it packs is on {device}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [N+1] with N >= 1, got {cu_seqlens.dtype} {_dims(cu_seqlens)}"
        )
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: B must be 1, got {B}")


def check_bounds(bounds: Sequence[int], T: int) -> None:
    """Raise unless the values of `cu_seqlens` start at 0, never decrease and end at T."""
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {T}, got {bounds[0]} and {bounds[-1]}")
    for n, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start} then {end} at entry {n + 1}")


def _expect(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> None:
    if x is not None and tuple(x.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {allowed}, got {_dims(x)}")


def _dims(x: Tensor) -> str:
    return str(list(x.shape))
