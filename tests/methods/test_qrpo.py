"""QRPO's examples: stored samples with the log-ratio that their quantiles ask of them."""

import jax
import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.methods import qrpo
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline


def choose(rewards, seed=0, beta=0.25, order=None, **settings):
    member = Member(3.0, beta, seed, np.shape(rewards)[1])
    return qrpo.choose(np.asarray(rewards, np.float32), member, Offline(**settings), order)


def test_every_sample_comes_once_before_any_comes_twice(rng):
    rewards = rng.normal(size=(7, 5))
    once, more = choose(rewards, pairs=5), choose(rewards, pairs=12)
    np.testing.assert_array_equal(np.sort(once.best_E), np.arange(35))
    assert (once.best_E != np.arange(35)).any()
    np.testing.assert_array_equal(once.best_E, once.worst_E)
    counts = np.bincount(more.best_E, minlength=35).reshape(7, 5)
    assert (counts.sum(1) == 12).all() and set(counts.ravel()) == {2, 3}
    assert len({tuple(x - 5 * p) for p, x in enumerate(once.best_E.reshape(7, 5))}) > 3
    few = choose(rewards, pairs=2).best_E.reshape(7, 2)
    assert all(a != b and a // 5 == b // 5 == p for p, (a, b) in enumerate(few))
    assert once.best_E.dtype == np.int32 and once.target_E.dtype == np.float32


def test_targets_by_hand():
    """n = 1 + 1 / beta = 2, ((F + g)^2 - F^2) / g of a pool of four, two of them tied."""
    chosen = choose([[3.0, 1.0, 3.0, 2.0]], beta=1.0, pairs=4)
    at = np.argsort(chosen.best_E)
    np.testing.assert_allclose(np.exp(chosen.target_E[at]), [1.5, 0.25, 1.5, 0.75], rtol=1e-6)
    ordered = choose([[3.0, 1.0, 3.0, 2.0]], beta=1.0, pairs=4, order=np.array([[1, 0, 2, 3]]))
    at = np.argsort(ordered.best_E)
    np.testing.assert_allclose(np.exp(ordered.target_E[at]), [1.25, 0.25, 1.75, 0.75], rtol=1e-6)
    # e^q from 0 to 1/4, ..., over the mean of e^q, which is e - 1.
    identity = choose([[3.0, 1.0, 3.0, 2.0]], beta=1.0, pairs=4, transform="identity")
    at = np.argsort(identity.best_E)
    e = np.exp
    want = np.array([(e(1) - e(0.5)) / 2, e(0.25) - 1, (e(1) - e(0.5)) / 2, e(0.5) - e(0.25)])
    np.testing.assert_allclose(e(identity.target_E[at]), 4 * want / (e(1) - 1), rtol=1e-6)


@pytest.mark.parametrize("transform", ["log", "identity"])
@pytest.mark.parametrize("m", [1, 3, 50])
def test_the_ratios_of_a_pool_have_mean_one_for_any_number_of_samples_and_ties(rng, m, transform):
    rewards = np.concatenate([rng.normal(size=(4, m)), rng.integers(0, 3, size=(4, m))])
    chosen = choose(rewards, pairs=m, beta=1 / 7, transform=transform)
    ratio = np.exp(chosen.target_E.astype(np.float64)).reshape(8, m)
    np.testing.assert_allclose(ratio.mean(1), 1, rtol=1e-5)
    assert np.isfinite(chosen.target_E).all()


def test_only_ranks_matter_and_the_seed_decides_the_order(rng):
    rewards = rng.normal(size=(5, 8)).astype(np.float32)
    one, same = choose(rewards, seed=1), choose(np.exp(rewards), seed=1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.best_E != choose(rewards, seed=2).best_E).any()


def test_no_example_is_refused():
    with pytest.raises(InputError, match="pairs = 0 a prompt"):
        choose(np.zeros((2, 8)), pairs=0)
