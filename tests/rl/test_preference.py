"""DPO and BoNBoN: numbers by hand, gradients, and where training on them ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

from vbon_jax.bon import enumeration, targets
from vbon_jax.rl import preference

SIZE = 20


def test_dpo_golden_under_jit():
    # z = 0.5 (1 - (-1)) = 1: log(1 + e^-1) = 0.31326169, log(1 + e) = 1.31326169.
    best, worst = jnp.float32([1, 1, -1]), jnp.float32([-1, -1, 1])
    got = jax.jit(preference.dpo_loss)(best, worst, 0.5, jnp.float32([1, 0.75, 1]))
    np.testing.assert_allclose(got, [0.31326169, 0.56326169, 1.31326169], rtol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("preferred", [0.0, 0.3, 1.0])
def test_dpo_of_equal_log_ratios_is_log_2(preferred):
    same = jnp.float32([-3, 0, 7])
    np.testing.assert_allclose(
        preference.dpo_loss(same, same, 0.1, preferred), np.full(3, np.log(2)), rtol=1e-6
    )


def test_dpo_of_swapped_labels_is_dpo_of_swapped_responses(rng):
    best, worst = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)
    p = jnp.asarray(rng.random(9), jnp.float32)
    np.testing.assert_allclose(
        preference.dpo_loss(best, worst, 0.7, p),
        preference.dpo_loss(worst, best, 0.7, 1 - p),
        rtol=1e-5,
    )


def test_dpo_far_away_is_linear_and_its_gradient_finite():
    def total(best):
        return preference.dpo_loss(best, jnp.float32([0.0, 0.0]), 10.0).sum()

    far = jnp.float32([400, -400])
    np.testing.assert_allclose(total(far), 4000)
    np.testing.assert_allclose(jax.grad(total)(far), [0, -10], atol=1e-6)


def test_dpo_gradient_is_that_of_a_logistic_regression():
    def total(best, beta):
        return preference.dpo_loss(best, jnp.float32([0.2]), beta, 0.8).sum()

    by_best, by_beta = jax.grad(total, (0, 1))(jnp.float32([1.7]), 0.4)
    error = 1 / (1 + np.exp(-0.4 * 1.5)) - 0.8
    np.testing.assert_allclose(by_best, [0.4 * error], rtol=1e-5)
    np.testing.assert_allclose(by_beta, 1.5 * error, rtol=1e-5)


def test_bonbon_beta_golden():
    assert preference.bonbon_beta(2) == 0.5
    assert preference.bonbon_beta(3) == pytest.approx(1 / 6)  # 1 / (2 * 2 * 1.5)
    assert preference.bonbon_beta(8) == pytest.approx(0.0275482094, abs=5e-11)


@pytest.mark.parametrize("n", [1, 0, 2.5, float("nan"), float("inf")])
def test_bonbon_beta_needs_a_best_and_a_worst(n):
    with pytest.raises(ValueError, match=f"whole number >= 2.*n={n}"):
        preference.bonbon_beta(n)


def test_bonbon_golden_under_jit():
    # n = 2: 1 / (2 beta_n) = 1. 0.25 * 10 + 0.75 (2 + 1 - 1)^2 = 5.5; 0.25 * 4 + 0.75 * 4 = 4.
    got = jax.jit(preference.bonbon_loss)(
        jnp.float32([-10, -4]), jnp.float32([2, 0]), jnp.float32([-1, 1]), 0.5, 0.25
    )
    np.testing.assert_allclose(got, [5.5, 4.0], rtol=1e-6)
    assert got.dtype == jnp.float32


def test_bonbon_gradients_by_hand():
    def total(log_policy, best, worst):
        return preference.bonbon_loss(log_policy, best, worst, 0.5, 0.25).sum()

    got = jax.grad(total, (0, 1, 2))(jnp.float32([-10]), jnp.float32([2]), jnp.float32([-1]))
    np.testing.assert_allclose(np.concatenate(got), [-0.25, 3.0, -3.0], rtol=1e-6)


def test_bonbon_alpha_makes_both_terms_alike_at_the_reference():
    assert preference.bonbon_alpha(4.0, 0.25) == pytest.approx(0.5)
    beta_n = preference.bonbon_beta(8)
    alpha = preference.bonbon_alpha(63.0, beta_n)
    zero = jnp.zeros(1)
    whole = preference.bonbon_loss(jnp.float32([-63.0]), zero, zero, beta_n, alpha)
    np.testing.assert_allclose(whole, 2 * alpha * 63.0, rtol=1e-5)
    for bad in ((0.0, 0.1), (-1.0, 0.1), (3.0, 0.0), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="must be > 0"):
            preference.bonbon_alpha(*bad)


@pytest.mark.parametrize("n", [2, 8])
def test_bonbon_asks_of_exact_best_of_n_its_mean_gap(n):
    """Under continuous best-of-n, h = log n + (n-1) log F; F(best) and F(worst) are the largest and
    the smallest of n uniforms."""
    mean = scipy.integrate.quad(
        lambda f: (n - 1) * np.log(f) * n * (f ** (n - 1) - (1 - f) ** (n - 1)), 0, 1
    )[0]
    assert mean == pytest.approx(1 / (2 * preference.bonbon_beta(n)), rel=1e-7)


@pytest.fixture(scope="module")
def world():
    """log pi_ref and injective rewards of a few strings."""
    rng = np.random.default_rng(5)
    log_ref_S = rng.normal(size=SIZE)
    return log_ref_S - np.logaddexp.reduce(log_ref_S), rng.normal(size=SIZE)


@partial(jax.jit, static_argnums=0)
def descend(expected_loss):
    """The log-probabilities of the table of logits that minimises the loss."""
    steps = 6000
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry, _):
        logits_S, state = carry
        grads_S = jax.grad(lambda x: expected_loss(jax.nn.log_softmax(x)))(logits_S)
        updates, state = optimizer.update(grads_S, state)
        return (optax.apply_updates(logits_S, updates), state), None

    start_S = jnp.zeros(SIZE)
    (logits_S, _), _ = jax.lax.scan(step, (start_S, optimizer.init(start_S)), length=steps)
    return jax.nn.log_softmax(logits_S)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_dpo_with_soft_labels_ends_at_the_tilted_reference(world, beta):
    log_ref_S, rewards_S = world
    weights_SxS = np.random.default_rng(1).random((SIZE, SIZE))  # whichever pairs are compared
    soft_SxS = jax.nn.sigmoid(rewards_S[:, None] - rewards_S)

    def expected_loss(log_p_S):
        ratio_S = log_p_S - log_ref_S
        best, worst = jnp.broadcast_arrays(ratio_S[:, None], ratio_S)
        losses = preference.dpo_loss(best.ravel(), worst.ravel(), beta, soft_SxS.ravel())
        return losses @ weights_SxS.ravel()

    got_S = descend(expected_loss)
    want_S = targets.tilted(log_ref_S, rewards_S, beta)
    assert enumeration.kl(want_S, log_ref_S) > 0.02
    np.testing.assert_allclose(got_S, want_S, atol=2e-3)


@pytest.mark.parametrize("n", [2, 8])
def test_likelihood_of_the_winners_ends_at_best_of_n(world, n):
    """BoNBoN at alpha = 1 is bon_sft."""
    log_ref_S, rewards_S = world
    want_S = enumeration.log_bon(log_ref_S, rewards_S, n)

    def expected_loss(log_p_S):
        ratio_S = log_p_S - log_ref_S
        return preference.bonbon_loss(log_p_S, ratio_S, ratio_S, 0.5, 1.0) @ np.exp(want_S)

    # The logits of strings that are all but ruled out move slowly.
    assert enumeration.kl(want_S, descend(expected_loss)) < 1e-4


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.3), (4, 0.9)])
def test_bonbon_ends_at_its_target(world, n, alpha):
    log_ref_S, rewards_S = world
    joint_SxS = targets.best_and_worst(log_ref_S, rewards_S, n)
    beta_n = preference.bonbon_beta(n)

    def expected_loss(log_p_S):
        ratio_S = log_p_S - log_ref_S
        best, worst, log_best = jnp.broadcast_arrays(ratio_S[:, None], ratio_S, log_p_S[:, None])
        losses = preference.bonbon_loss(
            log_best.ravel(), best.ravel(), worst.ravel(), beta_n, alpha
        )
        return losses @ joint_SxS.ravel()

    want_S = targets.bonbon(log_ref_S, rewards_S, n, alpha)
    assert enumeration.kl(want_S, enumeration.log_bon(log_ref_S, rewards_S, n)) > 1e-3
    assert enumeration.kl(want_S, descend(expected_loss)) < 1e-6
