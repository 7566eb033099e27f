"""One token more for every row of a cache; on a GPU as one CUDA graph, since small steps wait for the host.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridzoo.architectures.cache import HybridCache

if TYPE_CHECKING:
    from hybridzoo.architectures.model import HybridLM

# Steps that run as they are before one is captured: libraries settle on their kernels, and Triton compiles its own.
WARM = 2

# How much more room a cache under a graph takes when it must grow, as a share of what it needs. A step reads all the
# room there is, so that twice as much would cost more than a capture now and then.
GROWTH = 0.25


class NotFinite(ValueError):
    """Logits that are not finite, and of which `rows`: prompts by their place, or rows of a cache."""

    def __init__(self, says: str, rows: list[int]) -> None:
        super().__init__(says)
        self.rows = rows


class Decoder:
    """Steps of a model over one cache: `decoder(tokens [N])` gives the logits `[N, V]` after them.

    graph: replay a captured step; None does where the cache is on a GPU and no state grows by a step, as one of an own
        mixer may. A graph holds the cache's addresses, so it is captured anew after the cache has grown; each time it
        grows by a part of the context, for captures to become rare.

    Raises: `ValueError` for a cache of another model, and for a graph without a GPU. With `graph=True` a step raises
    `RuntimeError` for a state that grows.
    """

    def __init__(self, model: HybridLM, cache: HybridCache, graph: bool | None = None) -> None:
        cache.check(model, len(cache), model.embedding.weight.device)
        on_gpu = cache.device.type == "cuda"
        if graph and not on_gpu:
            raise ValueError(f"graph=True needs a GPU, and the cache is on {cache.device}")
        self.model, self.cache = model, cache
        self._graphed, self._asked = on_gpu if graph is None else graph, graph
        self._captured: torch.cuda.CUDAGraph | None = None
        self._moves = self._warm = 0
        self._ids = torch.zeros(len(cache), 1, dtype=torch.int64, device=cache.device)
        self._live = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
        self._counts = [1] * len(cache)
        self._logits: Tensor | None = None
        if self._graphed:
            self._stream = torch.cuda.Stream(cache.device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, live: Sequence[bool] | None = None) -> Tensor:
        """Take a step by `tokens [N]`; rows that are not `live` run along without growing longer.

        What those rows held is lost until `cache.put` or `cache.reset`, whatever the mixers: they took a token that is
        none of theirs into convolution tails and recurrent states.

        Raises: `ValueError` where a row would pass the spec's `max_context` or, with the cache in host memory, logits
        of a live row are not finite; `RuntimeError` where a live row is lost. The cache is then as it was. A step
        that fails while it writes, as one on a GPU does all along, leaves its rows lost (`HybridCache.lost`).
        """
        cache, limit = self.cache, self.model.spec.max_context
        counts = [1] * len(cache) if live is None else [int(alive) for alive in live]
        longest = max(seen + n for seen, n in zip(cache.lengths, counts, strict=True))
        if limit is not None and longest > limit:
            raise ValueError(f"a sequence of {longest} tokens is longer than the spec's max_context {limit}")
        cache.check_rows([row for row, n in enumerate(counts) if n])
        room = max(cache.lengths) + 1
        cache.reserve(room, self._spare(room))
        if counts != self._counts:
            self._live.copy_(torch.tensor(counts, dtype=torch.bool), non_blocking=True)
            self._counts = counts
        self._ids.copy_(tokens.clamp(min=0)[:, None])  # -1 is a token whose logits were not finite
        try:
            logits = self._replayed() if self._graphed else self._eager()
            cache.advance(counts)
        except BaseException:
            cache.discard()
            raise
        cache.lost.update(row for row, n in enumerate(counts) if not n)
        return logits

    def _spare(self, room: int) -> int:
        if not self._graphed:
            return 0
        spare, limit = int(room * GROWTH), self.model.spec.max_context
        return spare if limit is None else max(0, min(spare, limit - room))

    def _eager(self) -> Tensor:
        from hybridzoo.architectures.model import not_finite

        logits = self.model.logits(self.model.stage(self._ids, self.cache)[:, 0])
        if not logits.is_cuda:
            bad = self._live & ~torch.isfinite(logits).all(-1)
            if bool(bad.any()):
                raise NotFinite(not_finite(self.model), bad.nonzero().flatten().tolist())
        self.cache.commit(self._live)
        return logits

    def _step(self) -> Tensor:
        """What is captured: nothing here reads or counts on the host."""
        hidden, states = self.model.run_blocks(self._ids, self.cache.states, None)
        self.cache.stage(states)
        logits = self.model.logits(hidden[:, 0])
        self.cache.commit(self._live)
        return logits

    def _replayed(self) -> Tensor:
        current = torch.cuda.current_stream(self.cache.device)
        if self._warm < WARM:
            # On the stream that captures, so that nothing a library sets up belongs to another.
            self._warm += 1
            self._stream.wait_stream(current)
            self.cache.begin(self._ids)  # while a graph is captured nothing is written
            moves = self.cache.moves  # room for keys and values is reserved already: only a growing state moves now
            with torch.cuda.stream(self._stream):
                logits = self._step()
            if self._asked is None and self.cache.moves != moves:
                self._graphed = False
            current.wait_stream(self._stream)
            logits.record_stream(current)
            return logits
        if self._captured is None or self._moves != self.cache.moves:
            # The old graph's memory first, and no pool shared with it: one whose graphs are all gone takes no new one.
            self._captured = self._logits = None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._logits = self._step()
            self._captured, self._moves = graph, self.cache.moves
        assert self._logits is not None
        self._captured.replay()
        return self._logits.clone()  # the next replay writes there again
