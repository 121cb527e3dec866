"""Weights of stored samples: against sums over a small world."""

import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.rl import replay


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_weighted_rows_have_the_policys_expectation(rng, share):
    policy, reference, bon = rng.dirichlet(np.ones(20), size=3)
    values = rng.normal(size=20)
    rows = share * reference + (1 - share) * policy  # what a row is drawn from
    ratio = jnp.array(np.log(policy / reference))
    weight = replay.balance(ratio, share)
    np.testing.assert_allclose(rows @ (weight * values), policy @ values, rtol=1e-5)
    assert np.max(weight) <= 1 / (1 - share) + 1e-6
    forward = replay.forward(jnp.array(np.log(bon / reference)), ratio, share)
    np.testing.assert_allclose(rows @ (forward * values), (bon - policy) @ values, atol=1e-6)


def test_where_the_policy_is_best_of_n_the_forward_kl_moves_no_row(rng):
    ratio = jnp.array(rng.normal(size=9))
    np.testing.assert_allclose(replay.forward(ratio, ratio, 0.5), 0.0, atol=1e-6)


def test_a_response_that_the_policy_has_given_up_counts_within_its_bound():
    gone = jnp.array([-200.0, 0.0, 200.0])
    np.testing.assert_allclose(replay.balance(gone, 0.5), [0.0, 1.0, 2.0], atol=1e-6)
    forward = replay.forward(jnp.float32(np.log(8)), gone, 0.5)
    np.testing.assert_allclose(forward, [16.0, 7.0, -2.0], atol=1e-5)


def test_rows_that_are_all_the_references_count_by_the_ratio(rng):
    policy, reference = rng.dirichlet(np.ones(20), size=2)
    ratio = jnp.array(np.log(policy / reference))
    np.testing.assert_allclose(replay.balance(ratio, 1.0), policy / reference, rtol=1e-5)
    forward = replay.forward(jnp.zeros(20), ratio, 1.0)
    np.testing.assert_allclose(forward, 1 - policy / reference, rtol=1e-4, atol=1e-5)
