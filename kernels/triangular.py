"""The inverse of a unit lower-triangular matrix, for many tiles at once.

Shapes: G matrices, C rows (a power of two).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 16


def unit_lower_inverse(A: Tensor, out: Tensor | None = None) -> Tensor:
    """`(I + A)^-1` for strictly lower-triangular `A [G, C, C]`, C a power of two; into `out` where given.

    Blocks double: with `X` the inverse of the diagonal blocks so far and `B` what A holds newly inside the doubled
    ones, `X - X B X` is the inverse of these. Unlike the product `(I-A)(I+A^2)(I+A^4)...`, whose terms grow and cancel
    when keys repeat, each step multiplies true inverses. Small blocks are inverted as full products on leaves of 16.
    """
    C = A.shape[-1]
    leaf = min(C, _LEAF)
    X = torch.zeros_like(A) if out is None else out.zero_()
    diagonal = _diagonal_blocks(X, leaf)
    diagonal.copy_(_leaf_inverse(_diagonal_blocks(A, leaf).reshape(-1, leaf, leaf)).view(diagonal.shape))
    h = leaf
    while h < C:
        below = _diagonal_blocks(A, 2 * h)[:, :, h:, :h]
        blocks = _diagonal_blocks(X, 2 * h)
        upper, lower = blocks[:, :, :h, :h], blocks[:, :, h:, h:]
        blocks[:, :, h:, :h] = torch.matmul(torch.matmul(lower, below), upper).neg_()
        h *= 2
    return X


def _leaf_inverse(A: Tensor) -> Tensor:
    C = A.shape[-1]
    size = min(C, 4)
    places = torch.arange(C, device=A.device)
    eye = torch.eye(C, dtype=A.dtype, device=A.device)
    inner = A * _same_block(places, size)
    X = torch.bmm(eye - inner, eye + torch.bmm(inner, inner))  # exact for blocks of 4: inner^4 = 0
    while size < C:
        new = A * (_same_block(places, 2 * size) & ~_same_block(places, size))
        X = torch.baddbmm(X, torch.bmm(X, new), X, alpha=-1)
        size *= 2
    return X


def _same_block(places: Tensor, size: int) -> Tensor:
    block = places // size
    return block[:, None] == block[None, :]


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    G, C, _ = x.shape
    n = C // size
    return x.view(G, n, size, n, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)
