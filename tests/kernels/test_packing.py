"""Boundaries of packed sequences: what they mean and what is refused."""

from __future__ import annotations

import pytest
import torch

from hybridzoo.kernels.packing import check_packing, locate


def test_tokens_know_their_sequence_and_position_past_empty_sequences() -> None:
    sequence, position = locate(torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32), 5)
    assert sequence.tolist() == [1, 1, 1, 3, 3]
    assert position.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 5], "must start at 0 and end at T = 5, got 1 and 5"),
        ([0, 4], "must start at 0 and end at T = 5, got 0 and 4"),
        ([0, 4, 3, 5], "must not decrease, got 4 then 3"),
        ([0], r"\[N\+1\] with N >= 1"),
        ([[0, 5]], r"\[N\+1\] with N >= 1"),
        ([0.0, 5.0], "int32 or int64"),
    ],
)
def test_boundaries_that_do_not_describe_the_row_are_refused(values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_packing(torch.tensor(values), 1, 5)


def test_packed_sequences_lie_in_one_row() -> None:
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        check_packing(torch.tensor([0, 5]), 2, 5)
