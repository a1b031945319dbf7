"""Numbers in words."""

import pytest

from lomo_jax.report import words


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([2.5, 2.75, 3.0], ["2.50", "2.75", "3.00"]),
        ([10.83012, 10.83014, 10.83016], ["10.83012", "10.83014", "10.83016"]),
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0.1 + 0.2, 0.4], ["0.3", "0.4"]),
        ([100_000, 250_000], ["100k", "250k"]),
        ([0, 5e-4, 1e-3], ["0", "5e-4", "1e-3"]),
        ([7.0], ["7"]),
    ],
)
def test_the_numbers_of_an_axis_are_alike_and_differ(values, shown):
    assert words.ticks(values) == shown


def test_those_of_a_logarithmic_axis_are_each_for_itself():
    shown = words.magnitudes([1e-5, 0.001, 0.1, 1, 200, 20_000])
    assert shown == ["1e-5", "0.001", "0.1", "1", "200", "20k"]
