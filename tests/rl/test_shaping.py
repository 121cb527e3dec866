"""One reward a response becomes one reward a token."""

import jax
import numpy as np
import pytest

from vbon_jax.rl.kl import k1
from vbon_jax.rl.shaping import token_rewards

LOG_POLICY = np.float32([[-1, -2, -3], [-1, -1, -1], [-2, -4, -1], [-1, -1, -1]])
LOG_REF = np.float32([[-2, -2, -1], [-3, -2, -5], [-1, -1, -1], [-9, -9, -9]])
MASK = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]], bool)
REWARD = np.float32([10, 20, 30, 40])


def test_golden_under_jit():
    want = [[-0.5, 10, 0], [0, -0.5, 18], [0.5, 1.5, 30], [0, 0, 0]]
    got = jax.jit(token_rewards)(REWARD, LOG_POLICY, LOG_REF, MASK, 0.5)
    np.testing.assert_allclose(got, want)
    assert got.dtype == np.float32


def test_golden_with_an_entropy_term():
    # -0.5 (log policy - log ref) - (-0.25) log policy, and the reward at the end.
    got = token_rewards(REWARD, LOG_POLICY, LOG_REF, MASK, 0.5, -0.25)
    np.testing.assert_allclose(
        got, [[-0.75, 9.5, 0], [0, -0.75, 17.75], [0, 0.5, 29.75], [0, 0, 0]]
    )


def test_rewards_of_a_response_add_up_to_its_share_of_the_objective():
    got = np.asarray(token_rewards(REWARD, LOG_POLICY, LOG_REF, MASK, 0.3, -0.7)).sum(1)
    entropy = -np.where(MASK, LOG_POLICY, 0).sum(1)
    want = np.where(MASK.any(1), REWARD, 0) - 0.3 * k1(LOG_POLICY, LOG_REF, MASK) - 0.7 * entropy
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_padding_does_not_matter(junk):
    want = token_rewards(REWARD, LOG_POLICY, LOG_REF, MASK, 0.5, -0.25)
    reward = np.where(MASK.any(1), REWARD, junk)
    log_policy, log_ref = np.where(MASK, LOG_POLICY, junk), np.where(MASK, LOG_REF, junk)
    got = token_rewards(reward, log_policy, log_ref, MASK.astype(np.int32), 0.5, -0.25)
    np.testing.assert_array_equal(got, want)


def test_a_nan_reward_is_not_hidden():
    reward = np.where(np.arange(4) == 2, np.nan, REWARD)
    got = np.asarray(token_rewards(reward, LOG_POLICY, LOG_REF, MASK, 0.5))
    np.testing.assert_array_equal(np.argwhere(np.isnan(got)), [[2, 2]])


def test_no_gradient_flows_through_the_rewards():
    def total(log_policy):
        return token_rewards(REWARD, log_policy, LOG_REF, MASK, 0.5).sum()

    assert not np.asarray(jax.grad(total)(LOG_POLICY)).any()
