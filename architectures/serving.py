"""Requests that come and go between steps, served from the rows of one cache.

A `Batcher` decodes all its requests together, a token each a step. A request that joins is prefilled in a cache of its
own and written over a free row; one that leaves frees its row. No request sees another: each gets the tokens that it
would get alone.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hybridzoo.architectures.decoding import Decoder, NotFinite
from hybridzoo.architectures.generate import check_room, prefill, refuse_unfinished
from hybridzoo.architectures.prompts import as_prompts
from hybridzoo.architectures.sampling import Ending, Picker, Sampling
from hybridzoo.mixers.arguments import whole
from hybridzoo.mixers.memory import sent

if TYPE_CHECKING:
    from hybridzoo.architectures.cache import HybridCache
    from hybridzoo.architectures.model import HybridLM


class Emitted(NamedTuple):
    """What a request got in a step: its next `token`, the `logits [V]` it comes from, and whether it is the `last`.

    error: what the request's own `decode` raised, which ends it with this token; None for all else.
    """

    token: int
    logits: Tensor
    last: bool
    error: Exception | None = None


@dataclass(eq=False)
class _Request:
    prompt: Tensor
    max_new_tokens: int
    picker: Picker
    ending: Ending
    new: list[int] = field(default_factory=list)

    def emitted(self, logits: Tensor) -> Emitted:
        """Its last token. A `decode` is a caller's, and what it raises concerns no other request."""
        full = len(self.new) == self.max_new_tokens
        try:
            return Emitted(self.new[-1], logits, full or self.ending.ends(self.new))
        except Exception as error:
            return Emitted(self.new[-1], logits, True, error)


class Batcher:
    """Continuous batching over `max_rows` rows: `add` a prompt, `step`, `remove`.

    Rows that are free run along in every step, so that its shape, and on a GPU its CUDA graph, stays the same.

    graph: replay decode steps as a CUDA graph; None does on a GPU.

    Raises: `ValueError` for a model with a parameter that is not finite, and for less than one row; `TypeError` for
    rows that are no whole number.
    """

    def __init__(self, model: HybridLM, max_rows: int = 8, *, graph: bool | None = None) -> None:
        from hybridzoo.architectures.model import bad_parameter

        n = whole("max_rows", max_rows, 1)
        # On a GPU a step is not looked at before its row is written, so what can be known is asked here.
        if (name := bad_parameter(model)) is not None:
            raise ValueError(f"{name} holds values that are not finite (NaN or infinite)")
        self.model = model
        self.cache = model.init_cache(n)
        self._decoder = Decoder(model, self.cache, graph)
        self._likeliest = Picker(Sampling(), self.cache.device)
        self._rows: list[int | None] = [None] * n  # the request in each
        self._requests: dict[int, _Request] = {}
        self._waiting: deque[int] = deque()
        self._next = 0
        self._broken: str | None = None  # by what

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """How many requests wait for a free row."""
        return len(self._waiting)

    def add(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 32,
        *,
        sampling: Sampling | None = None,
        ending: Ending | None = None,
    ) -> int:
        """Take a request in and return its id; it joins at the next step that has a free row.

        Raises: as `generate` does for a prompt, `TypeError` for words of another kind, `ValueError` for less than one
        new token, and `RuntimeError` after a step that broke off.
        """
        self._check_whole()
        count = whole("max_new_tokens", max_new_tokens, 1)
        drawing, end = Sampling.of(sampling), Ending.of(ending)
        end.check(self.model.spec.vocab_size)
        ids = as_prompts([prompt], None, "right", self.model.spec.vocab_size, self.cache.device)[0]
        check_room(self.model, len(ids), count)
        number, self._next = self._next, self._next + 1
        self._requests[number] = _Request(ids, count, Picker(drawing, self.cache.device), end)
        self._waiting.append(number)
        return number

    def tokens(self, number: int) -> list[int]:
        """Return the new tokens of a request that has not ended. Raises `KeyError` for any other."""
        return list(self._request(number).new)

    def remove(self, number: int) -> list[int]:
        """Take a request out, freeing its row, and return its new tokens. Raises `KeyError` for one not there."""
        request = self._request(number)
        if number in self._rows:
            self._free([number])
        else:
            self._waiting.remove(number)
            del self._requests[number]
        return request.new

    def _free(self, numbers: Sequence[int]) -> None:
        rows = [self._rows.index(number) for number in numbers]
        for row, number in zip(rows, numbers, strict=True):
            self._rows[row] = None
            del self._requests[number]
        if rows:
            self.cache.reset(rows)

    def step(self) -> dict[int, Emitted]:
        """Give every request that has a row one token, by request id; those that end are removed.

        A request whose `Ending.decode` raises ends with this token, the error in its `Emitted`; the others go on.

        Raises: `ValueError` for logits that are not finite; with the cache in host memory it names the requests, and
        all is then as it was: the others go on once those are removed. What raises while or after rows take their
        tokens, as an interrupt may, ends the batcher: `tokens` still gives what each request has, and later steps raise
        `RuntimeError`.
        """
        self._check_whole()
        # What may be refused or find no memory comes before anything is written.
        joining = [self._waiting[i] for i in range(min(len(self._waiting), self._rows.count(None)))]
        with self._named(dict(enumerate(joining))):
            fresh, logits = self._prefilled(joining)
        if fresh is not None:
            self.cache.reserve(max(fresh.lengths))
        running = {number: row for row, number in enumerate(self._rows) if number is not None}
        if running:
            tokens = [0] * len(self._rows)
            for number, row in running.items():
                tokens[row] = self._requests[number].new[-1]
            given = sent(torch.tensor(tokens), self.cache.device)
            with self._named({row: number for number, row in running.items()}):
                after = self._decoder(given, [number is not None for number in self._rows])
            logits |= {number: after[row] for number, row in running.items()}
        try:
            if fresh is not None:
                self._join(joining, fresh)
            return self._emit(logits)
        except BaseException as error:
            # The cache is a token ahead of some request: one more step would feed it the same token again.
            self._broken = f"{type(error).__name__}: {error}"
            raise

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"a step of this batcher broke off ({self._broken}): `tokens` gives what each request had; "
                "add them to a new Batcher"
            )

    def _emit(self, logits: dict[int, Tensor]) -> dict[int, Emitted]:
        picked = self._pick(logits)
        for number, token in picked.items():  # all of them before a caller's code is asked what has ended
            self._requests[number].new.append(token)
        emitted = {number: self._requests[number].emitted(logits[number]) for number in picked}
        self._free([number for number, each in emitted.items() if each.last])
        return emitted

    @contextmanager
    def _named(self, requests: dict[int, int]) -> Iterator[None]:
        """Say which request's logits were not finite, by the rows of those that run; and that a row was lost."""
        try:
            yield
        except NotFinite as error:
            numbers = [requests[row] for row in error.rows]
            raise ValueError(f"requests {numbers}: {error}; without them (`remove`) the others go on") from None
        except BaseException as error:
            if self.cache.lost.intersection(row for row, number in enumerate(self._rows) if number is not None):
                self._broken = f"{type(error).__name__}: {error}"
            raise

    def _prefilled(self, joining: list[int]) -> tuple[HybridCache | None, dict[int, Tensor]]:
        """Prefill requests: their cache, None without any, and the logits after each prompt."""
        if not joining:
            return None, {}
        logits, fresh = prefill(self.model, [self._requests[number].prompt for number in joining])
        return fresh, dict(zip(joining, logits, strict=True))

    def _join(self, joining: list[int], fresh: HybridCache) -> None:
        rows = [row for row, number in enumerate(self._rows) if number is None][: len(joining)]
        self.cache.put(rows, fresh)
        for row, number in zip(rows, joining, strict=True):
            self._rows[row] = number
            self._waiting.popleft()

    def _pick(self, logits: dict[int, Tensor]) -> dict[int, int]:
        if not logits:
            return {}
        # The likeliest tokens of all rows at once; a request that draws does so by itself, from its own generator.
        rows = torch.stack(list(logits.values()))
        tokens = self._likeliest(rows)
        for row, number in enumerate(logits):
            picker = self._requests[number].picker
            if picker.sampling.temperature:
                tokens[row : row + 1] = picker(rows[row : row + 1])
        # All that a step asks of the device, whatever its layers and requests.
        return dict(zip(logits, refuse_unfinished(self.model, tokens), strict=True))

    def _request(self, number: int) -> _Request:
        if number not in self._requests:
            raise KeyError(f"no request {number}: it has ended, was removed, or never came")
        return self._requests[number]
