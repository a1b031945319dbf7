"""Thinning out, means, limits."""

import numpy as np
import pytest

from lomo_jax.report.series import ceiling, downsample, isolated, series, smooth

_NAN = np.nan


def test_null_is_nan_and_a_record_without_the_key_is_no_point():
    records = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}]
    steps, values = series(records, "a")
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [2, _NAN])


def test_thinning_keeps_ends_and_spikes():
    steps = np.arange(100_000.0)
    values = np.sin(steps / 5000)
    values[[31_234, 77_777]] = (50.0, -50.0)
    thin_steps, thin = downsample(steps, values, 1000)
    assert 500 < len(thin) <= 1000
    np.testing.assert_array_equal(thin, values[thin_steps.astype(int)])
    assert (thin_steps[0], thin_steps[-1]) == (0, 99_999)
    assert {31_234, 77_777} <= set(thin_steps)
    assert np.all(np.diff(thin_steps) > 0)


def test_a_short_line_is_not_thinned():
    steps, values = np.arange(10.0), np.arange(10.0) ** 2
    np.testing.assert_array_equal(downsample(steps, values, 10), (steps, values))


def test_a_long_gap_stays_when_thinned():
    values = np.ones(10_000)
    values[4000:6000] = _NAN
    thin_steps, thin = downsample(np.arange(10_000.0), values, 100)
    within = (thin_steps > 4200) & (thin_steps < 5800)
    assert within.any()
    assert np.all(np.isnan(thin[within]))


def test_mean_over_a_twentieth():
    values = np.zeros(60)
    values[[10, 30]] = (3.0, _NAN)
    mean = smooth(values)  # of three points
    assert mean is not None
    np.testing.assert_allclose(mean[8:13], [0, 1, 1, 1, 0])
    assert np.flatnonzero(np.isnan(mean)).tolist() == [30]
    ramp = smooth(np.arange(60.0))
    assert ramp is not None
    np.testing.assert_allclose(ramp, np.arange(60.0))  # at its ends, too
    assert smooth(np.arange(39.0)) is None


def test_points_between_gaps():
    alone = isolated(np.array([1, _NAN, 2, 3, _NAN, 4]))
    assert alone.tolist() == [True, False, False, False, False, True]


def test_outliers_do_not_set_the_limit():
    values = np.linspace(3, 2, 101)
    assert ceiling(values) == 3
    values[50] = 1000
    # 95 % of the values are below 2.96: then one and a half times the distance to the lowest.
    assert ceiling(values) == pytest.approx(2.96 + 1.5 * 0.96)
    assert ceiling(np.array([1, 2, 1000.0, _NAN])) == 1000  # too few to tell
    assert np.isnan(ceiling(np.array([_NAN])))
