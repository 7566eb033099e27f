"""Continuing prompts: one packed prefill, then one token at a time for all of them together.

Prompts of different lengths are laid end to end in one row and prefilled with `cu_seqlens`; the states that come out
are one row a prompt, and are decoded as a batch. No padding enters a state, so a prompt's continuation does not depend
on the company it is in.

Shapes: N prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hybridzoo.architectures.model import HybridLM


@torch.no_grad()
def generate(
    model: HybridLM,
    ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int = 32,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: int | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor | list[Tensor]:
    """Return each prompt with up to `max_new_tokens` tokens after it.

    ids: `[N, T]` for prompts of one length; the same padded on the right, with `lengths [N]`; or a list of prompts,
        each a 1-D tensor or a list of integers.
    temperature: 0 takes the likeliest token; above, tokens are drawn from `softmax(logits / temperature)`, of the
        `top_k` likeliest, and of those of the fewest likeliest that hold `top_p` of the probability.
    eos: a token that ends its prompt's continuation, itself included.
    seed: makes the draw repeatable; None draws from torch's global generator.
    on_tokens: is called with the new tokens `[N]` of each step, as soon as they are chosen, to show or to stop (by
        raising). A prompt that has ended repeats its `eos`.

    Returns: for `[N, T]` without lengths a tensor `[N, T + n]`, in which rows that ended early are filled with `eos`;
    otherwise a list of N one-dimensional tensors, each ending where it ended.

    Raises: `TypeError` for ids that are not integers, `ValueError` for an empty prompt, ids out of range, a wrong
    shape, more tokens than the spec's `max_context`, and sampling words out of range.
    """
    _check_sampling(model, max_new_tokens, temperature, top_k, top_p, eos)
    device = model.embedding.weight.device
    prompts = _prompts(model, ids, lengths, device)
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    if model.spec.max_context is not None and longest > model.spec.max_context:
        raise ValueError(
            f"prompt and continuation of {longest} tokens are more than max_context {model.spec.max_context}"
        )
    pick = _Picker(temperature, top_k, top_p, seed, device)
    rows = _continue(model, prompts, max_new_tokens, pick, eos, on_tokens) if max_new_tokens else prompts
    if isinstance(ids, Tensor) and lengths is None:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0 if eos is None else eos)
    return rows


def _continue(
    model: HybridLM,
    prompts: list[Tensor],
    max_new_tokens: int,
    pick: _Picker,
    eos: int | None,
    on_tokens: Callable[[Tensor], None] | None,
) -> list[Tensor]:
    sizes = torch.tensor([0, *(len(prompt) for prompt in prompts)])
    boundaries = sizes.cumsum(0).to(dtype=torch.int32, device=prompts[0].device)
    hidden, state = model.hidden(torch.cat(prompts)[None], cu_seqlens=boundaries)
    last = hidden[0, boundaries[1:].long() - 1]  # [N, d_model]
    steps: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=last.device)
    while True:
        tokens = pick(model.logits(last))
        if eos is not None:
            tokens = tokens.masked_fill(ended, eos)
            ended |= tokens == eos
        steps.append(tokens)
        if on_tokens is not None:
            on_tokens(tokens)
        if len(steps) == max_new_tokens or (eos is not None and bool(ended.all())):
            break
        hidden, state = model.hidden(tokens[:, None], state)
        last = hidden[:, 0]
    new = torch.stack(steps, 1)
    # A row counts up to and with its first eos; those after it only kept the batch together.
    counts = [new.shape[1]] * len(prompts)
    if eos is not None:
        counts = ((new == eos).cumsum(1).cumsum(1) <= 1).sum(1).tolist()
    return [torch.cat([prompt, row[:n]]) for prompt, row, n in zip(prompts, new, counts, strict=True)]


class _Picker:
    """Chooses a token for each row of logits `[N, V]`."""

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None, device: torch.device
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None:
            ranked, order = logits.softmax(-1).sort(-1, descending=True)
            # A token stays where those likelier than it hold less than top_p: the likeliest always does.
            kept = ranked.cumsum(-1) - ranked < self.top_p
            logits = logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)
        return torch.multinomial(F.softmax(logits, -1), 1, generator=self.generator)[:, 0]


def _prompts(
    model: HybridLM, ids: Tensor | Sequence[Any], lengths: Tensor | Sequence[int] | None, device: torch.device
) -> list[Tensor]:
    """Return the prompts as one-dimensional int64 tensors on the model's device."""
    if isinstance(ids, Tensor):
        if ids.dim() != 2:
            raise ValueError(f"ids must be [N, T], or a list of one-dimensional prompts, got {list(ids.shape)}")
        rows = list(ids)
        if lengths is not None:
            rows = _cut(rows, [int(n) for n in lengths])
    elif lengths is not None:
        raise ValueError("lengths belong to padded ids [N, T]; a list of prompts has its own")
    else:
        rows = [_as_tensor(n, prompt) for n, prompt in enumerate(ids)]
    if not rows:
        raise ValueError("no prompts")
    for n, row in enumerate(rows):
        _check_prompt(n, row, model.spec.vocab_size)
    return [row.to(device=device, dtype=torch.int64) for row in rows]


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


def _cut(rows: list[Tensor], lengths: list[int]) -> list[Tensor]:
    if len(lengths) != len(rows):
        raise ValueError(f"lengths: expected one for each of {len(rows)} prompts, got {len(lengths)}")
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if not 0 <= length <= len(row):
            raise ValueError(f"lengths: prompt {n} has {len(row)} tokens with padding, got length {length}")
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _check_prompt(n: int, prompt: Tensor, vocab_size: int) -> None:
    if prompt.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"prompt {n}: ids must be integers, got {prompt.dtype}")
    if prompt.dim() != 1:
        raise ValueError(f"prompt {n}: expected one dimension, got {list(prompt.shape)}")
    if len(prompt) == 0:
        raise ValueError(f"prompt {n} is empty: the first token needs something to follow (a start token, or one byte)")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"prompt {n}: ids must lie in 0 to {vocab_size - 1} (vocab_size - 1), got {bad}")


def _check_sampling(
    model: HybridLM, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, eos: int | None
) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number, at least 0, got {max_new_tokens!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (the likeliest token) or above, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p choose among drawn tokens: give a temperature above 0 with them")
    if eos is not None and not 0 <= eos < model.spec.vocab_size:
        raise ValueError(f"eos must lie in 0 to {model.spec.vocab_size - 1} (vocab_size - 1), got {eos}")
