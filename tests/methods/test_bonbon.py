"""BoNBoN's examples: best and worst of the same draws from the stored samples."""

import jax
import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.methods import bonbon
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline


def choose(rewards, n=3, pairs=12, seed=0):
    member = Member(n, 0.1, seed, np.shape(rewards)[1])
    return bonbon.choose(np.asarray(rewards, np.float32), member, Offline(pairs=pairs))


def test_bonbon_takes_best_and_worst_of_the_same_draws(rng):
    rewards = rng.normal(size=(40, 8))
    whole = choose(rewards, n=8, pairs=1)
    np.testing.assert_array_equal(whole.best_E - 8 * np.arange(40), rewards.argmax(1))
    np.testing.assert_array_equal(whole.worst_E - 8 * np.arange(40), rewards.argmin(1))
    some = choose(rewards, n=2, pairs=12)
    np.testing.assert_array_equal(some.best_E // 8, np.repeat(np.arange(40), 12))
    np.testing.assert_array_equal(some.worst_E // 8, np.repeat(np.arange(40), 12))
    assert (rewards.ravel()[some.best_E] > rewards.ravel()[some.worst_E]).all()
    assert (some.target_E == 1).all()


def test_pairs_are_a_function_of_the_seed(rng):
    rewards = rng.normal(size=(5, 8))
    one, same, other = (choose(rewards, seed=s) for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.best_E != other.best_E).any()
    assert one.best_E.shape == (60,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "n = 1 must be a whole number from 2 to the m = 8"),
        ({"pairs": 0}, "pairs = 0 a prompt"),
    ],
)
def test_impossible_pairs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        choose(np.zeros((2, 8)), **change)
