"""Attention by torch's FlexAttention (arXiv 2412.05496): Triton kernels on a GPU, C++ on a CPU, compiled when met.

A kernel walks the blocks of keys that some query of a block sees and masks only those that not all see. Which these
are follows from the spans without looking at single pairs, and without asking the device.

Shapes: B batch, T queries, S key slots, H query heads, H_kv key heads, D head dim, N sequences.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hybridzoo.mixers.memory import remembered
from hybridzoo.mixers.softmax.imports import device_refusal, import_refusal
from hybridzoo.mixers.softmax.packed import line_up
from hybridzoo.mixers.softmax.rule import Backend, Call, SoftmaxRule
from hybridzoo.mixers.softmax.spans import Spans, batched_spans, packed_spans

Mask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query and key

OLDEST_TORCH = (2, 8)
BLOCK = 128  # queries and keys of a block, as torch's own tables have them
SMALLEST_HEAD = 16
MOST_COMPILED = 256  # variants that one process may compile; torch's own limit of 8 is soon met by windows and dtypes


def refusal(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if _torch_version() < OLDEST_TORCH:
        return f"needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, got {torch.__version__}"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, got {call.dtype}: use backend='reference'"
    if call.device == "cpu":
        if call.gradient:
            return "has no backward pass on a CPU: use backend='sdpa', or call it under torch.no_grad()"
        return _compiler_refusal()
    if call.head_dim < SMALLEST_HEAD:
        return f"takes head sizes from {SMALLEST_HEAD}, got {call.head_dim}: use backend='sdpa'"
    if (why := import_refusal("triton", "jit", "triton")) is not None:
        return why
    return device_refusal(call.device, call.number, (8, 0))


@torch.compiler.assume_constant_result
def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@torch.compiler.assume_constant_result
def _compiler_refusal() -> str | None:
    if not torch.cpu._is_avx2_supported():
        return "needs a CPU with AVX2: use backend='sdpa'"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "needs a C++ compiler on a CPU, and none is on the path: use backend='sdpa'"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, length: Tensor | None) -> Tensor:
    """A batch, its rows right-aligned."""
    T, S = q.shape[1], k.shape[1]
    if S > T:
        return _run(q, k, v, rule, _blocks_over(batched_spans(T, S, rule.window, length, q.device), S))
    window = None if rule.window is None or rule.window >= T else rule.window
    make = _causal_blocks if torch.compiler.is_compiling() else _known_causal_blocks
    return _run(q, k, v, rule, make(T, window, q.device))


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    cu_seqlens: Tensor,
    cache: tuple[Tensor, Tensor],
    length: Tensor,
) -> Tensor:
    """N sequences in one call."""
    T = q.shape[0]
    line = line_up(k, v, cu_seqlens, cache, length)

    def blocks() -> Any:
        return _blocks_over(packed_spans(T, rule.window, cu_seqlens, line.bounds), line.k.shape[0])

    fresh = cache[0].shape[1] == 0  # then layers share them
    made = remembered(cu_seqlens, ("blocks", T, rule.window), blocks) if fresh else blocks()
    return _run(q[None], line.k[None], line.v[None], rule, made)[0]


def _blocks_over(spans: Spans, S: int) -> Any:
    first, last = (x.int().contiguous() for x in spans)
    if first.shape[0] == 1:
        # A row of their own, and not `first[0, query]`: a compiler makes a tensor of the 0, on the CPU.
        begin, end = first[0], last[0]

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= begin[query]) & (key <= end[query])

    else:

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[b, query]) & (key <= last[b, query])

    return blocks_of(Spans(first, last), S, seen)


def _run(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, blocks: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    score = None
    if rule.softcap is not None:
        # A tensor, as a number that differs between models would be made a symbol of the second one's kernel.
        bound = torch.full((), rule.softcap, device=q.device)

        def capped(s: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return bound * torch.tanh(s / bound)

        score = capped
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {
        "scale": rule.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": _kernel_options(q) if q.is_cuda else None,
    }
    if torch.compiler.is_compiling():
        y: Tensor = flex_attention(q, k, v, score_mod=score, block_mask=blocks, **options)
    else:
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
                y = compiled()(q, k, v, score_mod=score, block_mask=blocks, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            if q.is_cuda:
                raise
            # The C++ that torch makes does not always compile, and the compiler's words are 100 KB.
            said = str(error).strip().partition("\n")[0][:200]
            raise RuntimeError(
                f"backend='flex': torch {torch.__version__} makes no kernel of this call for a CPU ({said}): use "
                "backend='sdpa'"
            ) from None
    return y.transpose(1, 2)


def _kernel_options(q: Tensor) -> dict[str, Any] | None:
    """What torch's own choice would get wrong, for the forward pass of `q [B, H, T, D]`.

    A kernel rounds D up to a power of two, but torch looks its blocks up by D itself and takes large ones for a size
    that it does not know: float32 heads of 192 would want 336 KiB of shared memory, of which an H200 has 227.
    """
    head, wide = q.shape[-1], q.dtype == torch.float32
    if head & (head - 1) == 0 or head <= (64 if wide else 128):
        return None
    return {"fwd_BLOCK_M": 32 if wide else 64, "fwd_BLOCK_N": 32}


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled whole: a variant that does not compile is an error, not a fall back to full scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _causal_blocks(T: int, window: int | None, device: torch.device) -> Any:
    if window is None:

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query

    else:
        reach = torch.full((), window, device=device, dtype=torch.int32)

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query - key < reach)

    return blocks_of(batched_spans(T, T, window, None, device), T, seen)


@functools.lru_cache(maxsize=32)
def _known_causal_blocks(T: int, window: int | None, device: torch.device) -> Any:
    with torch.inference_mode(False):  # kept for calls that may be differentiated
        return _causal_blocks(T, window, device)


def blocks_of(spans: Spans, S: int, seen: Mask) -> Any:
    """Return the `BlockMask` of these spans over S slots; `seen` is the same for one pair.

    Ends that never move back make both tests exact at a block's own ends but for gaps between a block's queries, whose
    blocks are walked and masked whole.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T, device = spans.first.shape[1], spans.first.device
    begin = torch.arange(0, T, BLOCK, device=device)
    end = (begin + BLOCK - 1).clamp(max=T - 1)
    key_begin = torch.arange(0, S, BLOCK, device=device)
    key_end = key_begin + BLOCK - 1

    def at(ends: Tensor, token: Tensor) -> Tensor:
        return ends[:, token][:, None, :, None]  # [B, 1, T / BLOCK, 1]

    some = (key_end >= at(spans.first, begin)) & (key_begin <= at(spans.last, end))
    whole = (key_begin >= at(spans.first, end)) & (key_end <= at(spans.last, begin))
    whole = whole & (begin + BLOCK <= T)[:, None]  # queries that are not there see nothing
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, S)
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their numbers, those that it has first."""
    return table.sum(-1).int(), table.int().argsort(dim=-1, descending=True, stable=True).int()


FLEX = Backend(
    "flex",
    "FlexAttention, compiled to Triton on a GPU; to C++ on a CPU, forward only",
    ("torch", "triton"),
    refusal,
    attend,
    attend_packed,
)
