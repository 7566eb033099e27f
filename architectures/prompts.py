"""Prompts as they are given, padded on either side, packed, or as lists, made one thing: tensors of their own lengths.

Shapes: N prompts, T tokens with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from hybridzoo.mixers.memory import sent_bounds

Padding = Literal["right", "left"]


def as_prompts(
    ids: Tensor | Sequence[Any],
    lengths: Tensor | Sequence[int] | None,
    padding: Padding,
    vocab_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Return prompts as one-dimensional int64 tensors on `device`.

    `ids` are `[N, T]`, with `lengths [N]` padded on the side that `padding` says; or a list of prompts.

    Raises: `TypeError` for ids that are not integers, `ValueError` for no prompts, an empty one, ids out of range, a
    wrong shape, and lengths that do not fit.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding must be 'right' or 'left', got {padding!r}")
    if isinstance(ids, Tensor):
        if ids.dim() != 2:
            raise ValueError(f"ids must be [N, T], or a list of one-dimensional prompts, got {list(ids.shape)}")
        rows = list(ids)
        if lengths is not None:
            rows = _cut(rows, [int(n) for n in lengths], padding)
    elif lengths is not None:
        raise ValueError("lengths belong to padded ids [N, T]; a list of prompts has its own")
    else:
        rows = [_as_tensor(n, prompt) for n, prompt in enumerate(ids)]
    if not rows:
        raise ValueError("no prompts")
    for n, row in enumerate(rows):
        _check_prompt(n, row, vocab_size)
    return [row.to(device=device, dtype=torch.int64) for row in rows]


def pack(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay prompts end to end: `ids [1, sum of lengths]` and their boundaries `cu_seqlens [N+1]` int32."""
    bounds = list(accumulate((len(prompt) for prompt in prompts), initial=0))
    return torch.cat(list(prompts))[None], sent_bounds(bounds, prompts[0].device)


def _as_tensor(n: int, prompt: Any) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt
    if isinstance(prompt, int):
        raise TypeError(f"ids must be a list of prompts, each a list of ids, as in [[1, 2, 3]]; got {prompt!r} in it")
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise TypeError(f"prompt {n}: expected a list of ids, got {prompt!r}")
    try:
        return torch.tensor(prompt) if len(prompt) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError):
        raise TypeError(f"prompt {n}: expected integers, got {prompt!r}") from None


def _cut(rows: list[Tensor], lengths: list[int], padding: Padding) -> list[Tensor]:
    if len(lengths) != len(rows):
        raise ValueError(f"lengths: expected one for each of {len(rows)} prompts, got {len(lengths)}")
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if not 0 <= length <= len(row):
            raise ValueError(f"lengths: prompt {n} has {len(row)} tokens with padding, got length {length}")
    if padding == "left":
        return [row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _check_prompt(n: int, prompt: Tensor, vocab_size: int) -> None:
    if prompt.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"prompt {n}: ids must be integers, got {prompt.dtype}")
    if prompt.dim() != 1:
        raise ValueError(f"prompt {n}: expected one dimension, got {list(prompt.shape)}")
    if len(prompt) == 0:
        raise ValueError(f"prompt {n} is empty: the first token needs something to follow (a start token, or one byte)")
    low, high = torch.stack(prompt.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"prompt {n}: ids must lie in 0 to {vocab_size - 1} (vocab_size - 1), got {bad}")
