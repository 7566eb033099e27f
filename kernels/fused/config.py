"""How the Triton kernels are cut and scheduled, and what that takes of a multiprocessor. Imports no triton.

The choice follows from head sizes, the content gate and the dtype, never from a length or a batch: a new length
compiles nothing. The test suite compiles what is chosen here and holds it to `shared_memory`.

Shapes: K key dim, V value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """One kernel's cut and schedule."""

    block_v: int  # value channels of a program
    num_warps: int
    num_stages: int

    @property
    def registers(self) -> int:
        """What a thread may have. Said, because ptxas left alone may give up on many live values and take 32."""
        return min(255, 65536 // (32 * self.num_warps))


def power(size: int) -> int:
    """The least power of two that holds `size`, and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def configs(K: int, V: int, content: bool, dtype: torch.dtype) -> tuple[Config, Config]:
    """The forward kernel's configuration and the backward kernel's."""
    narrow = dtype == torch.bfloat16  # else operands of 4 bytes
    most = 128 * 128 if narrow else 128 * 64  # of a state, in the registers of a program
    # A content gate reads every value channel, so a program has them all.
    block_v = power(V) if content else min(power(V), max(16, most // power(K)))
    warps = 8 if power(K) * block_v >= (128 * 64 if narrow else 64 * 64) else 4
    return Config(block_v, warps, 2 if narrow else 1), Config(block_v, warps, 1)


def shared_memory(K: int, V: int, content: bool, dtype: torch.dtype) -> int:
    """A bound on the KiB of shared memory that a program of either kernel takes."""
    if dtype == torch.bfloat16:
        return 80
    state = power(K) * configs(K, V, content, dtype)[1].block_v
    return 72 if state <= 64 * 64 else 160 if state <= 128 * 64 else 200
