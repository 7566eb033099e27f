"""Stand-ins for flash-attn 2, flash-attn-4 and xformers: their interfaces as published, computed plainly on a CPU.

They show that the backends ask these packages for the right thing, where the packages themselves need a GPU. Signatures
and meanings are those of flash-attn 2.8.3, flash-attn-4 4.0.0b36 and xformers 0.0.35. What the real kernels never
write, the gradient of keys after the last sequence, is NaN here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridzoo.mixers.softmax import flash, imports, xformers


class _Unwritten(torch.autograd.Function):
    """The same tensor, whose gradient is NaN from a row on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        d_x = d_x.clone()
        d_x[ctx.end :] = torch.nan
        return d_x, None


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float) -> Tensor:
    """One sequence, `[T, H, D]`: query i sees the keys from `i + S - T - left` to `i + S - T + right`; -1 is all."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    T, S, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(S) - (torch.arange(T)[:, None] + S - T)
    hidden = torch.zeros(T, S, dtype=torch.bool)
    if right >= 0:
        hidden |= ahead > right
    if left >= 0:
        hidden |= -ahead > left
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.double()).to(q.dtype)


def _packed(q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, *rest: Any) -> Tensor:
    assert q_bounds.dtype == k_bounds.dtype == torch.int32
    ends = k_bounds.tolist()
    k, v = _Unwritten.apply(k, ends[-1]), _Unwritten.apply(v, ends[-1])
    pieces = zip(pairwise(q_bounds.tolist()), pairwise(ends), strict=True)
    return torch.cat([_one(q[a:b], k[c:d], v[c:d], *rest) for (a, b), (c, d) in pieces])


def _sides(causal: bool, window: tuple[int | None, int | None]) -> tuple[int, int]:
    left, right = (-1 if side is None else side for side in window)
    return left, 0 if causal else right


def _flash_2() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        rest = (softmax_scale, *_sides(causal, window_size), softcap)
        return torch.stack([_one(*row, *rest) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *_sides(causal, window_size), softcap)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def _flash_4(second: ModuleType) -> ModuleType:
    module = ModuleType("flash_attn.cute")
    sums = torch.zeros(())

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        y = second.flash_attn_func(q, k, v, 0.0, softmax_scale, causal, window_size, softcap)
        return y, sums

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        min_seqlen_k: int | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        longest = (max_seqlen_q, max_seqlen_k)
        rest = (0.0, softmax_scale, causal, window_size, softcap)
        return second.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, *rest), sums

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@dataclass
class LowerTriangularFromBottomRightMask:
    window: int = 0

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightMask:
        return LowerTriangularFromBottomRightMask(window_size)


@dataclass
class BlockDiagonalMask:
    q_seqlen: list[int]
    kv_seqlen: list[int]
    window: int | None = None  # 0 is causal without one

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: torch.device | None = None
    ) -> BlockDiagonalMask:
        keys = q_seqlen if kv_seqlen is None else kv_seqlen
        assert all(isinstance(n, int) for n in (*q_seqlen, *keys))
        return cls(q_seqlen, keys)

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, 0)

    def make_local_attention_from_bottomright(self, window_size: int) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, window_size)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    """xformers': as many key heads as query heads, `[B, M, H, K]`."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    rest = (scale, attn_bias.window - 1, 0, 0.0)
    if isinstance(attn_bias, LowerTriangularFromBottomRightMask):
        return torch.stack([_one(*row, *rest) for row in zip(query, key, value, strict=True)])
    assert query.shape[0] == 1
    assert query.shape[1] == sum(attn_bias.q_seqlen)
    assert key.shape[1] == value.shape[1] == sum(attn_bias.kv_seqlen)
    rows = zip(
        query[0].split(attn_bias.q_seqlen),
        key[0].split(attn_bias.kv_seqlen),
        value[0].split(attn_bias.kv_seqlen),
        strict=True,
    )
    return torch.cat([_one(*row, *rest) for row in rows])[None]


def _xformers() -> dict[str, ModuleType]:
    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    top, ops, fmha, bias = modules.values()
    top.ops, ops.fmha, fmha.attn_bias = ops, fmha, bias
    ops.memory_efficient_attention = memory_efficient_attention
    kernel = SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: True))
    fmha.flash = kernel
    bias.LowerTriangularFromBottomRightMask = LowerTriangularFromBottomRightMask
    bias.BlockDiagonalMask = BlockDiagonalMask
    return modules


def install(
    monkeypatch: pytest.MonkeyPatch,
    *packages: str,
    versions: Mapping[str, str] | None = None,
    capability: int = 9,
) -> None:
    """Put stand-ins for `packages` (by their distributions' names) in the place of modules, as on a GPU of this compute
    capability.

    They are no distributions, and so have no versions but those that are given.
    """
    second = _flash_2()
    modules = {"flash_attn": second if "flash-attn" in packages else ModuleType("flash_attn")}
    if "flash-attn-4" in packages:
        modules["flash_attn.cute"] = modules["flash_attn"].cute = _flash_4(second)
        modules["flash_attn"].__path__ = []
    if "xformers" in packages:
        modules |= _xformers()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for backend in (flash, xformers):
        monkeypatch.setattr(backend, "device_refusal", lambda *_: None)
    monkeypatch.setattr(flash, "capability", lambda *_: capability)
    monkeypatch.setattr(imports, "installed", (versions or {}).get)
    for name in ("_import_refusal", "_version_refusal"):
        asked = getattr(imports, name)
        monkeypatch.setattr(imports, name, getattr(asked, "__wrapped__", asked))
