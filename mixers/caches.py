"""What a mixer keeps between the calls of an inference that writes in place: the rows of a batch, by any mixer.

A functional state is a tuple of tensors, made anew by every call, and gradients flow through it. A cache holds the same
for inference: its tensors stay where they are, rows are written and moved in them, and what a call computes is staged
until it is committed, so that a call which fails has changed nothing. One exception: a step that writes its state in
place (on a GPU) cannot be undone, and its rows then count as lost (architectures/cache.py). kv_cache.py has the cache
for keys and values.

Shapes: N rows, each a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hybridzoo.mixers.arguments import as_index
from hybridzoo.mixers.memory import sent

Cache = TypeVar("Cache", bound="StateCache")
Copies = list[tuple[Tensor, Tensor]]  # what is to be written over, and with what


class Rows(NamedTuple):
    """Rows of a batch, as the host counts them and `tensor [n]` int64 on the device; `rows_of` makes them."""

    numbers: list[int]
    tensor: Tensor


class StateCache:
    """The rows of one mixer. Every tensor in it has N for its first axis."""

    @property
    def state(self) -> Any:
        """What the mixer's `forward` takes as its state."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, under the name it is saved by."""
        raise NotImplementedError

    def contents(self) -> dict[str, Tensor]:
        """The part of `tensors` that means something: what a file keeps."""
        return self.tensors()

    def reserve(self, longest: int, spare: int = 0) -> bool:
        """Make room for rows of `longest` tokens, where there is none for `spare` more as well.

        Returns whether tensors were moved for it.
        """
        return False

    def stage(self, new: Any) -> None:
        """Keep what `forward` returned as its state until it is committed or discarded."""
        raise NotImplementedError

    def commit(self, copies: Copies, live: Tensor | None = None) -> bool:
        """Write what was staged, all but what it adds to `copies`, for `copy_all` to write with that of other mixers.

        Returns whether tensors were moved for it. See `HybridCache.commit` for `live`.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was staged."""

    def written_in_place(self, ids: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether a call on `ids [B, T]` writes here before `commit`, where `discard` cannot undo it."""
        return False

    def share(self, made: dict[Hashable, Any]) -> None:
        """Keep in `made` what the mixers of one model, all of whose rows are of the same lengths, need only one of."""

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts [N]` more tokens on the host."""

    def map(self: Cache, function: Callable[[Tensor], Tensor], seen: Sequence[int]) -> Cache:
        """Return a cache of `function` of every tensor, for rows that have seen `seen` tokens."""
        raise NotImplementedError

    def put(self, rows: Rows, other: StateCache) -> None:
        """Write the rows of `other`, of the same mixer, over `rows`."""
        mine, theirs = self.contents(), other.contents()
        for name, tensor in mine.items():
            tensor.index_copy_(0, rows.tensor, theirs[name].to(tensor.device))

    def reset(self, rows: Rows) -> None:
        """Make `rows` what they are before their first token: zeros, as every mixer's state starts."""
        for tensor in self.tensors().values():
            tensor.index_fill_(0, rows.tensor, 0)


class FixedCache(StateCache):
    """A state of tensors whose sizes do not depend on the context: recurrent states, accumulators and tails.

    Raises `TypeError` for a state that is not (named) tuples of tensors.
    """

    def __init__(self, state: Any) -> None:
        for name, leaf in _leaves(state, ""):
            if not isinstance(leaf, Tensor) or not leaf.dim():
                raise TypeError(f"state{name} must be a tensor with a row a sequence, got {type(leaf).__name__}")
        self._state = state
        self._staged: Any = None

    @property
    def state(self) -> Any:
        return self._state

    def tensors(self) -> dict[str, Tensor]:
        return {name.removeprefix("."): leaf for name, leaf in _leaves(self._state, "")}

    def stage(self, new: Any) -> None:
        self._staged = new

    def commit(self, copies: Copies, live: Tensor | None = None) -> bool:
        held = [leaf for _, leaf in _leaves(self._state, "")]
        new = [leaf for _, leaf in _leaves(self._staged, "")]
        if live is not None:  # the rest of a row that is not live is lost, its length stands
            names = [name for name, _ in _leaves(self._state, "")]
            new = [
                torch.where(live, x, old) if name == ".length" else x
                for name, old, x in zip(names, held, new, strict=True)
            ]
        moved = any(x.shape != y.shape for x, y in zip(held, new, strict=True))
        if moved:  # a state that grows, of somebody's own mixer
            if capturing():
                raise RuntimeError(
                    "a state that grows cannot stand in a CUDA graph, which would write its first size for ever: "
                    "decode with graph=False"
                )
            self._state = map_state(self._state, iter(new).__next__)
        else:
            copies += [(old, x) for old, x in zip(held, new, strict=True) if x is not old]
        self._staged = None
        return moved

    def discard(self) -> None:
        self._staged = None

    def written_in_place(self, ids: Tensor, cu_seqlens: Tensor | None) -> bool:
        asked = getattr(self._state, "written_in_place", None)
        return asked is not None and bool(asked(ids, cu_seqlens))

    def map(self, function: Callable[[Tensor], Tensor], seen: Sequence[int]) -> FixedCache:
        made = iter([function(leaf) for _, leaf in _leaves(self._state, "")])
        return FixedCache(map_state(self._state, made.__next__))


def copy_all(copies: Copies) -> None:
    """Make every copy; those of a dtype in few launches, since a model has several small ones a layer."""
    kinds: dict[tuple[torch.dtype, torch.dtype], Copies] = {}
    for old, new in copies:
        if not old.numel():  # the tail of a convolution over one token
            continue
        kinds.setdefault((old.dtype, new.dtype), []).append((old, new))
    for pairs in kinds.values():
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what is called runs once, and its kernels at every replay."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _leaves(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(state, tuple):
        yield name, state
        return
    keys = getattr(state, "_fields", range(len(state)))
    for key, part in zip(keys, state, strict=True):
        yield from _leaves(part, f"{name}.{key}")


def map_state(state: Any, make: Callable[[], Tensor]) -> Any:
    """Rebuild (named) tuples with `make()` in the place of each tensor, in order."""
    if not isinstance(state, tuple):
        return make()
    parts = [map_state(part, make) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def rows_of(rows: Sequence[int] | Tensor, n: int, device: torch.device) -> Rows:
    """Return rows of the n there are, for tensors on `device`.

    Raises `TypeError` for anything but whole numbers, `IndexError` for a row outside 0 to n - 1.
    """
    given = rows.tolist() if hasattr(rows, "tolist") else rows  # a tensor, or an array
    if isinstance(given, int):
        raise TypeError(f"rows must be a list of whole numbers, got {given}: [{given}] is one row")
    found = []
    for row in given:
        if (at := as_index(row)) is None:
            raise TypeError(f"rows must be whole numbers, got {row!r}")
        if not 0 <= at < n:
            raise IndexError(f"row {row} is not one of the cache's {n} (0 to {n - 1})")
        found.append(at)
    return Rows(found, sent(torch.tensor(found, dtype=torch.int64), device))
