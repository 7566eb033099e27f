"""Which calls the Triton backend takes, and why it refuses the others. Imports triton only to see whether it is there.

Shapes: K key dim, V value dim, L content chunk, r content rank.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from hybridzoo.kernels.state import ContentGate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 16  # tokens; head sizes and content chunks are multiples of it
MAX_HEAD = 256
MAX_RANK = 64
OLDEST_TRITON = (3, 6)  # what the kernels were checked with
MOST_OF_A_GROUP = 16  # programs of a content gate's head, which must all run at once, some with a multiprocessor each


def refusal(q: Tensor, v: Tensor, content: ContentGate | None) -> str | None:
    """Why this call cannot run on Triton, as the rest of a sentence that begins with the backend's name; or None."""
    K, V = q.shape[3], v.shape[3]
    if q.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, got {q.dtype}: use backend='torch'"
    if any(size % TILE or size > MAX_HEAD for size in (K, V)):
        return f"takes head sizes that are multiples of {TILE} up to {MAX_HEAD}, got K = {K} and V = {V}"
    if content is not None:
        if content.chunk % TILE:
            return f"takes content chunks that are multiples of {TILE}, got {content.chunk}: use backend='torch'"
        if not 1 <= content.down.shape[1] <= MAX_RANK:
            return f"takes content ranks from 1 to {MAX_RANK}, got {content.down.shape[1]}: use backend='torch'"
    return device_refusal(q.device.type, q.device.index, content is not None)


@torch.compiler.assume_constant_result
def device_refusal(kind: str, index: int | None, groups: bool = False) -> str | None:
    """Why the kernels, those whose programs wait for each other if `groups`, cannot run on such a device, or None."""
    return _known_refusal(kind, index, groups)


@functools.cache
def _known_refusal(kind: str, index: int | None, groups: bool) -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"needs the package triton, which cannot be imported ({error}): use backend='torch'"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return (
            f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {triton.__version__}: use backend='torch'"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if kind == "cpu":
        return (
            "needs tensors on a CUDA device, got cpu; to try it there, set TRITON_INTERPRET=1 before triton is imported"
        )
    if kind not in ("cuda", "meta"):
        return f"needs tensors on a CUDA device, got {kind}: use backend='torch'"
    if kind == "meta" or not torch.cuda.is_available():  # shapes are all that will be asked for
        return None
    if torch.version.hip is not None:
        return "is made for NVIDIA's GPUs: use backend='torch'"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or later, got {capability}: use backend='torch'"
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    if groups and multiprocessors < MOST_OF_A_GROUP:
        return (
            f"needs a GPU of {MOST_OF_A_GROUP} multiprocessors or more for a content gate, got {multiprocessors}: use "
            "backend='torch'"
        )
    return None
