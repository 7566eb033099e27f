"""The inverse that every delta rule goes through."""

import pytest
import torch

from hybridzoo.kernels.triangular import unit_lower_inverse


@pytest.mark.parametrize("C", [1, 2, 4, 8, 16, 32, 64])
def test_the_inverse_times_the_matrix_is_the_identity(C: int) -> None:
    A = torch.randn(3, C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(C)).tril(-1) / C**0.5
    eye = torch.eye(C, dtype=torch.float64)
    assert torch.allclose(unit_lower_inverse(A) @ (eye + A), eye.expand(3, C, C), atol=1e-12)


def test_repeated_keys_cost_no_accuracy_in_float32() -> None:
    # Keys of cosine 0.99 with e = 1: where the product of powers (I-A)(I+A^2)(I+A^4)... loses three digits.
    A = torch.full((1, 64, 64), 0.99).tril(-1)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A.double())
    error = (unit_lower_inverse(A).double() - exact).norm() / exact.norm()
    assert error < 1e-6
