"""How the Triton kernels are cut and scheduled, and what that takes of a multiprocessor. Imports no triton.

The choice follows from head sizes, flags, the dtype, whether a gradient is to come, and how many heads there are; never
from a length, so that a new length compiles nothing. The test suite compiles what is chosen here and holds it to
MOST_SHARED.

Shapes: K key dim, V value dim.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from hybridzoo.kernels.fused.form import Form

# KiB of shared memory that a program of any kernel may take: every GPU of compute capability 8.0 and later has 99.
MOST_SHARED = 96

# Sequences times heads below which a GPU is not filled, so that what a head does one after another is all that counts.
FEW = 64


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


class Cuts(NamedTuple):
    """How the kernels are cut: tokens of a block, channels at a time, and warps."""

    block: int
    prepare_k: int
    prepare_warps: int
    scan_v: int  # value channels of a program of the two scans
    scan_warps: int
    scan_stages: int
    apart: bool  # a launch for each of the two steps of the gradients
    states_k: int  # key channels of a program of the first step, or of both; of both too with a content gate
    states_v: int
    states_warps: int
    pairs_k: int  # key channels at a time in the second step
    pairs_warps: int
    group: int  # programs of a head, with a content gate
    group_warps: int


def block_of(form: Form, save: bool) -> int:
    """Tokens of a block: 32 beside bf16 products where states are kept, which halves what is kept, and for few heads,
    whose scan is what takes long. Otherwise 16: faster to prepare, and in float32 the sums of decays stay short. With a
    content gate too, where a chunk's blocks are all that can be worked on at a time."""
    narrow = form.dtype == torch.bfloat16 and not form.chunk
    return 32 if narrow and (save or form.N * form.HV < FEW) else 16


def cuts_of(form: Form, save: bool) -> Cuts:
    """The kernels' cut for a form of call, whose states are kept if `save`."""
    narrow, channels = form.dtype == torch.bfloat16, form.decay == 2 or form.erase
    heads, content = form.N * form.HV, form.chunk > 0
    full = not channels and (form.qk_norm or (form.decay > 0 and form.correct > 0))
    return _cuts(form.K, form.V, heads, block_of(form, save), narrow, content, form.serial, channels, full)


@functools.cache
def _cuts(
    K: int, V: int, heads: int, block: int, narrow: bool, content: bool, serial: bool, channels: bool, full: bool
) -> Cuts:
    """The cut for so many heads, `narrow` where products are of bf16, `channels` where each has a decay of its own,
    `full` where one launch with both steps of the gradients has more to hold than registers of two warps do.

    Value channels are cut until the scans have a program for each of some 128 multiprocessors, and with a content gate,
    where the same programs do all else too, four: up to three cuts, which a new batch may compile. Programs that run
    one after another cannot share a content gate's head.
    """
    K, V = power(K), power(V)
    widest = 64 if narrow else 32
    scan_v = min(V, widest, max(16, widest * 128 // K))
    while scan_v > 16 and heads * (V // scan_v) < (512 if content else 128):
        scan_v //= 2
    if content and serial:
        scan_v = V
    return Cuts(
        block=block,
        prepare_k=min(K, 32),
        prepare_warps=1 if narrow and block == 16 else 2,
        scan_v=scan_v,
        scan_warps=4 if narrow or K <= 128 else 8,
        scan_stages=1 if not narrow else 2 if content or K > 128 or (block == 32 and heads >= FEW and K > 64) else 3,
        apart=channels,
        states_k=min(K, 64 if narrow else 32),
        states_v=min(V, (128 if block == 32 and max(K, V) <= 128 else 64) if narrow else 16),
        states_warps=2 if block == 16 or (max(K, V) <= 64 and not full) else 4,
        pairs_k=min(K, 32 if narrow and block == 16 else 16),
        pairs_warps=2,
        group=V // scan_v,
        group_warps=2 if narrow else 4 if K <= 128 else 8,
    )
