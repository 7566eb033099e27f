"""Continuing prompts: one prefill, then one token at a time for all of them together.

Prompts of different lengths are laid end to end in one row and prefilled with `cu_seqlens` into a cache of one row a
prompt, which is then decoded as a batch; those of one length are a batch from the start. No padding enters a state, and
with a seed each prompt draws from a generator of its own, so a prompt's continuation does not depend on the company it
is in: greedy or seeded, which then depends on its place among the prompts too.

Shapes: N prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hybridzoo.architectures.decoding import Decoder, NotFinite
from hybridzoo.architectures.prompts import Padding, as_prompts, of_array, pack
from hybridzoo.architectures.sampling import Decode, Ending, Picker, Sampling
from hybridzoo.mixers.arguments import whole
from hybridzoo.mixers.memory import sent

if TYPE_CHECKING:
    from hybridzoo.architectures.cache import HybridCache
    from hybridzoo.architectures.model import HybridLM

Prompts = Tensor | Sequence[Tensor | Sequence[int]]


class Step(NamedTuple):
    """A step of all prompts: `tokens [N]`, and which of them are `new [N]`, not of a prompt that had ended before."""

    tokens: Tensor
    new: Tensor


def generate(
    model: HybridLM,
    ids: Prompts,
    max_new_tokens: int = 32,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    padding: Padding = "right",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    eos: int | None = None,
    stop: str | Sequence[str] | None = None,
    decode: Decode | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor | list[Tensor]:
    """Return each prompt with up to `max_new_tokens` tokens after it.

    ids: `[N, T]` for prompts of one length; the same padded on the side `padding` says, with `lengths [N]`; or a list
        of prompts, each a 1-D tensor or a list of integers. A numpy array stands for a tensor.
    temperature, top_k, top_p, min_p, seed: as in `Sampling`; temperature 0 takes the likeliest token. What a prompt
        draws by a seed depends on its place, but on no other prompt; the first draws what it would alone.
    eos, stop, decode: as in `Ending`; what ends a prompt's continuation is part of it.
    on_tokens: is called with the new tokens `[N]` of each step, as soon as they are chosen, to show or to stop (by
        raising). A prompt that has ended repeats its `eos`, or its last token.

    Returns: for `[N, T]` without lengths a tensor `[N, T + n]`, in which rows that ended early are filled with `eos`,
    without one with 0, which may be a token as well: with `lengths` rows end where they ended. Otherwise a list of N
    one-dimensional tensors, each ending where it ended.

    Raises: `TypeError` for ids that are not integers and words of another kind, `ValueError` for an empty prompt, ids
    out of range, a wrong shape, more tokens than the spec's `max_context`, words out of range, and logits that are not
    finite.
    """
    ids = of_array(ids)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ending = Ending(eos=eos, stop=stop, decode=decode)
    prompts, count = _checked(model, ids, max_new_tokens, lengths, padding, ending)
    steps = []
    for step in _steps(model, prompts, count, sampling, ending, None, shown=on_tokens is not None):
        if on_tokens is not None:
            on_tokens(step.tokens)
        steps.append(step)
    rows = prompts
    if steps:
        tokens, new = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        refuse_unfinished(model, tokens.flatten())
        counts = new.sum(1).tolist()
        rows = [torch.cat([prompt, row[:n]]) for prompt, row, n in zip(prompts, tokens, counts, strict=True)]
    if isinstance(ids, Tensor) and lengths is None:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ending.eos or 0)
    return rows


def stream(
    model: HybridLM,
    ids: Prompts,
    max_new_tokens: int = 32,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    padding: Padding = "right",
    sampling: Sampling | None = None,
    ending: Ending | None = None,
    graph: bool | None = None,
) -> Iterator[Step]:
    """Yield the steps of `generate` as they are taken; a reader may leave at any of them.

    graph: replay decode steps as a CUDA graph; None does on a GPU.

    Raises: as `generate`, for what is given at once and not at the first step.
    """
    drawing, end = Sampling.of(sampling), Ending.of(ending)
    prompts, count = _checked(model, of_array(ids), max_new_tokens, lengths, padding, end)
    return _steps(model, prompts, count, drawing, end, graph, shown=True)


def refuse_unfinished(model: HybridLM, tokens: Tensor) -> list[int]:
    """Read `tokens [N]` on the host, or raise `ValueError` where one is -1: a `Picker`'s, of logits not finite."""
    numbers: list[int] = tokens.tolist()
    if min(numbers) < 0:
        from hybridzoo.architectures.model import not_finite

        raise ValueError(not_finite(model))
    return numbers


def _checked(
    model: HybridLM,
    ids: Prompts,
    max_new_tokens: int,
    lengths: Tensor | Sequence[int] | None,
    padding: Padding,
    ending: Ending,
) -> tuple[list[Tensor], int]:
    count = whole("max_new_tokens", max_new_tokens, 0)
    ending.check(model.spec.vocab_size)
    prompts = as_prompts(ids, lengths, padding, model.spec.vocab_size, model.embedding.weight.device)
    check_room(model, max(len(prompt) for prompt in prompts), count)
    return prompts, count


def check_room(model: HybridLM, prompt: int, new: int) -> None:
    """Raise `ValueError` where a prompt of so many tokens and its continuation pass the spec's `max_context`."""
    limit = model.spec.max_context
    if limit is not None and prompt + new > limit:
        raise ValueError(f"prompt and continuation of {prompt + new} tokens are more than max_context {limit}")


def _steps(
    model: HybridLM,
    prompts: list[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    ending: Ending,
    graph: bool | None,
    shown: bool,
) -> Iterator[Step]:
    """Take the steps. What is `shown` or may end is read, once a step; nothing else waits for the device."""
    if not max_new_tokens:
        return
    device = prompts[0].device
    pick, texts = Picker(sampling, device, len(prompts)), Texts(ending, len(prompts))
    may_end = ending.eos is not None or bool(ending.stop)
    logits, cache = prefill(model, prompts)
    decoder = Decoder(model, cache, graph)
    tokens = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for taken in range(max_new_tokens):
        if taken:
            logits = decoder(tokens)
        last, tokens = tokens, pick(logits)
        new = ~ended
        if ending.eos is not None:
            tokens = tokens.masked_fill(ended, ending.eos)
            ended = ended | (tokens == ending.eos)
        elif ending.stop:
            tokens = torch.where(ended, last, tokens)
        over = [False]
        if shown or may_end:
            numbers = refuse_unfinished(model, torch.cat([tokens, ended.long()]))
            over = [bool(number) for number in numbers[len(prompts) :]]
            if ending.stop:
                over = texts.stopped(numbers[: len(prompts)], over)
                ended = sent(torch.tensor(over), device)
        yield Step(tokens, new)
        if all(over):
            return


class Texts:
    """The continuations of N prompts on the host, for stop strings."""

    def __init__(self, ending: Ending, n: int) -> None:
        self.ending = ending
        self.rows: list[list[int]] = [[] for _ in range(n)]

    def stopped(self, tokens: list[int], ended: list[bool]) -> list[bool]:
        """Add a token to each; returns which have ended, before or by it in a stop string."""
        found = []
        for row, token, over in zip(self.rows, tokens, ended, strict=True):
            row.append(token)
            found.append(over or self.ending.stopped(row))
        return found


@torch.no_grad()
def prefill(model: HybridLM, prompts: list[Tensor]) -> tuple[Tensor, HybridCache]:
    """Run prompts, packed where their lengths differ; returns the logits `[N, V]` after each and a cache of N rows."""
    from hybridzoo.architectures.model import not_finite

    cache = model.init_cache(len(prompts))
    if len({len(prompt) for prompt in prompts}) == 1:
        # Without boundaries attention is plain causal, for which every device has a kernel that need not be compiled.
        hidden = model.stage(torch.stack(prompts), cache)
        last = hidden[:, -1]
    else:
        ids, boundaries = pack(prompts)
        hidden = model.stage(ids, cache, boundaries)
        last = hidden[0, boundaries[1:].long() - 1]
    logits = model.logits(last)
    # Of all positions, since a state holds them all; on a GPU, where it would wait, the step that is read says so.
    if not logits.is_cuda and not bool(torch.isfinite(hidden).all() & torch.isfinite(logits).all()):
        tokens = torch.isfinite(hidden).all(-1).flatten().split([len(prompt) for prompt in prompts])
        bad = [row for row, each in enumerate(tokens) if not bool(each.all() & torch.isfinite(logits[row]).all())]
        whose = f" (prompt {bad[0]} of {len(prompts)}, from 0)" if len(prompts) > 1 else ""
        raise NotFinite(not_finite(model) + whose, bad)
    cache.commit()
    cache.advance([len(prompt) for prompt in prompts])
    return logits, cache
