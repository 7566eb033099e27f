"""The language model of a spec: embedding, blocks, norm, head, and the loss. May import blocks; generate.py samples.

Shapes: B batch, T time, V vocabulary, N packed sequences.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.architectures.cache import HybridCache, fingerprint
from hybridzoo.architectures.generate import Prompts, generate
from hybridzoo.architectures.prompts import Padding
from hybridzoo.architectures.sampling import Decode
from hybridzoo.architectures.spec import Spec, require_spec
from hybridzoo.blocks.residual import Block, BlockState
from hybridzoo.kernels.checks import check_bounds, check_cu_seqlens
from hybridzoo.mixers.arguments import whole
from hybridzoo.mixers.memory import host_bounds, host_counts
from hybridzoo.mixers.parts import RMSNorm

ModelState = tuple[BlockState, ...]  # one a layer

IGNORED = -100  # the label that no loss is taken of, as in torch's cross_entropy


class ModelOutput(NamedTuple):
    """`loss` is a float32 scalar, or None without labels; `logits [B, T, V]` in the model's dtype; `state` is None
    where it was not asked for.
    """

    loss: Tensor | None
    logits: Tensor
    state: ModelState | HybridCache | None


def build_model(spec: Spec, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HybridLM:
    """Build and initialise the model of a spec.

    The modules are made on the meta device, so that nothing is allocated or drawn twice; `device="meta"` stops there
    (`model.to_empty(device=...)` and `model.reset_parameters()` go on). Initial values are drawn in float32 from
    torch's global generator. With `dtype`, parameters are cast, except that those of a mixer's `gates` stay in float32
    at least: decays lose their meaning in bfloat16.

    Raises: `TypeError` for anything but a `Spec`, and for a dtype that is not floating point.
    """
    require_spec(spec)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    with torch.device("meta"):
        model = HybridLM(spec)
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type != "meta":
        model.to_empty(device=target)
        model.reset_parameters()
    if dtype is not None:
        cast(model, dtype)
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters and buffers in place; submodules named `gates` keep float32 or better."""
    for name, module in model.named_modules():
        kind = torch.promote_types(dtype, torch.float32) if "gates" in name.split(".") else dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(kind)


class HybridLM(nn.Module):
    """The causal language model of a `Spec`. `model(ids, labels=ids)` gives `loss, logits, state`.

    A state holds all that is needed to go on: `model(more, state=out.state)` equals one call on everything. Several
    sequences, packed in one row with `cu_seqlens`, equal them one by one.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(
            Block([config for _, config in layer.mixers], layer.ffn, spec.norm_eps) for layer in spec.layers
        )
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        # Tied embeddings have no head of their own: one parameter under one name, which no cast or move can part.
        self.head = None if spec.tie_embeddings else nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial parameters as Mamba-2's training code does (state-spaces/mamba, after GPT-2).

        Embeddings and head are normal with the spec's `init.std` (a head of its own with `init.head_std`, where given);
        every mixer draws itself as its source prescribes, projections as `nn.Linear` draws them (at d_model 768 their
        deviation is GPT-2's 0.02). With `init.residual_scale`, what is added to the residual stream is divided by the
        root of the number of additions, `1/sqrt(2 n_layers)` where every layer has an FFN.
        """
        init = self.spec.init
        nn.init.normal_(self.embedding.weight, std=init.std)
        additions = sum(1 if layer.ffn is None else 2 for layer in self.spec.layers)
        for block in self._wrapped_blocks():
            block.reset_parameters(additions**-0.5 if init.residual_scale else 1.0)
        self.norm.reset_parameters()
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=init.std if init.head_std is None else init.head_std)

    def forward(
        self,
        ids: Tensor,
        *,
        labels: Tensor | None = None,
        state: ModelState | HybridCache | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> ModelOutput:
        """Run `ids [B, T]` (int32 or int64), going on from `state`; `cu_seqlens [N+1]` packs N sequences in one row.

        state: that of an earlier call, whose result is a new one, with gradients; or a `HybridCache`, which is written
            into and returned, without.
        labels: `[B, T]`, usually the ids themselves: position t is asked for label t+1, within its own sequence. Labels
            of -100 are ignored. The loss is the mean over the labels that count, and 0 where none does.
        return_state: give back the new state, else None: each layer's is then dropped as soon as it is there, and not
            made at all where a compiler sees it. A `HybridCache` is written into all the same.

        Raises: `TypeError` for ids or labels that are not integers, `ValueError` for wrong shapes, ids or labels out of
        range (where they lie in host memory), sequences over `max_context` (counting what a state has seen, where that
        lies in host memory), a state or cache of another model or batch, and results that are not finite (with a cache
        in host memory); `RuntimeError` for a cache with rows that are lost. A cache is then as it was. What raises
        while the blocks run leaves it so too, but for a step of one token on a GPU, which is written as it is computed:
        its rows are then lost (`HybridCache.lost`).
        """
        if labels is not None:
            self._check_ids(ids)
            self._check_labels(labels, ids)  # before a cache is written
        if isinstance(state, HybridCache):
            state.check_rows()
            with torch.no_grad(), _given_up_on_errors(state):
                logits = self.logits(self.stage(ids, state, cu_seqlens))
                self._settle(logits, ids, state, cu_seqlens)
            new_state: ModelState | HybridCache = state
        else:
            hidden, new_state = self.hidden(ids, state, cu_seqlens, return_state)
            logits = self.logits(hidden)
        loss = None if labels is None else self._loss(logits, labels, cu_seqlens)
        return ModelOutput(loss, logits, new_state if return_state else None)

    def hidden(
        self,
        ids: Tensor,
        state: ModelState | HybridCache | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, ModelState | HybridCache]:
        """Return what the head reads, `[B, T, d_model]`, and the new state; arguments as in `forward`.

        The state is empty where it was not asked for, a cache's aside.
        """
        if not isinstance(state, HybridCache):
            self._check_ids(ids)
            self._check_packing(ids, cu_seqlens)
            return self.run_blocks(ids, self._checked_states(ids, state, cu_seqlens), cu_seqlens, return_state)
        state.check_rows()
        with torch.no_grad(), _given_up_on_errors(state):
            hidden = self.stage(ids, state, cu_seqlens)
            self._settle(hidden, ids, state, cu_seqlens)
        return hidden, state

    def run_blocks(
        self,
        ids: Tensor,
        states: Sequence[BlockState | None],
        cu_seqlens: Tensor | None,
        return_state: bool = True,
    ) -> tuple[Tensor, ModelState]:
        """The stack itself, between all checks and the head: what a CUDA graph may hold."""
        x = self.embedding(ids)
        new_states = []
        for block, each in zip(self.blocks, states, strict=True):
            x, new = block(x, each, cu_seqlens)
            if return_state:
                new_states.append(new)
        return self.norm(x), tuple(new_states)

    def stage(self, ids: Tensor, cache: HybridCache, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run on from a cache, refusing before what can be refused, and leave staged in it what the call adds.

        Whoever calls this discards what is staged where anything raises before it is committed.
        """
        self._check_ids(ids)
        self._check_packing(ids, cu_seqlens)
        counts = _counts(ids, cu_seqlens)
        cache.check(self, len(counts), ids.device)
        longest = max(seen + n for seen, n in zip(cache.lengths, counts, strict=True))
        if self.spec.max_context is not None and longest > self.spec.max_context:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the spec's max_context {self.spec.max_context}"
            )
        cache.reserve(longest)  # here, where it counts as a move
        cache.begin(ids, cu_seqlens)
        hidden, new_states = self.run_blocks(ids, cache.states, cu_seqlens)
        cache.stage(new_states)
        return hidden

    def _settle(self, result: Tensor, ids: Tensor, cache: HybridCache, cu_seqlens: Tensor | None) -> None:
        """Write what was staged, where `result` is finite; on a GPU that is not asked, since it would wait."""
        if not result.is_cuda and not bool(torch.isfinite(result).all()):
            raise ValueError(f"{not_finite(self)}; the cache is as it was")
        cache.commit()
        cache.advance(_counts(ids, cu_seqlens))

    def _checked_states(
        self, ids: Tensor, state: ModelState | None, cu_seqlens: Tensor | None
    ) -> Sequence[BlockState | None]:
        states: Sequence[BlockState | None] = (None,) * len(self.blocks) if state is None else state
        if not isinstance(states, (tuple, list)):
            raise TypeError(f"state: expected the state of a model, got {type(states).__name__}")
        if len(states) != len(self.blocks):
            raise ValueError(f"state: expected one for each of {len(self.blocks)} layers, got {len(states)}")
        self._check_context(ids, cu_seqlens, states)
        return states

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and of all parameters but those of gates."""
        return self.embedding.weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """What a cache must have been made for; see `hybridzoo.architectures.cache.fingerprint`."""
        return fingerprint(self.spec)

    def init_cache(
        self, n: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HybridCache:
        """Return a cache of `n` rows before their first token; `model(ids, state=cache)` writes into it.

        Raises: `ValueError` for less than one row, `TypeError` for rows that are no whole number and for a dtype that
        is not of floating point.
        """
        n = whole("rows of a cache", n, 1)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"a cache must be of floating point, got {dtype}")
        where = self.embedding.weight.device if device is None else torch.empty(0, device=device).device
        kind = dtype or self.dtype
        layers = tuple(block.init_cache(n, where, kind) for block in self._wrapped_blocks())
        return HybridCache(layers, self.fingerprint, kind, where, [0] * n, [self])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., V]` of `hidden [..., d_model]`."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def init_state(self, n: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> ModelState:
        """Return the state of `n` sequences before their first token."""
        return tuple(block.init_state(n, device, dtype) for block in self._wrapped_blocks())

    def _wrapped_blocks(self) -> list[Block]:
        """The blocks, typed; one in a wrapper of torch's (for checkpointing, compiling) still answers as one."""
        return [typing.cast("Block", block) for block in self.blocks]

    def generate(
        self,
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
        """Return prompts with their continuations; see `hybridzoo.architectures.generate.generate`."""
        return generate(
            self,
            ids,
            max_new_tokens,
            lengths=lengths,
            padding=padding,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            eos=eos,
            stop=stop,
            decode=decode,
            on_tokens=on_tokens,
        )

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor [B, T], got {type(ids).__name__}")
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids must be [B, T] with at least one token, got {list(ids.shape)}")
        self._check_range(ids, "ids")

    def _check_range(self, tokens: Tensor, name: str, ignored: int | None = None) -> None:
        # On a GPU a look at the values would wait for the device, and a compiler has none to look at.
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        outside = (tokens < 0) | (tokens >= self.spec.vocab_size)
        if ignored is not None:
            outside &= tokens != ignored
        if outside.any():
            allowed = f"0 to {self.spec.vocab_size - 1} (vocab_size - 1)" + (f", or {ignored}" if ignored else "")
            raise ValueError(f"{name} must lie in {allowed}, got {tokens[outside][0].item()}")

    def _check_packing(self, ids: Tensor, cu_seqlens: Tensor | None) -> None:
        if cu_seqlens is None:
            return
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be a tensor [N+1], got {type(cu_seqlens).__name__}")
        check_cu_seqlens(cu_seqlens, ids.shape[0], ids.device)
        if not torch.compiler.is_compiling():
            # Read once a call, also where that waits for a GPU: a bad boundary there would end the process.
            check_bounds(host_bounds(cu_seqlens), ids.shape[1])

    def _check_context(self, ids: Tensor, cu_seqlens: Tensor | None, states: Sequence[BlockState | None]) -> None:
        limit = self.spec.max_context
        if limit is None:
            return
        longest = ids.shape[1]
        if not torch.compiler.is_compiling():
            lengths = torch.tensor([longest] if cu_seqlens is None else _counts(ids, cu_seqlens), device="cpu")
            seen = _seen(states)
            if seen is not None and len(lengths) in (1, len(seen)):  # else the mixers refuse the state
                lengths = lengths + seen
            longest = int(lengths.max())
        elif cu_seqlens is not None:
            return  # its values are not known yet
        if longest > limit:
            raise ValueError(f"a sequence of {longest} tokens is longer than the spec's max_context {limit}")

    def _check_labels(self, labels: Tensor, ids: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor [B, T], got {type(labels).__name__}")
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"labels must be int32 or int64, got {labels.dtype}")
        if labels.shape != ids.shape:
            raise ValueError(f"labels must have the shape of ids {list(ids.shape)}, got {list(labels.shape)}")
        if labels.device != ids.device:
            raise ValueError(f"labels are on {labels.device}, ids on {ids.device}")
        self._check_range(labels, "labels", IGNORED)

    def _loss(self, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        # Position t is asked for label t+1; the last of a row, and of a packed sequence, for none.
        targets = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
        if cu_seqlens is not None:
            starts = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
            starts = starts.index_fill(0, cu_seqlens.long(), True)
            targets = targets.masked_fill(starts[1:], IGNORED)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)


@contextmanager
def _given_up_on_errors(cache: HybridCache) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cache.discard()
        raise


def _counts(ids: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """The new tokens of each sequence."""
    return [ids.shape[1]] * ids.shape[0] if cu_seqlens is None else host_counts(cu_seqlens)


def not_finite(model: HybridLM) -> str:
    """Say that a model's result was not finite, and by which parameter where it is one's fault."""
    if (name := bad_parameter(model)) is not None:
        return f"the logits are not finite: {name} holds values that are not (NaN or infinite)"
    return "the logits are not finite, though all parameters are: something overflows"


@torch.no_grad()
def bad_parameter(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds a value that is not finite; None where all are."""
    names, finite = [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        finite.append(torch.isfinite(parameter).all())
    all_finite = torch.stack(finite).tolist()  # one wait for the device
    return None if all(all_finite) else names[all_finite.index(False)]


def _seen(states: Sequence[BlockState | None]) -> Tensor | None:
    """The tokens `[N]` that each sequence of a state has seen; None without a state or its lengths in host memory."""
    for block in states:
        for state in block if isinstance(block, (tuple, list)) else ():
            length = getattr(state, "length", None)
            if isinstance(length, Tensor) and length.device.type == "cpu" and length.dim() == 1:
                return length
    return None
