"""How the Triton kernels are cut and scheduled, and what that takes of a multiprocessor. Imports no triton.

The choice follows from head sizes, the content gate and the dtype, and of the scans also from how many heads there
are; never from a length, so that a new length compiles nothing. The test suite compiles what is chosen here and holds
it to `shared_memory`.

Shapes: K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hybridzoo.kernels.recurrence_op import Call


class Config(NamedTuple):
    """One kernel's cut and schedule."""

    block_v: int  # value channels of a program
    num_warps: int
    num_stages: int


def options(num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """What a launch says to the compiler of a kernel."""
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        # All that a thread may have: ptxas left alone may give up on many live values and take 32.
        "maxnreg": min(255, 65536 // (32 * num_warps)),
        "enable_fp_fusion": True,  # said, since Triton's default changes with 3.10
    }


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


class StagedConfig(NamedTuple):
    """How the staged kernels are cut: tokens of a block, channels at a time, and warps."""

    block: int
    prepare_k: int
    prepare_warps: int
    scan_v: int  # value channels of a program of the two scans
    scan_warps: int
    scan_stages: int
    value_k: int
    value_v: int
    value_warps: int
    key_k: int
    key_warps: int


def staged_config(call: Call, save: bool) -> StagedConfig:
    """The staged kernels' cut: from head sizes, the dtype, whether states are kept, and how far heads fill a GPU.

    Beside bf16 products blocks are of 32 tokens where states are kept, which halves what is kept; 16 are faster to
    prepare, and in float32 the sums of decays stay short. Value channels are cut until the scans have a program for
    each of some 128 multiprocessors; three cuts are all that a new batch can compile.
    """
    K, V = power(call.q.shape[3]), power(call.v.shape[3])
    narrow = call.q.dtype == torch.bfloat16
    heads = call.S.shape[0] * call.v.shape[2]
    block = 32 if narrow and (save or heads < 64) else 16  # few heads: the scan is what takes long
    widest = 64 if narrow else 32
    scan_v = min(V, widest, max(16, widest * 128 // K))
    while scan_v > 16 and heads * (V // scan_v) < 128:
        scan_v //= 2
    return StagedConfig(
        block=block,
        prepare_k=min(K, V, 32),
        prepare_warps=1 if narrow and block == 16 else 2,
        scan_v=scan_v,
        scan_warps=4 if narrow or K <= 128 else 8,
        scan_stages=(2 if block == 32 else 3) if narrow else 1,
        value_k=min(K, 64 if narrow else 32),
        value_v=min(V, (128 if block == 32 else 64) if narrow else 32),
        value_warps=4,
        key_k=min(K, 16 if block == 32 else 32),
        key_warps=2,
    )
