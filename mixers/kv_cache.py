"""Keys and values that softmax attention keeps: functional ones for training, and a cache that is written in place.

`append` and `cut` make a right-aligned cache of an old one, with gradients. `KVCache`, for inference, makes room for a
page of tokens at a time, so that a token is written into its slot and nothing else moves. With a window it is a ring of
as many slots. May import kernels.

Shapes: N rows, T new tokens, C slots, W window, H query heads, H_kv key heads, G = H / H_kv, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.fused.slots_op import fused_attend_slots, slots_refusal
from hybridzoo.kernels.packing import locate
from hybridzoo.mixers.caches import Copies, Rows, StateCache, capturing
from hybridzoo.mixers.memory import host_counts
from hybridzoo.mixers.softmax import SoftmaxRule
from hybridzoo.mixers.softmax.backends import choose
from hybridzoo.mixers.softmax.rule import call_of

Made = TypeVar("Made")

# Tokens that room is made for at a time. A page moves the cache once and is the most that a row may waste.
PAGE = 256


def append(cache: Tensor, new: Tensor) -> Tensor:
    """Return right-aligned `cache [N, C, H_kv, D]` with `new [N, T, H_kv, D]` after it."""
    return torch.cat([cache.to(new.dtype), new], 1)


def cut(cache: Tensor, window: int | None) -> Tensor:
    """Return the last `window` slots of `cache [N, C, H_kv, D]`, copied where any are left out."""
    first = 0 if window is None else max(0, cache.shape[1] - window)
    # A view would keep every older key alive for as long as the state lives.
    return cache[:, first:].clone() if first else cache


class _Staged(NamedTuple):
    """What a call adds: `k, v` rotated already, None where they are in their slots; how many tokens to each row."""

    k: Tensor | None
    v: Tensor | None
    conv: tuple[Tensor, ...]
    cu_seqlens: Tensor | None
    T: int


class _Places(NamedTuple):
    """Of a token a row: its `row` and `slot [N]`."""

    row: Tensor
    slot: Tensor


class _Overwritten(NamedTuple):
    slot: Tensor
    k: Tensor
    v: Tensor


class KVCache(StateCache):
    """Keys and values of N rows, `k, v [N, H_kv, C, D]`: position p of a row is in slot p, with a window in `p % W`.

    `conv` are the tails of short convolutions, `length [N]` int32 the tokens of each row, `seen` the same on the host.
    C grows by `PAGE`, up to the window. A token that is written leaves the slots of all others that can be seen alone,
    so a call may be given up until `commit` has counted its tokens.
    """

    def __init__(
        self,
        conv: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        length: Tensor,
        window: int | None = None,
        seen: Sequence[int] | None = None,
    ) -> None:
        self.conv, self.k, self.v, self.length, self.window = conv, k, v, length, window
        self.seen = [0] * len(length) if seen is None else list(seen)
        self._staged: _Staged | None = None
        self._overwritten: _Overwritten | None = None
        self._made: dict[Hashable, Any] = {}

    @property
    def state(self) -> KVCache:
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.seen, default=0)

    def tensors(self) -> dict[str, Tensor]:
        tails = {f"conv.{i}": tail for i, tail in enumerate(self.conv)}
        return {**tails, "k": self.k, "v": self.v, "length": self.length}

    def contents(self) -> dict[str, Tensor]:
        used = self._room(self.longest)
        return {**self.tensors(), "k": self.k[:, :, :used], "v": self.v[:, :, :used]}

    def _room(self, tokens: int) -> int:
        """The slots that a row of so many tokens takes."""
        return tokens if self.window is None else min(tokens, self.window)

    def reserve(self, longest: int, spare: int = 0) -> bool:
        if self._room(longest) <= min(self.k.shape[2], self.v.shape[2]):
            return False
        room = self._room(-(-(longest + spare) // PAGE) * PAGE)
        # Both before either takes its place: memory may end between the two.
        self.k, self.v = _grown(self.k, room), _grown(self.v, room)
        return True

    def _slot(self, position: Tensor) -> Tensor:
        return position.long() if self.window is None else position.long() % self.window

    def share(self, made: dict[Hashable, Any]) -> None:
        self._made = made

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return `make()`, or what it gave in this step, here or in another of the mixers that share."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def right_aligned(self) -> tuple[Tensor, Tensor]:
        """Return keys and values `[N, C, H_kv, D]` with each row's newest token last, as `attend` takes them."""
        C = self._room(self.longest)
        if self.longest == C and min(self.seen, default=0) == C:  # all rows alike, and no ring has gone round
            return self.k[:, :, :C].transpose(1, 2), self.v[:, :, :C].transpose(1, 2)
        position = self.length[:, None] - C + torch.arange(C, device=self.k.device)
        slot = self._slot(position.clamp(min=0))  # of an empty slot any: it is not looked at
        row = torch.arange(len(self.seen), device=self.k.device)[:, None]
        return self.k[row, :, slot], self.v[row, :, slot]

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        """Write one token a row into its slot and attend from it: `q [N, 1, H, D]`, `k, v [N, 1, H_kv, D]`, rotated.

        A query a row leaves little to choose: where Triton runs a kernel of its own, elsewhere and for `reference` two
        products of matrices, whatever else `rule.backend` says; sums, scores and softmax are float32. Reads nothing on
        the host, so that it can stand in a CUDA graph.

        Raises: `ValueError` where the rule's backend could not run longer calls either.
        """
        if rule.backend != "auto":
            choose(call_of(q, k, v, rule, cached=True), rule.backend)
        if self.reserve(self.longest + 1) and capturing():
            raise RuntimeError("a cache cannot grow inside a CUDA graph: reserve room for the token before")
        row, slot = self.once(("places", self.window), self._places)
        if not self.k.is_cuda:  # where a call is checked before it is committed, and may be taken back
            self._overwritten = _Overwritten(slot, self.k[row, :, slot], self.v[row, :, slot])
        self.k[row, :, slot] = k[:, 0].to(self.k.dtype)
        self.v[row, :, slot] = v[:, 0].to(self.v.dtype)
        if rule.backend != "reference" and slots_refusal(q, self.k, self.v) is None:
            return fused_attend_slots(q, self.k, self.v, self.length, rule.scale, rule.softcap)
        hidden = self.once(("hidden", self.k.shape[2]), self._hidden)
        return attend_slots(q, self.k, self.v, hidden, rule)

    def _places(self) -> _Places:
        return _Places(torch.arange(len(self.seen), device=self.length.device), self._slot(self.length))

    def _hidden(self) -> Tensor:
        """Which slots the query of a token a row must not see, `[N, C]`: none of a ring that has gone round."""
        return torch.arange(self.k.shape[2], device=self.length.device) > self.length[:, None]

    def stage_tokens(
        self, k: Tensor | None, v: Tensor | None, conv: tuple[Tensor, ...], cu_seqlens: Tensor | None, T: int
    ) -> None:
        """Keep a call's `k, v [N, T, H_kv, D]` (`[1, T, H_kv, D]` packed; None after `attend_one`) until `commit`."""
        self._staged = _Staged(k, v, conv, cu_seqlens, T)

    def stage(self, new: object) -> None:
        if new is not self or self._staged is None:
            raise ValueError("a KVCache takes what the call that it was given to has staged")

    def commit(self, copies: Copies, live: Tensor | None = None) -> bool:
        assert self._staged is not None
        k, v, conv, cu_seqlens, T = self._staged
        moved = False
        if k is not None and v is not None and T:
            moved = self._write(k, v, cu_seqlens)
        copies += zip(self.conv, conv, strict=True)
        if cu_seqlens is not None:
            self.length += cu_seqlens.diff()
        elif live is None:
            self.length += T
        else:
            self.length.add_(live, alpha=T)
        self._staged = self._overwritten = None
        self._made.clear()
        return moved

    def _write(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
        if cu_seqlens is None:
            T = k.shape[1]
            moved = self.reserve(self.longest + T)
            kept = T if self.window is None else min(T, self.window)  # a ring would meet itself
            k, v = k[:, T - kept :], v[:, T - kept :]
            position = self.length[:, None] + torch.arange(T - kept, T, device=k.device)
            row = torch.arange(len(self.seen), device=k.device)[:, None]
        else:
            moved = self.reserve(max(seen + n for seen, n in zip(self.seen, host_counts(cu_seqlens), strict=True)))
            row, place = locate(cu_seqlens, k.shape[1])
            k, v, position = k[0], v[0], place + self.length[row]
            if self.window is not None:
                # A ring meets itself: every token of a slot brings what the last of them does. Leaving the others out
                # would be to ask the device how many they are.
                after = cu_seqlens[row + 1] - cu_seqlens[row] - 1 - place
                last = torch.arange(len(row), device=k.device) + after // self.window * self.window
                k, v = k[last], v[last]
        slot = self._slot(position)
        self.k[row, :, slot] = k.to(self.k.dtype)
        self.v[row, :, slot] = v.to(self.v.dtype)
        return moved

    def discard(self) -> None:
        if self._overwritten is not None:
            row = torch.arange(len(self.seen), device=self.k.device)
            self.k[row, :, self._overwritten.slot] = self._overwritten.k
            self.v[row, :, self._overwritten.slot] = self._overwritten.v
        self._staged = self._overwritten = None
        self._made.clear()

    def advance(self, counts: Sequence[int]) -> None:
        self.seen = [seen + n for seen, n in zip(self.seen, counts, strict=True)]

    def map(self, function: Callable[[Tensor], Tensor], seen: Sequence[int]) -> KVCache:
        conv = tuple(function(tail) for tail in self.conv)
        return KVCache(conv, function(self.k), function(self.v), function(self.length), self.window, seen)

    def put(self, rows: Rows, other: StateCache) -> None:
        assert isinstance(other, KVCache)
        self._made.clear()
        used = self._room(other.longest)
        for name, tensor in self.tensors().items():
            source = other.tensors()[name].to(tensor.device)
            if name in ("k", "v"):
                # What no length covers weighs nothing, but zero times NaN is NaN: nothing of the old row may stay.
                tensor[:, :, used:].index_fill_(0, rows.tensor, 0)
                tensor, source = tensor[:, :, :used], source[:, :, :used]
            tensor.index_copy_(0, rows.tensor, source)
        for row, seen in zip(rows.numbers, other.seen, strict=True):
            self.seen[row] = seen

    def reset(self, rows: Rows) -> None:
        super().reset(rows)
        self._made.clear()
        for row in rows.numbers:
            self.seen[row] = 0


def _grown(old: Tensor, room: int) -> Tensor:
    """Return a copy of `old [N, H_kv, C, D]` with `room` slots, the new ones zero."""
    new = old.new_zeros(*old.shape[:2], room, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def attend_slots(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, rule: SoftmaxRule) -> Tensor:
    """Attend from one token a row to all slots but those `hidden [N, C]`: `q [N, 1, H, D]`, `k, v [N, H_kv, C, D]`.

    Returns `[N, 1, H, D]`. Keys and values are read once for the G heads that share them. The products with values run
    over pieces of a page and are then summed: one sum over a long context would leave most of a GPU idle.
    """
    N, _, H, D = q.shape
    H_kv, C = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(k.dtype).reshape(N * H_kv, H // H_kv, D)
    scores = _wide_product(queries, k.flatten(0, 1).mT, wide) * rule.scale  # [N H_kv, G, C]
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.view(N, H, C).masked_fill(hidden[:, None], float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    pieces = C // PAGE if C % PAGE == 0 else 1
    weights = weights.view(N * H_kv, H // H_kv, pieces, C // pieces).transpose(1, 2).flatten(0, 1)
    parts = _wide_product(weights, v.view(N * H_kv * pieces, C // pieces, D), wide)
    if pieces > 1:
        parts = parts.view(N, H_kv, pieces, H // H_kv, D).sum(2)
    return parts.view(N, 1, H, D).to(q.dtype)


@without_autocast
def _wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` with its sums and its result in `wide`, without a wide copy of `b` where torch can."""
    if a.dtype == wide:
        return torch.bmm(a, b)
    if a.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # torch 2.8 and later
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))
