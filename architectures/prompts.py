"""Prompts as they are given, padded on either side, packed, or as lists, made one thing: tensors of their own lengths.

Shapes: N prompts, T tokens with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from hybridzoo.mixers.arguments import as_index
from hybridzoo.mixers.memory import sent_bounds

Padding = Literal["right", "left"]


_AS_IN = "as in [[1, 2, 3]]"


def of_array(ids: Any) -> Any:
    """Return a numpy array of prompts as a tensor, and anything else as it is."""
    return _as_tensor("ids", ids.tolist()) if _is_array(ids) else ids


def as_prompts(
    ids: Tensor | Sequence[Any],
    lengths: Tensor | Sequence[int] | None,
    padding: Padding,
    vocab_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Return prompts as one-dimensional int64 tensors on `device`.

    `ids` are `[N, T]`, with `lengths [N]` padded on the side that `padding` says; or a list of prompts, tensors,
    numpy arrays or lists.

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
            rows = _cut(rows, _whole_lengths(lengths), padding)
    elif lengths is not None:
        raise ValueError("lengths belong to padded ids [N, T]; a list of prompts has its own")
    elif not isinstance(ids, Iterable):
        raise TypeError(f"ids must be a tensor [N, T] or a list of prompts, {_AS_IN}; got {ids!r}")
    else:
        rows = [_as_prompt(n, prompt, vocab_size) for n, prompt in enumerate(ids)]
    if not rows:
        raise ValueError("no prompts")
    for n, row in enumerate(rows):
        _check_prompt(n, row, vocab_size)
    return [row.to(device=device, dtype=torch.int64) for row in rows]


def pack(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay prompts end to end: `ids [1, sum of lengths]` and their boundaries `cu_seqlens [N+1]` int32."""
    bounds = list(accumulate((len(prompt) for prompt in prompts), initial=0))
    return torch.cat(list(prompts))[None], sent_bounds(bounds, prompts[0].device)


def _is_array(x: Any) -> bool:
    """Whether this is numpy's, which is not imported for it."""
    return not isinstance(x, Tensor) and hasattr(x, "__array__") and hasattr(x, "tolist")


def _as_prompt(n: int, prompt: Any, vocab_size: int) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt
    given = prompt.tolist() if _is_array(prompt) else prompt
    if isinstance(given, int):
        raise TypeError(f"ids must be a list of prompts, each a list of ids, {_AS_IN}; got {prompt!r} in it")
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"prompt {n}: expected a list of ids, got {prompt!r}")
    numbers = [as_index(each) for each in given]
    for number in numbers:
        if number is not None and not -(2**63) <= number < 2**63:  # torch has no integer for it
            raise ValueError(_out_of_range(n, number, vocab_size))
    return _as_tensor(f"prompt {n}", given)


def _as_tensor(name: str, given: Sequence[Any]) -> Tensor:
    try:
        return torch.tensor(given) if len(given) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        bad = next((each for each in given if not isinstance(each, int | float) and as_index(each) is None), given)
        raise TypeError(f"{name}: expected integers, got {bad!r} in it") from None


def _whole_lengths(lengths: Any) -> list[int]:
    given = lengths.tolist() if isinstance(lengths, Tensor) or _is_array(lengths) else lengths
    says = "lengths must be whole numbers, one a prompt, got"
    if not isinstance(given, Iterable):
        raise TypeError(f"{says} {given!r}")
    found = []
    for each in given:
        if (number := as_index(each)) is None:
            raise TypeError(f"{says} {each!r}")
        found.append(number)
    return found


def _out_of_range(n: int, number: int, vocab_size: int) -> str:
    return f"prompt {n}: ids must lie in 0 to {vocab_size - 1} (vocab_size - 1), got {number}"


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
        raise ValueError(_out_of_range(n, low if low < 0 else high, vocab_size))
