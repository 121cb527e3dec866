"""BoN-SFT's examples: the winners of best-of-n among the stored samples."""

import jax
import numpy as np
import pytest

from vbon_jax.bon import pool
from vbon_jax.errors import InputError
from vbon_jax.methods import bon_sft
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline


def choose(rewards, n=3, pairs=12, seed=0):
    member = Member(n, 0.1, seed, np.shape(rewards)[1])
    return bon_sft.choose(np.asarray(rewards, np.float32), member, Offline(pairs=pairs))


def test_bon_sft_takes_winners(rng):
    rewards = rng.normal(size=(40, 8))
    all_of_them = choose(rewards, n=8, pairs=2)
    np.testing.assert_array_equal(
        all_of_them.best_E, np.repeat(8 * np.arange(40) + rewards.argmax(1), 2)
    )
    np.testing.assert_array_equal(all_of_them.worst_E, all_of_them.best_E)
    # The best of 2 of 8 has rank i with probability (i-1)/28 (ranks 1..8): mean 6, variance 3.
    ranks = rewards.argsort(1).argsort(1).ravel()[choose(rewards, n=2, pairs=50).best_E]
    np.testing.assert_allclose(ranks.mean() + 1, 6, atol=5 * np.sqrt(3 / 2000))


def test_winners_are_a_function_of_the_seed(rng):
    rewards = rng.normal(size=(5, 8))
    one, same, other = (choose(rewards, seed=s) for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.best_E != other.best_E).any()
    assert one.best_E.shape == (60,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 9}, "n = 9 must be a whole number from 1 to the m = 8"),
        ({"n": 1.5}, r"n = 1\.5 must be a whole number"),
        ({"pairs": 0}, "pairs = 0 a prompt"),
    ],
)
def test_impossible_winners_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        choose(np.zeros((2, 8)), **change)


def test_each_comes_in_proportion_to_its_weight(rng):
    rewards = rng.normal(size=(6, 8)).astype(np.float32)
    counts = np.bincount(choose(rewards, n=3, pairs=40).best_E, minlength=48).reshape(6, 8)
    shares = 40 * pool.winner_weights(rewards, 3)
    assert (np.abs(counts - shares) < 1).all() and (counts.sum(axis=1) == 40).all()


def test_a_member_learns_from_its_own_samples_alone(rng):
    """Of the study of m: the first m, in rows of the whole pool."""
    rewards = rng.normal(size=(6, 8)).astype(np.float32)
    member = Member(3, 0.1, 0, 5)
    found = bon_sft.choose(rewards, member, Offline(pairs=30)).best_E.reshape(6, 30)
    assert (found - 8 * np.arange(6)[:, None] < 5).all()
    alone = bon_sft.choose(rewards[:, :5], member, Offline(pairs=30)).best_E.reshape(6, 30)
    np.testing.assert_array_equal(
        found - 8 * np.arange(6)[:, None], alone - 5 * np.arange(6)[:, None]
    )
    order = rng.permuted(np.tile(np.arange(8), (6, 1)), axis=1)
    weights = bon_sft.weights(np.zeros((6, 8)), member, order)
    np.testing.assert_array_equal(weights[:, 5:], 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights.argmax(axis=1), order[:, :5].argmax(axis=1))
