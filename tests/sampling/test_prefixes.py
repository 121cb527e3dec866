"""Rewards of prefixes, and of prefixes with each of the likeliest next tokens."""

import jax
import numpy as np
import pytest

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import log_probs
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling import prefixes
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.requests import pad_left, requests_for
from vbon_jax.sampling.responses import Sampling


class Vocabulary:
    """As much of a tokenizer as a sampler asks for."""

    def batch_decode(self, rows, skip_special_tokens):
        assert not skip_special_tokens
        return ["".join(f"{token} " for token in row) for row in rows]

    def decode(self, row, skip_special_tokens):
        return self.batch_decode([row], skip_special_tokens)[0]


@pytest.fixture(scope="module")
def drawing(params, config, mesh):
    model = LanguageModel(config, params, Vocabulary())
    settings = Sampling(temperature=0.7, max_new_tokens=6, end_ids=(3,), pad_id=0, likeliest=4)
    return engine.Sampler(model, mesh, settings)


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(10 + i, f"p{i}", (5 + i, 9)) for i in range(3)]


def test_a_prefix_has_the_reward_of_a_response_that_ends_there(drawing, prompts):
    requests = requests_for(prompts, 1)
    batch = drawing.draw(jax.random.key(2), 0, requests)

    def ids(of, prompt, prompt_mask, tokens, mask):
        return np.where(mask, tokens, 0) @ 10.0 ** np.arange(6) / 100

    rows = (batch.prompts, batch.rollout.tokens_BxT, batch.rollout.mask_BxT)
    found = prefixes.rewards(drawing, ids, prompts, *rows)
    tokens = np.where(batch.rollout.mask_BxT, batch.rollout.tokens_BxT, 0)
    for t in range(6):
        wanted = tokens[:, :t] @ 10.0 ** np.arange(t) / 100
        np.testing.assert_allclose(found[:, t], wanted, rtol=1e-6)


def test_of_a_long_response_every_other_prefix_is_scored(drawing, prompts, monkeypatch):
    monkeypatch.setattr(prefixes, "PREFIXES", 3)
    seen = []

    def count(of, prompt, prompt_mask, tokens, mask):
        seen.append(np.asarray(mask).sum(axis=1).max())
        return np.asarray(mask).sum(axis=1)

    tokens, mask = np.ones((3, 6), np.int32), np.ones((3, 6), bool)
    rows = pad_left([p.tokens for p in prompts], 8, 0)
    found = prefixes.rewards(drawing, count, prompts, rows, tokens, mask)
    np.testing.assert_array_equal(found, [[0, 0, 2, 2, 4, 4]] * 3)
    assert seen == [0, 2, 4]


def test_a_reward_that_knows_all_prefixes_is_asked_once(drawing, prompts):
    calls = []

    class AtOnce:
        def __call__(self, *rows):
            raise AssertionError("each prefix by itself")

        def of_prefixes(self, of, prompt, prompt_mask, tokens, mask):
            calls.append(len(of))
            return np.cumsum(tokens, axis=1, dtype=np.float32)

    tokens, mask = np.arange(24).reshape(4, 6).astype(np.int32), np.ones((4, 6), bool)
    rows = pad_left([p.tokens for p in [*prompts, prompts[0]]], 8, 0)
    found = prefixes.rewards(drawing, AtOnce(), prompts, rows, tokens, mask)
    np.testing.assert_array_equal(found, np.cumsum(tokens[:3], axis=1))  # the last only fills up
    assert calls == [3]


def test_a_prefix_whose_reward_is_not_finite_is_named(drawing, prompts):
    def reward(of, prompt, prompt_mask, tokens, mask):
        return np.where(np.asarray(mask).sum(axis=1) == 2, np.inf, 0.0)

    tokens, mask = np.full((3, 6), 7, np.int32), np.ones((3, 6), bool)
    rows = pad_left([p.tokens for p in prompts], 8, 0)
    with pytest.raises(InputError, match=r"reward of a prefix is inf for prompt='p0' .*'7 7 '"):
        prefixes.rewards(drawing, reward, prompts, rows, tokens, mask)


def test_the_likeliest_tokens_are_those_of_a_full_forward(drawing, config, prompts):
    requests = requests_for(prompts, 8)
    batch = drawing.draw(jax.random.key(2), 0, requests)
    tokens, mask = (np.concatenate(x, axis=1) for x in zip(batch.prompts, batch.rollout[:2]))
    found, T = batch.rollout.likeliest, 6
    inside = np.asarray(batch.rollout.mask_BxT)
    for k in range(4):  # the log-prob of each candidate in place of the token drawn
        for t in range(T):
            other = tokens.copy()
            other[:, -T + t] = found.ids_BxTxK[:, t, k]
            full = log_probs.log_probs(drawing.model.params, config, other, mask, T, 0.7)
            here = inside[:, t]
            np.testing.assert_allclose(full[here, t], found.log_probs_BxTxK[here, t, k], atol=2e-5)
    assert np.all(np.diff(found.log_probs_BxTxK, axis=-1) <= 0)
    drawn = np.asarray(batch.rollout.log_probs_BxT)[..., None]
    is_drawn = (
        np.asarray(found.ids_BxTxK == batch.rollout.tokens_BxT[..., None]) & inside[..., None]
    )
    # No token outside them is likelier than the last, and one that is drawn has its own log-prob.
    np.testing.assert_allclose(
        np.where(is_drawn, found.log_probs_BxTxK, 0), np.where(is_drawn, drawn, 0), atol=1e-6
    )
    outside = inside & ~is_drawn.any(axis=-1)
    assert outside.any() and np.all((drawn <= found.log_probs_BxTxK)[outside])
    np.testing.assert_array_equal(found.end_BxTxK, found.ids_BxTxK == 3)
    plain = drawing.at(likeliest=0).draw(jax.random.key(2), 0, requests).rollout
    assert plain.likeliest is None
    for a, b in zip(plain[:4], batch.rollout[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reward_that_knows_all_candidates_is_asked_once(drawing, prompts):
    class AtOnce:
        bad = None

        def __call__(self, *rows):
            raise AssertionError("each candidate by itself")

        def of_candidates(self, of, prompt, prompt_mask, tokens, mask, ids):
            assert len(of) == 3 and ids.shape == (*tokens.shape, 4)
            found = np.asarray(ids, np.float32)
            return found if self.bad is None else np.where(found == self.bad, np.nan, found)

    batch, reward = drawing.draw(jax.random.key(2), 0, requests_for(prompts, 1)), AtOnce()
    found = prefixes.of_candidates(drawing, reward, prompts, batch.prompts, batch.rollout)
    ids = np.asarray(batch.rollout.likeliest.ids_BxTxK)
    np.testing.assert_array_equal(found, ids)
    reward.bad = ids[1, 0, 2]
    with pytest.raises(InputError, match=rf"prefix is NaN for prompt='p\d' .*'{reward.bad} '"):
        prefixes.of_candidates(drawing, reward, prompts, batch.prompts, batch.rollout)


def test_a_candidate_has_the_reward_of_the_prefix_and_itself(drawing, prompts):
    batch = drawing.draw(jax.random.key(2), 0, requests_for(prompts, 1))
    seen = []

    def number(of, prompt, prompt_mask, tokens, mask):
        """The prompt's last digit, then what is seen of the response, one place a token."""
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        seen.append([p.id for p in of])
        first = np.asarray(prompt)[:, -2] * 100.0**-1
        return first + np.where(mask, tokens, 0) @ 100.0 ** np.arange(6) / 1e3

    found = prefixes.of_candidates(drawing, number, prompts, batch.prompts, batch.rollout)
    tokens = np.where(batch.rollout.mask_BxT, batch.rollout.tokens_BxT, 0)
    ids = np.asarray(batch.rollout.likeliest.ids_BxTxK)
    assert found.shape == (3, 6, 4) and found.dtype == np.float32
    for b, t, k in np.ndindex(found.shape):
        if batch.rollout.mask_BxT[b, t]:
            row = [*tokens[b, :t], ids[b, t, k]]
            wanted = prompts[b].tokens[0] / 100 + row @ 100.0 ** np.arange(t + 1) / 1e3
            np.testing.assert_allclose(found[b, t, k], wanted, rtol=1e-6)
    assert seen == [[10] * 4 + [11] * 4 + [12] * 4] * 6


def test_a_candidate_whose_reward_is_not_finite_is_named(drawing, prompts):
    batch = drawing.draw(jax.random.key(2), 0, requests_for(prompts, 1))
    first = batch.rollout.likeliest.ids_BxTxK[1, 0, 2]

    def reward(of, prompt, prompt_mask, tokens, mask):
        once = np.asarray(mask).sum(axis=1) == 1
        mine = np.array([p.id == 11 for p in of]) & (np.asarray(tokens)[:, 0] == int(first))
        return np.where(once & mine, np.nan, 0.0)

    with pytest.raises(InputError, match=rf"a prefix is NaN for prompt='p1' response='{first} '"):
        prefixes.of_candidates(drawing, reward, prompts, batch.prompts, batch.rollout)
