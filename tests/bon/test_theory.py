"""KL bound, KL estimate and win rate of best-of-N."""

import jax
import mpmath
import numpy as np
import pytest

from vbon_jax.bon import enumeration, pool, theory
from vbon_jax.bon.distribution import log_bon_ratio

N = [1.0, 1.5, 2.0, 8.0, 100.0, 1000.0]
LOG_E = np.float32([-300, -104, -100, -90, -87, -40, -20, -10, -5, -2, -1, -0.5, -0.1, -1e-3, 0])


def test_kl_upper_bound_golden():
    # log 8 - 7/8 and log 2 - 1/2, by hand.
    np.testing.assert_allclose(
        theory.kl_upper_bound([1, 2, 8]), [0, 0.1931472, 1.2044415], rtol=1e-6
    )
    assert 0 <= theory.kl_upper_bound(1 + 1e-6) < 1e-11


def mp_kl_estimate(log_e, n):
    with mpmath.workdps(400):
        e, n = mpmath.exp(mpmath.mpf(float(log_e))), mpmath.mpf(n)
        miss = (1 - e) ** n
        spread = 0 if e == 1 else miss * (mpmath.log(n) + (n - 1) * mpmath.log(1 - e) - (n - 1) / n)
        return float(spread + (1 - miss) * mpmath.log((1 - miss) / e))


@pytest.mark.parametrize("n", N)
def test_kl_estimate_equals_mpmath_and_stays_within_its_bounds(n):
    got = np.asarray(theory.kl_estimate(LOG_E, n))
    np.testing.assert_allclose(got, [mp_kl_estimate(e, n) for e in LOG_E], atol=2e-6)
    bound = float(theory.kl_upper_bound(n))
    assert (got >= 0).all() and (got <= bound).all()
    assert got[-1] == 0  # a reference with one response only
    np.testing.assert_allclose(got[0], bound, rtol=1e-6)  # no response has mass


def test_kl_estimate_takes_a_traced_n_and_keeps_nan():
    got = jax.jit(theory.kl_estimate)(np.float32([-3, np.nan]), 8.0)
    np.testing.assert_allclose(got, [mp_kl_estimate(-3, 8), np.nan], rtol=1e-5)


def test_win_rate_golden():
    np.testing.assert_allclose(theory.win_rate([1, 2, 7]), [1 / 2, 2 / 3, 7 / 8], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(theory.win_rate)(3), 3 / 4)


@pytest.mark.parametrize("call", [theory.kl_upper_bound, theory.win_rate])
@pytest.mark.parametrize("bad", [0.5, np.nan])
def test_bad_n_is_refused(call, bad):
    with pytest.raises(ValueError, match=f"got n={bad}"):
        call(bad)
    with pytest.raises(ValueError, match=f"got n={bad}"):
        theory.kl_estimate(-1.0, bad)


@pytest.mark.parametrize("n", [2.0, 8.0])
def test_bounds_hold_on_an_enumerated_world_and_are_reached_without_large_masses(n):
    rng = np.random.default_rng(0)
    bound, rate = float(theory.kl_upper_bound(n)), float(theory.win_rate(n))
    for concentration in (0.05, 0.3, 2.0):
        log_ref_S = np.log(rng.dirichlet(np.full(40, concentration)) + 1e-30)
        for rewards_S in (rng.permutation(40), rng.integers(0, 4, 40)):
            log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
            assert 0 <= enumeration.kl(log_bon_S, log_ref_S) < bound
            assert 0.5 < enumeration.win_rate(log_bon_S, log_ref_S, rewards_S) <= rate + 1e-6
    log_ref_S, rewards_S = np.full(20_000, -np.log(20_000)), rng.permutation(20_000)
    log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
    np.testing.assert_allclose(enumeration.kl(log_bon_S, log_ref_S), bound, rtol=1e-3)
    np.testing.assert_allclose(
        enumeration.win_rate(log_bon_S, log_ref_S, rewards_S), rate, rtol=1e-6
    )


def test_the_estimate_is_near_the_exact_kl_where_the_bound_is_not():
    # One response of mass 0.9 that is the best, and 1000 small ones.
    ref_S = np.append(np.full(1000, 1e-4), 0.9)
    log_bon_S = enumeration.log_bon(np.log(ref_S), np.arange(1001), 8.0)
    exact = enumeration.kl(log_bon_S, np.log(ref_S))
    estimate = float(np.sum(np.exp(log_bon_S) * np.asarray(theory.kl_estimate(np.log(ref_S), 8.0))))
    assert exact < 0.11 < 1 < float(theory.kl_upper_bound(8.0))
    np.testing.assert_allclose(estimate, exact, atol=0.01)


@pytest.mark.parametrize("levels", [4, 40])
def test_direct_kl_of_pools_is_the_exact_kl_on_average(levels):
    # Weights from a pool without replacement estimate any expectation under best-of-n unbiasedly.
    rng, n = np.random.default_rng(levels), 8
    log_ref_S = np.log(rng.dirichlet(np.ones(40)))
    rewards_S = rng.permutation(40) * levels // 40
    log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
    ratio_S = log_bon_ratio(*enumeration.log_f_and_mass(log_ref_S, rewards_S), n)
    drawn_PxM = rng.choice(40, size=(4000, 30), p=np.exp(log_ref_S))
    weights_PxM = pool.winner_weights(rewards_S[drawn_PxM], n)
    got_P = pool.best_mean(np.asarray(ratio_S)[drawn_PxM], weights_PxM)
    exact = enumeration.kl(log_bon_S, log_ref_S)
    assert abs(got_P.mean() - exact) < 4 * got_P.std() / np.sqrt(4000) < 0.05
