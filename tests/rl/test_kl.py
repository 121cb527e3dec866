"""Estimators of KL(policy || ref): by hand, unbiased by enumeration, and safe at padding."""

import itertools

import jax
import numpy as np
import pytest

from vbon_jax.rl.kl import full_kl, k1, k3, sequence_sum

MASK = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
LOG_POLICY = np.log(np.float32([[0.5, 0.5, 0.1], [0.9, 0.25, 0.5], [0.5, 0.5, 0.5]]))
LOG_REF = np.log(np.float32([[0.25, 0.5, 0.9], [0.1, 0.5, 0.25], [0.1, 0.1, 0.1]]))


def test_golden_under_jit():
    # Ratios policy / ref at real tokens: 2, 1 | 1/2, 2.
    np.testing.assert_allclose(jax.jit(k1)(LOG_POLICY, LOG_REF, MASK), [np.log(2), 0, 0], atol=1e-6)
    want = [0.5 - 1 + np.log(2), (2 - 1 - np.log(2)) + (0.5 - 1 + np.log(2)), 0]
    np.testing.assert_allclose(jax.jit(k3)(LOG_POLICY, LOG_REF, MASK), want, atol=1e-6)


def test_full_kl_golden():
    policy = np.log(np.float32([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]]))
    ref = np.log(np.float32([[[0.25, 0.75], [0.25, 0.75], [0.1, 0.9]]]))
    got = jax.jit(full_kl)(policy, ref, np.array([[1, 1, 0]]))
    np.testing.assert_allclose(got, [[0.5 * np.log(4 / 3), 0, 0]], atol=1e-6)
    np.testing.assert_allclose(sequence_sum(got, np.array([[0, 1, 1]])), [0], atol=1e-6)


def test_full_kl_where_probabilities_are_zero():
    half, one = np.log([0.5, 0.5]), np.array([0.0, -np.inf])
    policy, ref = np.float32([[one, half, one]]), np.float32([[half, one, one]])
    got = full_kl(policy, ref, np.ones((1, 3)))
    np.testing.assert_allclose(got, [[np.log(2), np.inf, 0]], rtol=1e-6)
    got = full_kl(policy, ref, np.array([[1, 0, 1]]))
    np.testing.assert_allclose(got, [[np.log(2), 0, 0]], rtol=1e-6)
    gradient = jax.grad(lambda p: full_kl(p, ref, np.array([[1, 0, 1]])).sum())(policy)
    assert np.isfinite(gradient).all()


def two_step_models():
    """Log-probs of every string of length 2 over 3 symbols, and the conditionals behind them."""
    rng = np.random.default_rng(0)
    first = np.log(rng.dirichlet(np.ones(3), 2))
    second = np.log(rng.dirichlet(np.ones(3), (2, 3)))
    strings = np.array(list(itertools.product(range(3), repeat=2)))
    per_token = np.stack([first[:, strings[:, 0]], second[:, strings[:, 0], strings[:, 1]]], -1)
    full = np.stack([np.repeat(first[:, None], 9, 1), second[:, strings[:, 0]]], 2)
    return np.float32(per_token), np.float32(full)


def test_all_three_are_unbiased_for_the_kl_of_whole_responses():
    (log_policy, log_ref), (full_policy, full_ref) = two_step_models()
    chance = np.exp(np.float64(log_policy).sum(1))
    exact = np.sum(chance * np.float64(log_policy - log_ref).sum(1))
    mask = np.ones((9, 2))
    assert exact > 0.1
    for per_response in (
        k1(log_policy, log_ref, mask),
        k3(log_policy, log_ref, mask),
        sequence_sum(full_kl(full_policy, full_ref, mask), mask),
    ):
        np.testing.assert_allclose(np.sum(chance * per_response), exact, rtol=1e-5)
    assert (np.asarray(k3(log_policy, log_ref, mask)) >= 0).all()
    assert (np.asarray(k1(log_policy, log_ref, mask)) < 0).any()


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_padding_does_not_matter(junk):
    policy, ref = np.where(MASK, LOG_POLICY, junk), np.where(MASK, LOG_REF, junk)
    for estimator in (k1, k3):
        want = estimator(LOG_POLICY, LOG_REF, MASK)
        np.testing.assert_array_equal(estimator(policy, ref, MASK), want)
        gradient = jax.grad(lambda p, f=estimator: f(p, ref, MASK).sum())(policy)
        assert np.isfinite(gradient).all()
    _, full = two_step_models()
    mask = np.arange(9)[:, None] < np.array([5, 7])
    want = full_kl(*full, mask)
    dirty = np.where(mask[..., None], full, np.float32(junk))
    np.testing.assert_array_equal(full_kl(*dirty, mask), want)


def test_a_nan_inside_the_mask_is_not_hidden():
    policy = LOG_POLICY.copy()
    policy[0, 0] = np.nan
    assert np.isnan(k1(policy, LOG_REF, MASK)[0]) and np.isnan(k3(policy, LOG_REF, MASK)[0])
    full_policy, full_ref = two_step_models()[1]
    full_policy[4, 1, 2] = np.nan
    got = np.asarray(full_kl(full_policy, full_ref, np.ones((9, 2))))
    np.testing.assert_array_equal(np.argwhere(np.isnan(got)), [[4, 1]])
