import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.training.units import count, size


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (1_340_000_000, "1.34 G"),
        (0.5, "0.500"),
        (float("inf"), "inf"),
    ],
)
def test_a_count_is_three_digits_and_a_decimal_unit(value, said):
    assert count(value) == said


def test_a_unit_follows_its_prefix():
    assert [count(value, "FLOP") for value in (7, 1_050_000)] == ["7 FLOP", "1.05 MFLOP"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (96, "96 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (72_192, "70.5 KiB"), (2**30, "1.00 GiB")],
)
def test_a_size_is_three_digits_and_a_binary_unit(value, said):
    assert size(value) == said


@given(st.integers(min_value=0, max_value=10**20))
def test_what_is_printed_is_within_half_a_percent_of_what_is_meant(value):
    number, _, unit = count(value).partition(" ")
    power = ["", "k", "M", "G", "T", "P", "E"].index(unit) if unit else 0
    assert abs(float(number) * 1000**power - value) <= 0.005 * value
