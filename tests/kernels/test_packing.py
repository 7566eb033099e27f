"""Boundaries of packed sequences: what they mean and what is refused."""

from __future__ import annotations

import pytest
import torch

from hybridzoo.kernels.packing import check_cu_seqlens, locate


def test_tokens_know_their_sequence_and_position_past_empty_sequences() -> None:
    sequence, position = locate(torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32), 5)
    assert sequence.tolist() == [1, 1, 1, 3, 3]
    assert position.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 5], "must start at 0, got 1"),
        ([0, 4], "must end at T = 5, got 4"),
        ([0, 4, 3, 5], "must not decrease, got 3 after 4 at index 2"),
        ([0], r"expected shape \[N\+1\]"),
        ([[0, 5]], r"expected shape \[N\+1\]"),
    ],
)
def test_boundaries_that_do_not_describe_the_row_are_refused(values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(torch.tensor(values), 1, 5)


def test_boundaries_need_an_integer_dtype_and_one_row() -> None:
    with pytest.raises(TypeError, match="int32 or int64"):
        check_cu_seqlens(torch.tensor([0.0, 5.0]), 1, 5)
    with pytest.raises(ValueError, match="B = 1"):
        check_cu_seqlens(torch.tensor([0, 5]), 2, 5)
