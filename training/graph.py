"""A training update captured as a CUDA graph: small models wait for the host, which then starts a whole step at once.

May import nothing of hybridzoo; loop.py puts it around its update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor], Tensor]

# Steps of a shape that run as they are first: libraries settle on their kernels, and the optimiser makes its state.
WARM = 3


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    labels: Tensor
    result: Tensor


class Graphs:
    """The graphs of an update `(ids, labels) -> numbers`: captured once for each shape of batch, replayed from then on.

    The update must leave no gradients behind and take whatever else changes from step to step, as a learning rate does,
    from tensors on `device`, which is the current one at every call. Every call is one step of the training: capturing
    takes none, and the first `WARM` of a shape run as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._calls: dict[torch.Size, int] = {}
        self._captured: dict[torch.Size, _Captured] = {}

    def run(self, update: Update, ids: Tensor, labels: Tensor) -> Tensor:
        """Take a step by `update`, always the same one, or by what was captured of it."""
        calls = self._calls[ids.shape] = self._calls.get(ids.shape, 0) + 1
        if calls <= WARM:
            return self._beside(update, ids, labels)
        if ids.shape not in self._captured:
            self._captured[ids.shape] = self._capture(update, ids, labels)
        captured = self._captured[ids.shape]
        captured.ids.copy_(ids)
        captured.labels.copy_(labels)
        captured.graph.replay()
        return captured.result.clone()  # the next replay writes there again

    def _beside(self, update: Update, ids: Tensor, labels: Tensor) -> Tensor:
        # On a stream of its own, as a capture is, so that nothing it leaves belongs to the stream of the caller.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = update(ids, labels)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, update: Update, ids: Tensor, labels: Tensor) -> _Captured:
        graph, ids, labels = torch.cuda.CUDAGraph(), ids.clone(), labels.clone()
        with torch.cuda.graph(graph, stream=self._stream):
            result = update(ids, labels)
        return _Captured(graph, ids, labels, result)
