"""Exact quantities of tiny worlds, against a walk over all n-tuples of samples."""

import itertools

import numpy as np
import pytest

from vbon_jax.bon import enumeration
from vbon_jax.bon.distribution import log_bon_prob, log_bon_ratio

REF = np.array([0.1, 0.25, 0.05, 0.4, 0.2])
TIED = np.array([1.0, 0.0, 1.0, 0.0, 2.0])
INJECTIVE = np.array([3.0, -1.0, 0.5, 0.0, 2.0])


def bon_by_brute_force(ref_S, rewards_S, n):
    """P(best-of-n returns y): all n-tuples, a uniformly random one of the best in each."""
    bon_S = np.zeros(len(ref_S))
    for draw in itertools.product(range(len(ref_S)), repeat=n):
        best = [y for y in draw if rewards_S[y] == max(rewards_S[list(draw)])]
        for y in best:
            bon_S[y] += np.prod(ref_S[list(draw)]) / len(best)
    return bon_S


def test_log_f_and_mass_by_hand():
    log_f_S, log_mass_S = enumeration.log_f_and_mass(np.log(REF), TIED)
    np.testing.assert_allclose(np.exp(log_f_S), [0.65, 0, 0.65, 0, 0.8], rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_mass_S), [0.15, 0.65, 0.15, 0.65, 0.2], rtol=1e-12)
    log_f_S, log_mass_S = enumeration.log_f_and_mass(np.log(REF), INJECTIVE)
    np.testing.assert_allclose(np.exp(log_f_S), [0.9, 0, 0.65, 0.25, 0.7], rtol=1e-12)
    np.testing.assert_allclose(log_mass_S, np.log(REF), rtol=1e-12)


@pytest.mark.parametrize("rewards_S", [TIED, INJECTIVE, np.ones(5)], ids=["tied", "order", "flat"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_formula_1_equals_brute_force(rewards_S, n):
    want_S = bon_by_brute_force(REF, rewards_S, n)
    np.testing.assert_allclose(
        np.exp(enumeration.log_bon(np.log(REF), rewards_S, n)), want_S, rtol=1e-12
    )
    log_f_S, log_mass_S = enumeration.log_f_and_mass(np.log(REF), rewards_S)
    float32_S = REF * np.exp(log_bon_ratio(log_f_S, log_mass_S, n))
    np.testing.assert_allclose(float32_S, want_S, rtol=2e-6)


def test_ties_by_a_fixed_order_are_an_injective_reward():
    # Strings 0 and 2 tie, as do 1 and 3; the later in the list counts as the better.
    order_S = np.lexsort((np.arange(5), TIED)).argsort()
    want_S = np.zeros(5)
    for draw in itertools.product(range(5), repeat=3):
        want_S[max(draw, key=lambda y: (TIED[y], y))] += np.prod(REF[list(draw)])
    np.testing.assert_allclose(
        np.exp(enumeration.log_bon(np.log(REF), order_S, 3)), want_S, rtol=1e-12
    )
    log_f_S, _ = enumeration.log_f_and_mass(np.log(REF), order_S)
    np.testing.assert_allclose(np.exp(log_bon_prob(log_f_S, np.log(REF), 3)), want_S, rtol=2e-6)


@pytest.mark.parametrize("n", [1.0, 3.3, 1000.0])
def test_log_bon_is_normalised_and_strings_of_no_mass_stay_so(n):
    log_ref_S = np.append(np.log(REF), [-300.0, -np.inf, -np.inf])
    for rewards_S in (np.arange(8), -np.arange(8), [0, 1, 1, 2, 2, 2, 3, 2]):
        log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
        np.testing.assert_allclose(np.exp(log_bon_S).sum(), 1, rtol=1e-12)
        assert (log_bon_S[-2:] == -np.inf).all() and not np.isnan(log_bon_S).any()


def test_kl_by_hand():
    half, skew = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    np.testing.assert_allclose(enumeration.kl(half, skew), 0.5 * np.log(4 / 3))
    one = np.array([0.0, -np.inf])
    np.testing.assert_allclose(enumeration.kl(one, half), np.log(2))
    assert enumeration.kl(half, one) == np.inf
    assert enumeration.kl(one, one) == 0


def test_win_rate_by_hand():
    # The policy says string 4 (beats 0.8, ties 0.2) or string 0 (beats 0.65, ties 0.15).
    log_p_S = np.log([0.5, 1e-300, 1e-300, 1e-300, 0.5])
    got = enumeration.win_rate(log_p_S, np.log(REF), TIED)
    np.testing.assert_allclose(got, (0.9 + 0.725) / 2)
    np.testing.assert_allclose(enumeration.win_rate(np.log(REF), np.log(REF), TIED), 0.5)


def test_bad_worlds_are_refused():
    with pytest.raises(ValueError, match=r"log_ref_S must hold every string.* sums to 0\.5"):
        enumeration.log_f_and_mass(np.log(REF / 2), TIED)
    with pytest.raises(ValueError, match="sums to nan"):
        enumeration.kl(np.full(5, np.nan), np.log(REF))
    with pytest.raises(ValueError, match="rewards_S holds 2 NaN among 5"):
        enumeration.log_bon(np.log(REF), [1, np.nan, 2, np.nan, 0], 2)
    with pytest.raises(ValueError, match=r"shape \(5,\), got \(4,\)"):
        enumeration.win_rate(np.log(REF), np.log(REF), TIED[:4])
    with pytest.raises(ValueError, match="got 2 and 5"):
        enumeration.kl(np.log([0.5, 0.5]), np.log(REF))
    with pytest.raises(ValueError, match="got 2 and 5"):
        enumeration.win_rate(np.log([0.5, 0.5]), np.log(REF), TIED)
    with pytest.raises(ValueError, match="got shape"):
        enumeration.kl(np.log(REF)[None], np.log(REF)[None])
    with pytest.raises(ValueError, match="got n=0"):
        enumeration.log_bon(np.log(REF), TIED, 0)
