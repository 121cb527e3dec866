"""The fit of the head, in worlds whose F is known."""

import numpy as np
import pytest
from scipy.special import ndtr

from vbon_jax.bon.amortised import f0_and_mass
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.evaluation.calibration import of_prior
from vbon_jax.training import amortised
from vbon_jax.training.amortised import Features, Heads

WIDTH = 6


def world(count, m, known, seed=0):
    """(features, offsets, rewards ~ N(offset, 1)); the offset is in the features if ``known``."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(count, WIDTH)).astype(np.float32)
    offset = state[:, 0] - state[:, 1] if known else 1.4 * rng.normal(size=count)
    rewards = (offset[:, None] + rng.normal(size=(count, m))).astype(np.float32)
    words = rng.normal(size=(count, 2)).astype(np.float32)
    return Features(state, words, None), offset, rewards


def prompts(count):
    return [Prompt(i, f"prompt {i}", (i + 1, 2)) for i in range(count)]


def fitted(count=400, m=8, known=True):
    features, _, rewards = world(count, m, known)
    fold_P = amortised.folds(prompts(count), rewards, 0)
    return amortised.fit(features, rewards, fold_P, 0), features, fold_P, rewards


def calibrated(heads, features, fold_P, rewards):
    return of_prior(heads.prior(features, fold_P), rewards, 0)


@pytest.fixture(scope="module")
def knows():
    return fitted()


def test_f_of_a_prompt_never_seen_is_read_off_the_head(knows):
    heads, *_ = knows
    features, offset, rewards = world(300, 64, True, seed=1)
    f0, _ = f0_and_mass(heads.prior(features), np.arange(300), rewards)
    assert np.abs(np.asarray(f0) - ndtr(rewards - offset[:, None])).mean() < 0.05
    assert heads.concentration > 20


def test_a_head_that_knows_is_calibrated(knows):
    found = calibrated(*knows)
    assert found.holds, found.line(0.0)


def test_a_head_that_cannot_know_is_refused():
    heads, features, fold_P, rewards = fitted(known=False)
    found = calibrated(heads, features, fold_P, rewards)
    assert found.pooled_ks <= found.pooled_limit  # right on average
    with pytest.raises(InputError, match=r"set samples\.amortised=False"):
        found.refuse()
    assert heads.concentration < 5  # and worth next to nothing as evidence


def test_no_head_has_learned_from_its_own_prompts(knows):
    heads, features, fold_P, _ = knows
    assert sorted(set(fold_P.tolist())) == list(range(amortised.FOLDS))
    own = heads.prior(features, fold_P).cumulative_PxE
    mean = heads.prior(features).cumulative_PxE
    assert np.abs(np.asarray(own) - np.asarray(mean)).max() > 1e-3
    other = heads.prior(features, np.where(np.arange(len(fold_P)) == 3, -1, fold_P)).cumulative_PxE
    np.testing.assert_array_equal(other[3], mean[3])
    np.testing.assert_array_equal(np.delete(other, 3, 0), np.delete(own, 3, 0))


def test_folds_keep_equal_prompts_together_and_pass_over_those_without_samples():
    asked = [*prompts(20), *prompts(20), Prompt(99, "x", (99,))]
    rewards = [[0.0, 1.0]] * 40 + [[]]
    fold_P = amortised.folds(asked, rewards, 0)
    np.testing.assert_array_equal(fold_P[:20], fold_P[20:40])
    assert fold_P[-1] == -1 and set(fold_P[:-1].tolist()) == set(range(amortised.FOLDS))
    with pytest.raises(InputError, match="4 different prompts have samples"):
        amortised.folds(prompts(4), [[0.0, 1.0]] * 4, 0)


def test_heads_come_back_from_a_file(knows, tmp_path):
    heads, features, *_ = knows
    heads.save(tmp_path / "head.npz")
    found = Heads.load(tmp_path / "head.npz")
    for a, b in zip(found.prior(features), heads.prior(features), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reward_of_the_bare_prompt_is_used_by_its_rank():
    features, offset, rewards = world(300, 8, False)
    bare = np.exp(offset).astype(np.float32)
    fold_P = amortised.folds(prompts(300), rewards, 0)
    found = [
        amortised.fit(features._replace(bare_P=x), rewards, fold_P, 0) for x in (bare, bare**3)
    ]
    f0 = f0_and_mass(found[0].prior(features._replace(bare_P=bare)), np.arange(300), rewards)[0]
    assert np.abs(np.asarray(f0) - ndtr(rewards - offset[:, None])).mean() < 0.06
    np.testing.assert_array_equal(found[0].params["kernel"], found[1].params["kernel"])
