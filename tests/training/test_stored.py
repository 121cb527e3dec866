"""Stored samples as rows beside a rollout's."""

import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import stored

P, M, PROMPT, T = 4, 6, 2, 3


@pytest.fixture
def samples():
    """Tokens that say which sample they are of: 100 p + m, and the slot."""
    of = 100 * np.arange(P)[:, None] + np.arange(M)
    tokens = 10 * of[..., None] + np.arange(PROMPT + T)
    mask = np.ones(tokens.shape, bool)
    mask[1, 2, -1] = False
    return stored.Stored(tokens.astype(np.int32), mask, mask[..., PROMPT:], of / 7, 0.9)


def test_each_prompt_has_other_samples_of_its_own(samples):
    rows = np.array([3, 1, 1])
    found = samples.beside(rows, 4, M, seed=5, step=2)
    np.testing.assert_array_equal(found.row_B, np.repeat(rows, 4))
    of = found.rollout.tokens_BxT[:, 0] // 10
    np.testing.assert_array_equal(of // 100, found.row_B)
    for group in of.reshape(3, 4):
        assert len(set(group)) == 4  # none twice
    np.testing.assert_allclose(found.reward_B, of / 7)
    np.testing.assert_array_equal(found.prompt_BxP, 10 * of[:, None] + np.arange(PROMPT))
    np.testing.assert_array_equal(found.rollout.mask_BxT[:, -1], of != 102)
    assert found.temperature == 0.9 and found.prefix_reward_BxT is None


def test_the_draw_follows_from_seed_and_step(samples):
    def drawn(**changes):
        given = {"m": M, "seed": 5, "step": 2} | changes
        return samples.beside(np.arange(P), 3, **given).reward_B.tolist()

    assert drawn() == drawn()
    assert drawn() != drawn(step=3) and drawn() != drawn(seed=6)
    few = np.array(drawn(m=3)).reshape(P, 3) * 7 % 100
    np.testing.assert_allclose(np.sort(few, axis=1), [[0, 1, 2]] * P, atol=1e-9)  # all of them


def test_over_many_steps_each_sample_comes_equally_often(samples):
    counts = np.zeros(M)
    for step in range(600):
        found = samples.beside(np.array([2]), 2, M, seed=0, step=step)
        counts[np.round(found.reward_B * 7).astype(int) - 200] += 1
    assert np.max(np.abs(counts - 200)) < 5 * np.sqrt(200 * 2 / 3)


def test_joined_rows_are_the_rollouts_and_then_the_stored(samples):
    beside = samples.beside(np.array([0, 2]), 1, M, seed=0, step=0)
    own = Rollout(jnp.full((2, T), 7), jnp.ones((2, T), bool), jnp.ones((2, T)), jnp.ones(2, bool))
    prompts = jnp.full((2, PROMPT), 5)
    batch = ScoredRollout(
        prompts, prompts > 0, own, jnp.array([1.0, 2.0]), jnp.array([0, 2]), 0.9, stored=beside
    )
    found = stored.joined(batch)
    assert found.stored is None and found.reward_B.shape == (4,)
    np.testing.assert_array_equal(found.rollout.tokens_BxT[:2], 7)
    np.testing.assert_array_equal(found.rollout.tokens_BxT[2:], beside.rollout.tokens_BxT)
    np.testing.assert_array_equal(found.row_B, [0, 2, 0, 2])
    assert stored.joined(found) is found
