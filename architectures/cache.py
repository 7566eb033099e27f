"""The cache of a whole hybrid at inference: recurrent states, accumulators, convolution tails, keys and values, rings.

A model takes a `HybridCache` wherever it takes a state, and writes into it: `model(ids, state=cache)`. Its rows are
sequences of any lengths, which a server copies, reorders, writes over and frees. cache_file.py saves and loads one.

Shapes: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridzoo.architectures.spec import Spec
from hybridzoo.mixers.caches import Copies, StateCache, copy_all, rows_of

if TYPE_CHECKING:
    from hybridzoo.architectures.model import HybridLM

SAMPLED = 64  # values of each parameter that tell one model's weights from another's

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
    """Return a digest of the names and shapes of all parameters and of 64 values of each: what training changes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)][: SAMPLED + 1].double().cpu()
        digest.update(f"{name} {list(parameter.shape)} {sample.tolist()}".encode())
    return digest.hexdigest()[:16]


def same_weights(one: HybridLM, other: HybridLM) -> bool:
    """Whether two models of one stack are the same, or copies."""
    return one is other or weights_digest(one) == weights_digest(other)


class HybridCache:
    """All that N sequences need to go on, in every layer; `model.init_cache(n)` makes one.

    model: the fingerprint of the stack, and `maker` the model itself, for as long as it is there.
    lengths: the tokens that each row has seen, on the host.
    lost: rows whose contents mean nothing: those that were not live in a decoder's step, and those of a step in place
        that failed. No call takes them until `put` or `reset` has written them anew.
    moves: how often tensors had to be moved for want of room, for whoever holds their addresses, as a CUDA graph does.
    """

    def __init__(
        self,
        layers: CacheLayers,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
        lengths: Sequence[int],
        maker: HybridLM | None = None,
    ) -> None:
        self._maker = None if maker is None else weakref.ref(maker)
        self.layers, self.model, self.dtype, self.device = layers, model, dtype, device
        self.lengths = list(lengths)
        self.lost: set[int] = set()
        self.moves = 0
        self._begun: tuple[Tensor, Tensor | None] | None = None  # a call that may have written, not yet committed
        made: dict[Hashable, Any] = {}
        for _, part in self._parts():
            part.share(made)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maker": None}  # which is not to be copied along

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def maker(self) -> HybridLM | None:
        """The model that this cache was made by, None where that is gone or not known."""
        return None if self._maker is None else self._maker()

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
        if (maker := self.maker) is not model:
            if maker is not None and not same_weights(maker, model):
                raise ValueError(
                    f"the cache is another model's: of the same stack as {model.spec.name} with other weights; "
                    "model.init_cache(n) makes one that fits"
                )
            self._maker = weakref.ref(model)  # of a copy: compared once
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
        copies: Copies = []
        for _, part in self._parts():
            self.moves += part.commit(copies, live)
        copy_all(copies)
        self._begun = None

    def discard(self) -> None:
        """Forget what a call that failed has staged: the rows stand where they did, or are `lost`.

        Lost is what a step in place (one token a row, on a GPU) may have written over.
        """
        for _, part in self._parts():
            part.discard()
        if self._begun is not None and any(part.written_in_place(*self._begun) for _, part in self._parts()):
            self.lost = set(range(len(self)))
        self._begun = None

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts [N]` more tokens."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        for _, part in self._parts():
            part.advance(counts)

    def _map(self, function: Callable[[Tensor], Tensor], lengths: Sequence[int], device: torch.device) -> HybridCache:
        layers = tuple(tuple(part.map(function, lengths) for part in layer) for layer in self.layers)
        return HybridCache(layers, self.model, self.dtype, device, lengths, self.maker)

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
        if self.maker is not None and other.maker is not None and not same_weights(self.maker, other.maker):
            raise ValueError("the other cache is of the same stack with other weights")
        if other.dtype != self.dtype:
            raise TypeError(f"the other cache is in {other.dtype}, this one in {self.dtype}")
        other.check_rows()
        if other is self:
            other = self.clone()  # else a row may be written before it is read
        self.reserve(max(other.lengths, default=0))
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            for part, source in zip(layer, theirs, strict=True):
                part.put(written, source)
        for row, length in zip(numbers, other.lengths, strict=True):
            self.lengths[row] = length
        self.lost.difference_update(numbers)

    def reset(self, rows: Sequence[int] | Tensor) -> None:
        """Make `rows` new again. Raises `IndexError` for a row that is not there."""
        freed = rows_of(rows, len(self), self.device)
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
