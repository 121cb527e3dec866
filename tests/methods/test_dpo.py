"""DPO's pairs: other ones each time, of the first responses, with their labels."""

import jax
import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.methods import dpo
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline


def choose(rewards, seed=0, **settings):
    member = Member(3.0, 0.1, seed, np.shape(rewards)[1])
    return dpo.choose(np.asarray(rewards, np.float32), member, Offline(**settings))


def test_dpo_pairs_are_different_pairs_of_the_first_responses(rng):
    rewards = rng.normal(size=(50, 9)).astype(np.float32)
    rewards[:, 2] = rewards[:, 4]
    hard, soft = choose(rewards), choose(rewards, labels="soft")
    assert hard.best_E.shape == (50 * 12,)
    assert hard.best_E.dtype == hard.worst_E.dtype == np.int32
    assert hard.target_E.dtype == np.float32
    prompt = np.repeat(np.arange(50), 12)
    pairs = set()
    for p, best, worst in zip(prompt, hard.best_E - 9 * prompt, hard.worst_E - 9 * prompt):
        assert 0 <= best < 6 and 0 <= worst < 6 and best != worst
        pairs.add((int(p), *sorted((int(best), int(worst)))))
    assert len(pairs) == 50 * 12
    counts = np.bincount([6 * a + b for _, a, b in pairs], minlength=36)
    assert (counts[[6 * a + b for a in range(6) for b in range(a + 1, 6)]] > 25).all()  # 40 +- 3

    lead = rewards.ravel()[hard.best_E] - rewards.ravel()[hard.worst_E]
    assert (lead >= 0).all() and 20 < (lead == 0).sum() <= 50
    np.testing.assert_array_equal(hard.target_E, np.where(lead == 0, 0.5, 1.0))
    np.testing.assert_array_equal(soft.best_E, hard.best_E)
    np.testing.assert_allclose(soft.target_E, 1 / (1 + np.exp(-lead)), rtol=1e-5)


def test_pairs_are_a_function_of_the_seed(rng):
    rewards = rng.normal(size=(5, 8))
    one, same, other = (choose(rewards, seed=s) for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.best_E != other.best_E).any()
    assert one.best_E.shape == (60,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "firm"}, "labels = 'firm' must be one of hard, soft"),
        ({"pairs": 16}, "pairs = 16 a prompt, but 6 responses make only 15"),
        ({"responses": 9}, "responses = 9 must be between 2 and the m = 8"),
        ({"responses": 1}, "responses = 1 must be between 2"),
        ({"pairs": 0}, "pairs = 0 a prompt"),
    ],
)
def test_impossible_pairs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        choose(np.zeros((2, 8)), **change)
