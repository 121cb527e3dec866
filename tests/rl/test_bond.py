"""BOND: rewards by hand, and gradients against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.bon import enumeration
from vbon_jax.rl import bond

LOG_ANCHOR = np.log(np.float32([0.1, 0.25, 0.05, 0.4, 0.15, 0.05]))
REWARDS = np.float32([3, -1, 0.5, 0, 2, 5])
LOGITS = jnp.float32([0.3, -1, 0, 0.7, 1.2, -0.4])


def test_jbond_reward_by_hand():
    anchors = jnp.float32([[1, 2], [1, 2], [1, 2], [2, 2], [2, 3]])
    got = jax.jit(bond.jbond_reward)(jnp.float32([0.5, 1, 3, 2, 1]), anchors)
    np.testing.assert_allclose(got, [-np.log(16), 0, 0, 0, -np.log(16)], rtol=1e-6)
    four = jnp.float32([[1, 2, 3, 4]] * 3)
    got = bond.jbond_reward(jnp.float32([0, 2, 9]), four)
    np.testing.assert_allclose(got, np.log([1 / 5, 3 / 5, 1]), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="m >= 2 anchor samples a row, got m=1"):
        bond.jbond_reward(jnp.zeros(3), jnp.zeros((3, 1)))


def test_jbond_reward_is_right_on_average_at_the_median():
    grid = jnp.arange(100.0)
    pairs = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    got = bond.jbond_reward(jnp.full(len(pairs), 49.5), pairs).mean()
    np.testing.assert_allclose(got, np.log(0.5), rtol=1e-5)


def test_leave_one_out_by_hand():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2.
    np.testing.assert_allclose(bond.leave_one_out(jnp.float32([1, 2, 6])), [-3, -1.5, 4.5])
    by_prompt = bond.leave_one_out(jnp.float32([[1, 2, 6], [4, 4, 4]]))
    np.testing.assert_allclose(by_prompt, [[-3, -1.5, 4.5], [0, 0, 0]])
    with pytest.raises(ValueError, match="K >= 2 responses, got K=1"):
        bond.leave_one_out(jnp.ones((5, 1)))


def test_regularised_by_hand():
    got = bond.regularised(jnp.float32([1, -2]), jnp.float32([-3, -5]), jnp.float32([-4, -1]), 0.5)
    np.testing.assert_allclose(got, [0.5, 0.0])


def test_jbond_loss_by_hand():
    args = jnp.float32([-7]), jnp.float32([-4]), jnp.float32([1.5])
    # 0.25 * 7 + 0.75 * 1.5 * 4
    np.testing.assert_allclose(jax.jit(bond.jbond_loss)(*args, 0.25), [6.25])
    grads = jax.grad(lambda *a: bond.jbond_loss(*a, 0.25).sum(), (0, 1, 2))(*args)
    np.testing.assert_allclose(np.concatenate(grads), [-0.25, -0.75 * 1.5, 0])


@pytest.mark.parametrize("jeffreys", [0.0, 0.5, 1.0])
def test_the_expected_gradient_is_that_of_the_divergences(jeffreys):
    """Over all pairs of policy samples and all anchor winners, with a leave-one-out baseline."""
    below, mass = enumeration.log_f_and_mass(LOG_ANCHOR, REWARDS)
    reward = jnp.float32(np.logaddexp(below, mass))  # exact, in place of the two-sample estimate
    log_bon = enumeration.log_bon(LOG_ANCHOR, REWARDS, 2)
    kl_coef = 1.3

    def divergence(logits):
        log_p = jax.nn.log_softmax(logits)
        backward = jnp.exp(log_p) @ (kl_coef * (log_p - LOG_ANCHOR) - reward)
        return jeffreys * -(np.exp(log_bon) @ log_p) + (1 - jeffreys) * backward

    def expected_loss(logits):
        log_p = jax.nn.log_softmax(logits)
        pairs = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2)
        returns = bond.regularised(reward[pairs], log_p[pairs], LOG_ANCHOR[pairs], kl_coef)
        advantages = bond.leave_one_out(returns)
        log_winner = log_p @ np.exp(log_bon)
        losses = bond.jbond_loss(log_winner, log_p[pairs], advantages, jeffreys).mean(axis=1)
        return jax.lax.stop_gradient(jnp.exp(log_p[pairs].sum(axis=1))) @ losses

    want = jax.grad(divergence)(LOGITS)
    assert np.max(np.abs(want)) > 0.05
    np.testing.assert_allclose(jax.grad(expected_loss)(LOGITS), want, atol=1e-5)


def test_ema_by_hand():
    anchor = {"a": jnp.float32([1, 2]), "b": (jnp.float32(4),)}
    params = {"a": jnp.float32([3, 6]), "b": (jnp.float32(0),)}
    got = jax.jit(bond.ema)(anchor, params, 0.25)
    np.testing.assert_allclose(got["a"], [1.5, 3])
    np.testing.assert_allclose(got["b"][0], 3)
    jax.tree.map(np.testing.assert_array_equal, bond.ema(anchor, params, 0.0), anchor)
    jax.tree.map(np.testing.assert_array_equal, bond.ema(anchor, params, 1.0), params)
