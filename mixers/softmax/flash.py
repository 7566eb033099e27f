"""Attention by Dao's FlashAttention packages: flash-attn 2 (arXiv 2307.08691) and flash-attn-4 (`flash_attn.cute`).

Both align causality and windows to the last key of a sequence, as a cache has it, and take packed sequences whole. They
share the module name `flash_attn` and may be installed side by side: flash-attn-4 runs where it can.

Shapes: B batch, T new tokens, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridzoo.mixers.softmax.imports import capability, device_refusal, import_refusal, version_refusal
from hybridzoo.mixers.softmax.packed import line_up
from hybridzoo.mixers.softmax.rule import Backend, Call, SoftmaxRule, call_of

LARGEST_HEAD = 256
HEAD_STEP = 8  # loads are of 16 bytes
OLDEST_4 = "4.0.0b11"  # the first that asks for the quack-kernels whose functions it calls
TRAINED_4 = (32, 64, 96, 128, 256)  # head sizes whose gradients by 4.0.0b15 were right on compute capability 9


def refusal(call: Call) -> str | None:
    """Why neither package can run this call, or None."""
    if (why := device_refusal(call.device, call.number, (8, 0))) is not None:
        return why
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {call.dtype}: use backend='sdpa' or 'flex'"
    if call.head_dim % HEAD_STEP or call.head_dim > LARGEST_HEAD:
        return f"takes head sizes that are multiples of {HEAD_STEP} up to {LARGEST_HEAD}, got {call.head_dim}"
    fourth, second = refusal_4(call), refusal_2(call)
    if fourth is None or second is None:
        return None
    return f"with flash-attn-4 {fourth}; with flash-attn 2 {second}"


def refusal_4(call: Call) -> str | None:
    """Why flash-attn-4 cannot run this call, or None; read from its interface at 4.0.0b11 to b36, run at b15."""
    too_old = "whose backward pass fails with quack-kernels 0.4"
    if (why := version_refusal("flash-attn-4", OLDEST_4, too_old)) is not None:
        return why
    if (why := import_refusal("flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4")) is not None:
        return why
    if call.compiling:
        return "cannot be traced by a compiler, as its functions are no operators of torch"
    major = capability(call.number)
    if major not in (9, 10, 11):
        return f"needs a GPU of compute capability 9, 10 or 11, got {major}"
    if major >= 10 and not (call.head_dim <= 128 or call.head_dim == 256):
        return f"takes head sizes up to 128, and 256, on this GPU, got {call.head_dim}"
    return _gradient_refusal_4(call, major) if call.gradient else None


def _gradient_refusal_4(call: Call, major: int) -> str | None:
    if call.softcap and (call.packed or call.cached):  # rows behind a cache are packed for it
        return "has no gradient of a soft-cap with packed sequences or behind a cache"
    if major == 9 and call.head_dim not in TRAINED_4:
        *some, last = TRAINED_4
        return (
            f"has gradients of head sizes {', '.join(map(str, some))} and {last} on this GPU, got {call.head_dim}: "
            "those of 4.0.0b15 are wrong at 80 and do not compile at 192, others were not run"
        )
    if major >= 10 and call.head_dim == 256 and call.softcap:
        return "has no gradient of a soft-cap at a head size of 256 on this GPU"
    # What is wrong at 80: backward kernels round head sizes up to 16s and add the gradient of q up in tiles of that
    # size, while what reads these tiles rounds to 32s. For capability 10 an assertion says so, for 9 none does.
    if major >= 10 and -(-call.head_dim // 16) % 2:
        return f"has no gradient on this GPU where a head size's next multiple of 16 is none of 32, got {call.head_dim}"
    return None


def refusal_2(call: Call) -> str | None:
    """Why flash-attn 2 cannot run this call, or None; read from its interface at version 2.8.3."""
    return import_refusal("flash_attn", "flash_attn_varlen_func", "flash-attn")


def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None) -> Tensor:
    """A batch without a cache."""
    if refusal_4(call_of(q, k, v, rule)) is None:
        from flash_attn.cute import flash_attn_func as attention_4

        return _first(attention_4(q, k, v, window_size=_window(rule, None), **_options(rule)))
    from flash_attn import flash_attn_func as attention_2

    return _first(attention_2(q, k, v, window_size=_window(rule, -1), **_options(rule)))


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    cu_seqlens: Tensor,
    cache: tuple[Tensor, Tensor],
    length: Tensor,
) -> Tensor:
    """N sequences in one call. The longest is not asked of the device: all tokens together are a bound of it."""
    line = line_up(k, v, cu_seqlens, cache, length)
    packing = {
        "cu_seqlens_q": cu_seqlens.int(),
        "cu_seqlens_k": line.bounds,
        "max_seqlen_q": q.shape[0],
        "max_seqlen_k": line.k.shape[0],
    }
    if refusal_4(call_of(q, line.k, line.v, rule, packed=True)) is None:
        from flash_attn.cute import flash_attn_varlen_func as attention_4

        return _first(attention_4(q, line.k, line.v, window_size=_window(rule, None), **packing, **_options(rule)))
    from flash_attn import flash_attn_varlen_func as attention_2

    return _first(attention_2(q, line.k, line.v, window_size=_window(rule, -1), **packing, **_options(rule)))


def _window(rule: SoftmaxRule, unbounded: int | None) -> tuple[int | None, int | None]:
    """How many keys a query sees before its own and after it."""
    return (unbounded, unbounded) if rule.window is None else (rule.window - 1, 0)


def _options(rule: SoftmaxRule) -> dict[str, Any]:
    """What both packages call alike."""
    return {
        "softmax_scale": rule.scale,
        "causal": True,
        "softcap": rule.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _first(made: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: flash-attn-4 gives the sums of its scores beside it."""
    return made[0] if isinstance(made, tuple) else made


FLASH = Backend(
    "flash",
    "flash-attn-4 or flash-attn 2: 16 bits, soft-cap, packed in one call",
    ("flash-attn-4", "flash-attn"),
    refusal,
    attend,
    attend_packed,
    masks_empty_slots=False,
)
