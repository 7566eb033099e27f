"""The cache of a whole hybrid at inference: recurrent states, accumulators, convolution tails, keys and values, rings.

A model takes a `HybridCache` wherever it takes a state, and writes into it: `model(ids, state=cache)`. Its rows are
sequences of any lengths, which a server copies, reorders, writes over and frees. cache_file.py saves and loads one.

Shapes: N rows.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridzoo.architectures.spec import Spec
from hybridzoo.mixers.caches import Copies, StateCache, capturing, copy_all, rows_of

if TYPE_CHECKING:
    from hybridzoo.architectures.model import HybridLM

PIECE = 1 << 20  # values of a parameter that are summed at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of so many bytes

CacheLayers = tuple[tuple[StateCache, ...], ...]  # of each layer, one a mixer


def fingerprint(spec: Spec) -> str:
    """Return what a cache must share with a model: a digest of the sizes and the stack, names and backends aside."""

    def words(config: Any) -> dict[str, Any]:
        found = dataclasses.asdict(config)
        found.pop("backend", None)  # the same numbers by another way
        return {"kind": f"{type(config).__module__}.{type(config).__qualname__}", **found}

    layers = [
        [[words(config) for _, config in layer.mixers], None if layer.ffn is None else words(layer.ffn)]
        for layer in spec.layers
    ]
    sizes = (spec.d_model, spec.vocab_size, spec.norm, spec.norm_eps, spec.tie_embeddings)
    return hashlib.sha256(repr((sizes, layers)).encode()).hexdigest()[:16]


def weights_digest(model: HybridLM) -> str:
    """Return a digest of the names, shapes, dtypes and values of all parameters: the same on every device.

    Values enter by sums of their bits, each times a number of its own: whole numbers, so that no order rounds them.
    """
    factors = torch.randint(1 << 62, (PIECE,), generator=torch.Generator().manual_seed(0)) | 1
    factors = factors.to(model.embedding.weight.device)
    sums, named = [], sorted(model.named_parameters())
    for _, parameter in named:
        bits = parameter.detach().flatten().view(BITS[parameter.element_size()])
        sums += [(piece.long() * factors[: len(piece)]).sum() for piece in bits.split(PIECE)]  # wraps, as it should
    kinds = [f"{name} {list(parameter.shape)} {parameter.dtype}" for name, parameter in named]
    said = repr((kinds, torch.stack(sums).tolist()))  # one wait for the device
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _refuse_others(models: Iterable[HybridLM], those: Iterable[HybridLM], says: str) -> None:
    """Raise `ValueError(says)` where models of one stack, each of them copies of one, are copies of different ones."""
    mine, theirs = set(models), set(those)
    if mine and theirs and not mine & theirs and weights_digest(mine.pop()) != weights_digest(theirs.pop()):
        raise ValueError(says)


class HybridCache:
    """All that N sequences need to go on, in every layer; `model.init_cache(n)` makes one.

    model: the fingerprint of the stack; the model itself and copies of it that took the cache are known as well, for as
        long as they are there.
    lengths: the tokens that each row has seen, on the host.
    lost: rows whose contents mean nothing: those that were not live in a decoder's step, and those of a call that
        failed while it wrote. No call takes them until `put` or `reset` has written them anew.
    moves: how often tensors had to be moved for want of room, for whoever holds their addresses, as a CUDA graph does.
    """

    def __init__(
        self,
        layers: CacheLayers,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
        lengths: Sequence[int],
        owners: Iterable[HybridLM] = (),
    ) -> None:
        self._owners = weakref.WeakSet(owners)  # all of the same weights
        self.layers, self.model, self.dtype, self.device = layers, model, dtype, device
        self.lengths = list(lengths)
        self.lost: set[int] = set()
        self.moves = 0
        self._begun: tuple[Tensor, Tensor | None] | None = None  # a call that may have written, not yet committed
        self._writing = False  # committed in part, or not yet counted
        made: dict[Hashable, Any] = {}
        for _, part in self._parts():
            part.share(made)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_owners"}  # which do not go along

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_owners": weakref.WeakSet()}

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridCache:
        memo[id(self)] = made = object.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__getstate__(), memo) | {"_owners": weakref.WeakSet(self._owners)}
        return made

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"HybridCache({len(self)} rows, {self.state_bytes:,} bytes, {kind}, {self.device})"

    def _parts(self) -> Iterator[tuple[str, StateCache]]:
        for i, layer in enumerate(self.layers):
            for j, part in enumerate(layer):
                yield f"{i}.{j}", part

    @property
    def states(self) -> tuple[tuple[Any, ...], ...]:
        """What the blocks take as their states."""
        return tuple(tuple(part.state for part in layer) for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, as `layer.mixer.field`."""
        return {f"{where}.{name}": x for where, part in self._parts() for name, x in part.tensors().items()}

    def contents(self) -> dict[str, Tensor]:
        """The same without the room that no token has taken yet: what a file keeps."""
        return {f"{where}.{name}": x for where, part in self._parts() for name, x in part.contents().items()}

    @property
    def state_bytes(self) -> int:
        """The bytes held: N times what `account` counts for one sequence of the room that there is.

        Room for keys and values grows by pages (`hybridzoo.mixers.kv_cache.PAGE` tokens) to that of the longest row and
        what was reserved, and in a ring no further than its window.
        """
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def check(self, model: HybridLM, n: int, device: torch.device) -> None:
        """Refuse a call of another model, batch, dtype or device. Raises `ValueError`, `TypeError`."""
        if self.model != model.fingerprint:
            raise ValueError(
                f"the cache is another model's: it was made for a stack {self.model}, and this one ({model.spec.name}) "
                f"is {model.fingerprint}; model.init_cache(n) makes one that fits"
            )
        if model not in self._owners:
            says = f"the cache is another model's: of the same stack as {model.spec.name} with other weights; "
            _refuse_others(self._owners, [model], says + "model.init_cache(n) makes one that fits")
            self._owners.add(model)  # a copy: compared once
        if n != len(self):
            raise ValueError(
                f"the cache holds {len(self)} rows, and the call has {n} sequences; cache.select takes some"
            )
        if self.dtype != model.dtype:
            raise TypeError(f"the cache is in {self.dtype}, but the model in {model.dtype}")
        if self.device != device:
            raise ValueError(f"the cache is on {self.device}, ids on {device}: cache.to({str(device)!r}) moves it")

    def check_rows(self, rows: Sequence[int] | None = None) -> None:
        """Refuse a call on rows (None: all) that are lost. Raises `RuntimeError`."""
        lost = sorted(self.lost if rows is None else self.lost.intersection(rows))
        if lost:
            raise RuntimeError(
                f"rows {lost} of the cache are lost, since a step went on without them or failed while it wrote "
                "them: reset them or put others in their place"
            )

    def begin(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """Say that blocks are about to run on `ids [B, T]`, for `discard` to know what may have been written."""
        self._begun = (ids, cu_seqlens)

    def reserve(self, longest: int, spare: int = 0) -> None:
        """Make room for rows of `longest` tokens, where there is none for `spare` more as well."""
        for _, part in self._parts():  # one by one: a later layer may find no memory when an earlier one has moved
            self.moves += part.reserve(longest, spare)

    def stage(self, states: Sequence[Sequence[Any]]) -> None:
        """Take what the blocks returned, for `commit` to write."""
        for layer, new in zip(self.layers, states, strict=True):
            for part, state in zip(layer, new, strict=True):
                part.stage(state)

    def commit(self, live: Tensor | None = None) -> None:
        """Write what was staged. `live [N]` is False for rows that run along empty: no length of theirs grows.

        Reads nothing on the host; `advance` counts the tokens there.
        """
        self._writing = not capturing()  # while a graph is captured nothing is written
        copies: Copies = []
        for _, part in self._parts():
            self.moves += part.commit(copies, live)
        copy_all(copies)
        self._begun = None

    def discard(self) -> None:
        """Forget what a call that failed has staged: the rows stand where they did, or are `lost`.

        Lost are rows of which a part is written: by `commit`, or before it by a step in place (one token a row, on a
        GPU).
        """
        for _, part in self._parts():
            part.discard()
        in_place = self._begun is not None and any(part.written_in_place(*self._begun) for _, part in self._parts())
        if in_place or self._writing:
            self.lost = set(range(len(self)))
        self._begun, self._writing = None, False

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts [N]` more tokens, which `commit` has written."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        for _, part in self._parts():
            part.advance(counts)
        self._writing = False

    def _map(self, function: Callable[[Tensor], Tensor], lengths: Sequence[int], device: torch.device) -> HybridCache:
        layers = tuple(tuple(part.map(function, lengths) for part in layer) for layer in self.layers)
        return HybridCache(layers, self.model, self.dtype, device, lengths, self._owners)

    def clone(self) -> HybridCache:
        """Return a copy that shares nothing. This and other copies raise `RuntimeError` for rows that are lost."""
        self.check_rows()
        return self._map(lambda x: x.clone(), self.lengths, self.device)

    def to(self, device: torch.device | str) -> HybridCache:
        """Return a copy on another device (this one, where it is there already)."""
        target = torch.empty(0, device=device).device  # with its index
        if target == self.device:
            return self
        self.check_rows()
        return self._map(lambda x: x.to(target), self.lengths, target)

    def select(self, rows: Sequence[int] | Tensor) -> HybridCache:
        """Return a cache of copies of `rows`, in that order; a row may be left out or taken more than once.

        Raises: `IndexError` for a row that is not there.
        """
        chosen = rows_of(rows, len(self), self.device)
        self.check_rows(chosen.numbers)
        lengths = [self.lengths[row] for row in chosen.numbers]
        return self._map(lambda x: x.index_select(0, chosen.tensor), lengths, self.device)

    def put(self, rows: Sequence[int] | Tensor, other: HybridCache) -> None:
        """Write the rows of `other`, a cache of the same model or this one itself, over `rows` of this one.

        Raises: `ValueError` for another model or number of rows, `TypeError` for another dtype, `IndexError` for a row
        that is not there; nothing has been written then.
        """
        written = rows_of(rows, len(self), self.device)
        numbers = written.numbers
        if len(set(numbers)) != len(numbers) or len(numbers) != len(other):
            raise ValueError(f"rows must be {len(other)} different ones, as many as the other cache has, got {numbers}")
        if other.model != self.model:
            raise ValueError(f"the other cache is of a stack {other.model}, this one of {self.model}")
        _refuse_others(self._owners, other._owners, "the other cache is of the same stack with other weights")
        if other.dtype != self.dtype:
            raise TypeError(f"the other cache is in {other.dtype}, this one in {self.dtype}")
        other.check_rows()
        if other is self:
            other = self.clone()  # else a row may be written before it is read
        self.reserve(max(other.lengths, default=0))
        self.lost.update(numbers)  # until all of it is there
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            for part, source in zip(layer, theirs, strict=True):
                part.put(written, source)
        for row, length in zip(numbers, other.lengths, strict=True):
            self.lengths[row] = length
        self.lost.difference_update(numbers)

    def reset(self, rows: Sequence[int] | Tensor) -> None:
        """Make `rows` new again. Raises `IndexError` for a row that is not there."""
        freed = rows_of(rows, len(self), self.device)
        self.lost.update(freed.numbers)  # until all of it is there
        for _, part in self._parts():
            part.reset(freed)
        for row in freed.numbers:
            self.lengths[row] = 0
        self.lost.difference_update(freed.numbers)

    def save(self, path: str | Path, model: HybridLM) -> None:
        """Write it as safetensors; see `hybridzoo.architectures.cache_file.save_cache`."""
        from hybridzoo.architectures.cache_file import save_cache

        save_cache(self, path, model)

    @staticmethod
    def load(path: str | Path, model: HybridLM) -> HybridCache:
        """Read one that `save` wrote; see `hybridzoo.architectures.cache_file.load_cache`."""
        from hybridzoo.architectures.cache_file import load_cache

        return load_cache(path, model)
