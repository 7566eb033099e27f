"""Boundaries of packed sequences: what they mean and what is refused."""

from __future__ import annotations

import pytest
import torch

from hybridzoo.kernels.packing import check_packing, locate

CPU = torch.device("cpu")


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
        check_packing(torch.tensor(values), 1, 5, CPU)


def test_packed_sequences_lie_in_one_row() -> None:
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        check_packing(torch.tensor([0, 5]), 2, 5, CPU)


def test_boundaries_lie_where_the_tokens_do_and_are_a_tensor() -> None:
    with pytest.raises(ValueError, match="cu_seqlens is on meta, but what it packs is on cpu"):
        check_packing(torch.tensor([0, 5], device="meta"), 1, 5, CPU)
    with pytest.raises(TypeError, match="cu_seqlens must be an int32 or int64 tensor, got list"):
        check_packing([0, 5], 1, 5, CPU)  # type: ignore[arg-type]
