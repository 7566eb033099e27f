"""Random inputs of `short_conv` for tests: every option, length, packing and tail."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridzoo.kernels.short_conv import ShortConvResult, short_conv


@dataclass
class ConvProblem:
    """One call: `x`, `weight`, and where there are such `bias` and `tail`; all differentiable."""

    tensors: dict[str, Tensor]
    cu_seqlens: Tensor | None
    silu: bool
    ends: tuple[str, ...]  # which results the loss reads

    def to(self, dtype: torch.dtype, device: str = "cpu") -> ConvProblem:
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return ConvProblem({n: x.to(device, dtype) for n, x in self.tensors.items()}, bounds, self.silu, self.ends)

    def call(self, backend: str, tensors: dict[str, Tensor] | None = None) -> ShortConvResult:
        """Run the convolution; `tensors` replace the problem's own."""
        arguments = self.tensors if tensors is None else tensors
        activation = "silu" if self.silu else None
        return short_conv(**arguments, cu_seqlens=self.cu_seqlens, activation=activation, backend=backend)

    def results(self, backend: str) -> dict[str, Tensor]:
        """Outputs and every gradient by name, of a fixed random loss whose weights are whole numbers."""
        leaves = {n: x.detach().clone().requires_grad_() for n, x in self.tensors.items()}
        outputs = self.call(backend, leaves)._asdict()
        seed = torch.Generator().manual_seed(1)
        weights = {n: torch.randint(-4, 5, x.shape, generator=seed).to(x) for n, x in outputs.items()}
        names = [n for n in self.ends if outputs[n].numel() and outputs[n].requires_grad]
        torch.autograd.backward([outputs[n] for n in names], [weights[n] for n in names])
        found = {n: x.detach() for n, x in outputs.items()}
        found |= {f"d_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
        return {n: x for n, x in found.items() if x.numel()}


def make_conv(
    *,
    seed: int = 0,
    B: int = 2,
    T: int = 140,
    C: int = 20,
    W: int = 4,
    bias: bool = True,
    silu: bool = True,
    tail: bool = True,
    lengths: list[int] | None = None,
    ends: tuple[str, ...] = ("y", "tail"),
) -> ConvProblem:
    """Draw a problem in float64; `lengths` packs sequences into one row."""
    g = torch.Generator().manual_seed(seed)
    N, cu_seqlens = B, None
    if lengths is not None:
        B, T, N = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "tail": (N, C, W - 1)}
    drawn = {n: torch.randn(*shape, generator=g, dtype=torch.float64) for n, shape in shapes.items()}
    absent = {name for name, there in (("bias", bias), ("tail", tail)) if not there}
    return ConvProblem({n: x for n, x in drawn.items() if n not in absent}, cu_seqlens, silu, ends)
