"""Decoding as operators of its own: one token a call, without a gradient, the state in place where asked.

`fused_step` returns a new state, `fused_step_` writes the one it is given. Imports triton when one of them first runs.
Nothing here waits for the device, so a CUDA graph can capture it.

Shapes: N sequences, H key heads, HV value heads, K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hybridzoo.kernels.autocast import without_autocast
from hybridzoo.kernels.checks import check_counts
from hybridzoo.kernels.fused.config import options, power
from hybridzoo.kernels.fused.form import dtypes_of, kind
from hybridzoo.kernels.fused.launch import FLOOR, Launch, queue_of, starts_early
from hybridzoo.kernels.fused.memory import Memory
from hybridzoo.kernels.operators import define, dense_like
from hybridzoo.kernels.recurrence_op import STATE, TOKENS, state_after
from hybridzoo.kernels.state import ContentGate, DeltaState

# Warps of a program, and registers of a thread: at most 32 numbers of the state, and what the kernel needs beside them.
# With 96 a multiprocessor has room for five programs.
WARPS, REGISTERS = 4, 96
# Sequences of a program that reads the content gate's matrices.
READERS = 16


class Step(NamedTuple):
    """What a step reads: tensors as in `gated_delta_rule` with T = 1, N as B, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase_logits: Tensor | None
    down: Tensor | None
    up: Tensor | None
    correct: Tensor | None
    write: Tensor | None
    S: Tensor
    o_sum: Tensor
    o_mean: Tensor
    count: Tensor  # type: ignore[assignment]
    stored: bool
    norm: bool  # q and k are brought to unit length first
    scale: float
    chunk: int  # L, 0 without a content gate

    @property
    def state(self) -> DeltaState:
        """Where the sequences stand."""
        return DeltaState(self.S, self.o_sum, self.o_mean, self.count)

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors as the kernels name them, but for `mean0`, the mean where it is not written in place."""
        names = ("q", "k", "v", "g", "z", "down", "up", "e", "w", "S0", "sum0", "mean", "count0")
        return cast("dict[str, Tensor | None]", dict(zip(names, self, strict=False)))


def no_gradient_to_come(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call with these tensors may be a step."""
    return not torch.is_grad_enabled() or all(x is None or not x.requires_grad for x in tensors)


def fused_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase_logits: Tensor | None,
    content: ContentGate | None,
    correct: Tensor | None,
    write: Tensor | None,
    state: DeltaState,
    *,
    predict: str,
    scale: float,
    qk_l2norm: bool,
    inplace_state: bool,
) -> tuple[Tensor, DeltaState]:
    """`gated_delta_rule` for one token of each sequence, its arguments already checked, none with a gradient to come.

    Raises `ValueError` with `inplace_state` where places of the state share memory.
    """
    down, up, chunk = (None, None, 0) if content is None else content
    tensors = (q, k, v, log_decay, erase_logits, down, up, correct, write, *state)
    rest = (predict == "stored", qk_l2norm, scale, chunk)
    if inplace_state:
        return _in_place_op(*tensors, *rest), state
    o, ends = _step_op(*tensors, *rest)
    return o, state_after(ends, state)


def start(step: Step, o: Tensor, ends: Sequence[Tensor]) -> None:
    """Run the kernels on a dense `step`, writing o and `ends`: S, and with a content gate o_sum, o_mean and count, all
    of them the step's own or none."""
    in_place = ends[0] is step.S
    memory = Memory(memory_of(step, o, ends, in_place))
    with queue_of(step.q.device) as queue:
        for launch in launches_of(step, in_place, starts_early(step.q.device)):
            launch.starter(memory, queue)()


def memory_of(step: Step, o: Tensor, ends: Sequence[Tensor], in_place: bool) -> dict[str, Tensor | None]:
    """All tensors as the kernels name them."""
    S1, sum1, mean1, count1 = (*ends, None, None, None)[:4]
    return {
        **step.tensors(),
        "mean0": None if in_place else step.o_mean,
        "u": step.S.new_empty(step.S.shape[:3]) if step.chunk else None,
        "o": o,
        "S1": S1,
        "sum1": sum1,
        "mean1": mean1,
        "count1": count1,
    }


def launches_of(step: Step, in_place: bool, early: bool) -> list[Launch]:
    """The launches of a dense `step`, the same for all with its sizes, dtypes and options; `early` where a kernel may
    start before the one ahead of it has ended."""
    gates = (kind(step.log_decay), step.erase_logits is not None, kind(step.correct), kind(step.write))
    pair = None
    if step.down is not None and step.up is not None:
        pair = (step.down.shape[1], step.down.stride(0), step.up.stride(0))
    options = (step.stored, step.norm, step.scale, step.chunk, in_place, early)
    return _launches(step.q.shape, step.v.shape, gates, pair, dtypes_of(step.tensors().values()), *options)


@functools.lru_cache(maxsize=512)
def _launches(
    qk: tuple[int, ...],
    vo: tuple[int, ...],
    gates: tuple[int, bool, int, int],
    pair: tuple[int, int, int] | None,
    dtypes: tuple[torch.dtype | None, ...],
    stored: bool,
    norm: bool,
    scale: float,
    chunk: int,
    in_place: bool,
    early: bool,
) -> list[Launch]:
    """`pair` is the content gate's rank and its strides from head to head."""
    from hybridzoo.kernels.fused.step import readout_kernel, step_kernel

    (N, _, H, K), (HV, V) = qk, vo[2:]
    decay, erase, correct, write = gates
    block_v = step_channels(K, V)
    parts = -(-V // block_v)
    constants = {
        "BK": power(K),
        "BV": block_v,
        "PARTS": parts,
        "DECAY": decay,
        "ERASE": erase,
        "CORRECT": correct,
        "WRITE": write,
        "STORED": stored,
        "CONTENT": chunk,
        "NORM": norm,
        "FLOOR": FLOOR,
        "EARLY": early and chunk > 0,
    }
    numbers = {"scale": scale, "H": H, "HV": HV, "K": K, "V": V}
    schedule = {**options(WARPS), "maxnreg": REGISTERS, "launch_pdl": early and chunk > 0}
    step = Launch(step_kernel, (N * HV * parts,), numbers, constants, schedule, (*dtypes, in_place))
    if pair is None:
        return [step]
    rank, down_head, up_head = pair
    numbers = {"N": N, "HV": HV, "K": K, "V": V, "down_head": down_head, "up_head": up_head}
    channels = min(power(K), power(V), max(16, 2048 // power(rank)))  # of a matrix, that fit in registers
    constants = {
        "BN": READERS,
        "BV": power(V),
        "BR": power(rank),
        "D": channels,
        "RANK": rank,
        "CONTENT": chunk,
        "EARLY": early,
    }
    grid = (-(-N // READERS), HV, -(-K // channels))
    return [Launch(readout_kernel, grid, numbers, constants, options(WARPS), dtypes), step]


def step_channels(K: int, V: int) -> int:
    """Value channels of a program, from head sizes: 32 numbers of the state a thread, all asked for at once, so that a
    multiprocessor has 64 KiB of states on their way. With 16 a thread, sums over keys wait for twice the warps.
    """
    return min(power(V), 32, 4096 // power(K))


def _dense(step: Step) -> Step:
    """The step as the kernel reads it: contiguous, and the content pair in float32."""
    tensors = [x if x is None or x is step.down or x is step.up else x.contiguous() for x in step[:13]]
    dense = Step(*tensors, *step[13:])  # type: ignore[arg-type, call-arg]
    if step.down is None or step.up is None:
        return dense
    return dense._replace(down=_matrices(step.down), up=_matrices(step.up))


def _matrices(x: Tensor) -> Tensor:
    """Each head's matrix in float32 and contiguous; one for all heads, an expanded view, stays one."""
    if x.dtype == torch.float32 and x.stride()[1:] == (x.shape[2], 1):
        return x
    return x.contiguous().float()


def _check(step: Step) -> None:
    # Elsewhere than in host memory, reading counts would stop the host.
    if step.chunk and step.q.device.type == "cpu":
        check_counts(step.count.tolist(), step.chunk)


def _check_apart(state: DeltaState) -> None:
    """Refuse a state that cannot be written in place, since two of its places are one."""
    spans = []
    for name, x in zip(state._fields, state, strict=True):
        dense = x.is_contiguous()
        if not dense and _overlaps(x):
            raise ValueError(
                f"inplace_state cannot write into state.{name}: with strides {list(x.stride())} for {list(x.shape)}, "
                "as of an expanded tensor, places of it share memory; give a copy"
            )
        if x.numel():
            spans.append((x.data_ptr(), x.nbytes if dense else x.itemsize, name))
    spans.sort()
    for (start, size, name), (following, _, other) in pairwise(spans):
        if start + size > following:
            raise ValueError(f"inplace_state cannot write state.{name} and state.{other} into the same memory")


def _overlaps(x: Tensor) -> bool:
    """Whether two places of a tensor may be one: the axes, narrowest first, must each step over all before."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


@without_autocast
def _step(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    step = Step(*arguments)
    _check(step)
    o, ends = _fake_step(*arguments)
    start(_dense(step), o, ends)
    return o, ends


def _fake_step(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Unwritten memory for o, and for S, with a content gate all of a state."""
    step = Step(*arguments)
    return dense_like(step.v), [dense_like(x) for x in step.state[: 4 if step.chunk else 1]]


@without_autocast
def _step_in_place(*arguments: Any) -> Tensor:
    step = Step(*arguments)
    _check(step)
    _check_apart(step.state)
    dense = _dense(step)
    o = dense_like(step.v)
    start(dense, o, dense.state)
    for field, written in zip(step.state, dense.state, strict=True):
        if written is not field:  # a copy, since the given one is not contiguous
            field.copy_(written)
    torch.autograd.graph.increment_version(step.state)  # whoever kept one for a backward pass learns of it
    return o


_OPTIONS = "bool stored, bool norm, float scale, int chunk"
_IN_PLACE = "Tensor(a!) S, Tensor(b!) o_sum, Tensor(c!) o_mean, Tensor(d!) count"
_step_op = define(f"fused_step({TOKENS}, {STATE}, {_OPTIONS}) -> (Tensor, Tensor[])", _step, _fake_step)
_in_place_op = define(
    f"fused_step_({TOKENS}, {_IN_PLACE}, {_OPTIONS}) -> Tensor", _step_in_place, lambda *given: dense_like(given[2])
)
