"""Advantages against hand-worked numbers and rlax; whitening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from vbon_jax.rl.gae import gae, whiten


def batch(seed, shape=(5, 7)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *shape)).astype(np.float32)


MASKS = {
    "full": np.ones((5, 7), bool),
    "right padded": np.arange(7) < np.array([[7], [1], [3], [0], [6]]),
    "left padded": np.arange(7) >= np.array([[0], [6], [3], [7], [1]]),
    "with holes": np.random.default_rng(9).random((5, 7)) < 0.5,
}


def test_golden_under_jit_and_vmap():
    # gamma = 0.5, lambda = 0.5; deltas 1 + 1 - 1 = 1, 0 + 2 - 2 = 0, 3 - 4 = -1.
    rewards, values = np.float32([[1, 0, 3, 9]]), np.float32([[1, 2, 4, 9]])
    mask = np.array([[1, 1, 1, 0]])
    advantages, returns = jax.jit(gae)(rewards, values, mask, 0.5, 0.5)
    np.testing.assert_allclose(advantages, [[1 - 1 / 16, -0.25, -1, 0]])
    np.testing.assert_allclose(returns, [[2 - 1 / 16, 1.75, 3, 0]])
    stacked = [np.stack([x, x]) for x in (rewards, values, mask)]
    mapped, _ = jax.vmap(lambda r, v, m: gae(r, v, m, 0.5, 0.5))(*stacked)
    np.testing.assert_allclose(mapped, [[[1 - 1 / 16, -0.25, -1, 0]]] * 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_equals_rlax_on_each_response_alone(mask, gamma, lam):
    rewards, values = batch(0)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(5):
        real = np.flatnonzero(mask[row])
        want = np.zeros(7, np.float32)
        if real.size:
            want[real] = rlax.truncated_generalized_advantage_estimation(
                jnp.asarray(rewards[row, real]),
                jnp.full(real.size, gamma, jnp.float32),
                lam,
                jnp.append(values[row, real], 0.0),
            )
        np.testing.assert_allclose(advantages[row], want, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, advantages + values, 0), atol=1e-6)


def test_lambda_of_one_gives_the_rewards_to_come_and_zero_one_step():
    (rewards, values), mask = batch(1), MASKS["right padded"]
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    kept = np.where(mask, rewards, 0)
    to_come = np.flip(np.cumsum(np.flip(kept, 1), 1), 1)
    np.testing.assert_allclose(returns, np.where(mask, to_come, 0), atol=1e-5)
    _, returns = gae(rewards, values, mask, 0.9, 0.0)
    following = np.append(np.where(mask, values, 0)[:, 1:], np.zeros((5, 1)), 1)
    np.testing.assert_allclose(returns, np.where(mask, rewards + 0.9 * following, 0), atol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_padding_and_the_order_of_rows_do_not_matter(junk):
    (rewards, values), mask = batch(2), MASKS["with holes"]
    want = gae(rewards, values, mask, 0.99, 0.95)
    padded = gae(np.where(mask, rewards, junk), np.where(mask, values, junk), mask, 0.99, 0.95)
    np.testing.assert_array_equal(padded, want)
    order = np.array([3, 0, 4, 1, 2])
    permuted = gae(rewards[order], values[order], mask[order], 0.99, 0.95)
    np.testing.assert_array_equal(permuted, np.asarray(want)[:, order])


def test_whiten_golden():
    # Of 1, 2, 3, 6: mean 3, biased variance 14 / 4.
    x, mask = np.float32([[1, 2, 50], [3, 6, np.nan]]), np.array([[1, 1, 0], [1, 1, 0]])
    want = np.array([[-2, -1, 0], [0, 3, 0]]) / np.sqrt(3.5)
    np.testing.assert_allclose(jax.jit(whiten)(x, mask), want, rtol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_whiten_has_no_mean_and_unit_variance_whatever_scale_and_padding(mask):
    x = batch(3)[0]
    got = np.asarray(whiten(x, mask))
    np.testing.assert_allclose(got[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(got[mask].var(), 1, rtol=1e-5)
    assert not got[~mask].any()
    np.testing.assert_array_equal(whiten(np.where(mask, x, np.inf), mask), got)
    np.testing.assert_allclose(whiten(100 * x + 7, mask), got, atol=1e-4)


def test_whiten_of_nothing_of_one_and_of_a_constant_is_zero():
    for mask in ([0, 0, 0], [0, 1, 0], [1, 1, 1]):
        assert not np.asarray(whiten(np.full(3, 2.5, np.float32), np.array(mask))).any()
