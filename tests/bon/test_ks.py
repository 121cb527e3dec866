"""The Kolmogorov-Smirnov test against SciPy's, prompt by prompt."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.stats import _stats_py

from vbon_jax.bon import ks
from vbon_jax.bon.ks import ks_test


def scipy_tests(a, b):
    tests = [stats.ks_2samp(x, y) for x, y in zip(a, b, strict=True)]
    return np.array([t.statistic for t in tests]), np.array([t.pvalue for t in tests])


def test_golden():
    # a below b altogether: 2 of the 4! / (2! 2!) = 6 orders are as far apart. Interleaved: all are.
    statistic, p_value = ks_test([[1, 2], [1, 3]], [[3, 4], [2, 4]])
    np.testing.assert_array_equal(statistic, [1.0, 0.5])
    np.testing.assert_allclose(p_value, [2 / 6, 1.0], rtol=1e-12)
    assert statistic.dtype == p_value.dtype == np.float64


@pytest.mark.parametrize("sizes", [(25, 60), (60, 25), (7, 1), (1, 1), (16, 24), (13, 31), (9, 9)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_scipy(sizes, ties):
    # Shifts of 0 to 4 standard deviations: p-values from 1 to the smallest there are.
    rng = np.random.default_rng(sum(sizes))
    a = rng.normal(size=(40, sizes[0])) + np.linspace(0, 4, 40)[:, None]
    b = rng.normal(size=(40, sizes[1]))
    if ties:
        a, b = np.round(a), np.round(b)
    statistic, p_value = ks_test(a, b)
    want_statistic, want_p_value = scipy_tests(a, b)
    np.testing.assert_allclose(statistic, want_statistic, atol=1e-12)
    np.testing.assert_allclose(p_value, want_p_value, rtol=1e-10)


def test_the_sizes_of_the_paper_and_p_values_of_1e_200():
    h = np.append(np.arange(1, 3001, 29), 3000)
    got = ks._exact_p_values(h, 250, 600)
    want = [_stats_py._compute_outer_prob_inside_method(250, 600, 50, int(i)) for i in h]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == 1 and 0 < got[-1] < 1e-220


@pytest.mark.parametrize("h", [20_000, 300_000])
def test_large_samples_that_hardly_share_a_divisor(h):
    # A wide band, much of it where no path comes from: nothing there may grow without limit.
    with np.errstate(over="raise", invalid="raise"):
        got = ks._exact_p_values(np.array([h, 990_000]), 1000, 999)
    want = _stats_py._compute_outer_prob_inside_method(1000, 999, 1, h)
    np.testing.assert_allclose(got[0], want, rtol=1e-11)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (2, 6)])
def test_p_values_count_the_orders_of_the_pooled_sample(sizes):
    total = sum(sizes)
    chosen = np.array(list(itertools.combinations(range(total), sizes[0])), float)
    rest = np.array([np.setdiff1d(np.arange(total), c) for c in chosen], float)
    statistic, p_value = ks_test(chosen, rest)
    want = [(statistic >= s - 1e-9).mean() for s in statistic]
    np.testing.assert_allclose(p_value, want, rtol=1e-12)


def test_many_rows_are_their_own_rows(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 8)), rng.normal(size=(30, 12))
    whole = ks_test(a, b)
    monkeypatch.setattr(ks, "_BLOCK_VALUES", 50)
    monkeypatch.setattr(ks, "_BLOCK_H", 3)
    for got, one in zip(ks_test(a, b), whole):
        np.testing.assert_array_equal(got, one)


def test_equal_samples_infinities_and_signed_zeros():
    a = [[1.0, 2.0, 2.0], [-np.inf, 0.0, np.inf], [-0.0, 0.0, 1.0]]
    b = [[2.0, 1.0, 2.0], [0.0, 1.0, np.inf], [0.0, 0.0, 2.0]]
    statistic, p_value = ks_test(a, b)
    np.testing.assert_allclose(statistic, scipy_tests(np.array(a), np.array(b))[0])
    assert statistic[0] == 0 and p_value[0] == 1


def test_an_exact_value_that_scipy_rounds_above_1_is_1():
    # Its method="auto" warns there and gives the asymptotic value, which is below 1.
    n = next(n for n in range(2, 200) if _stats_py._compute_prob_outside_square(n, 1) > 1)
    a = np.arange(n)[None] * 2.0
    statistic, p_value = ks_test(a, a + 1)
    assert statistic[0] == pytest.approx(1 / n) and p_value[0] == 1


def test_above_ten_thousand_the_asymptotic_formula_as_in_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 10_001)), rng.normal([[0], [0.2], [2]], size=(3, 40))
    statistic, p_value = ks_test(a, b)
    want_statistic, want_p_value = scipy_tests(a, b)
    np.testing.assert_allclose(statistic, want_statistic, atol=1e-12)
    np.testing.assert_allclose(p_value, want_p_value, rtol=1e-9)


def test_what_cannot_be_tested_is_refused():
    good = np.zeros((2, 3))
    with pytest.raises(ValueError, match="b_PxK holds 1 NaN among 6 rewards"):
        ks_test(good, [[0, 1, 2], [0, np.nan, 1]])
    with pytest.raises(ValueError, match=r"a_PxM must .* got shape \(3,\)"):
        ks_test(np.zeros(3), good)
    with pytest.raises(ValueError, match=r"b_PxK must .* got shape \(2, 0\)"):
        ks_test(good, np.zeros((2, 0)))
    with pytest.raises(ValueError, match="got 2 and 1 rows"):
        ks_test(good, good[:1])
    with pytest.raises(ValueError, match="got 0 and 0 rows"):
        ks_test(good[:0], good[:0])
