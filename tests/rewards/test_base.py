"""Texts of a padded batch, and the statistics of a reward: by metric name, and in words."""

import jax.numpy as jnp
import numpy as np

from vbon_jax.data.prompts import Prompt
from vbon_jax.rewards import base

TOKENS = np.array([[0, 5, 9, 0], [9, 7, 9, 9], [9, 0, 0, 0], [1, 1, 1, 1]])
MASK = np.array([[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)


def test_texts_are_of_real_tokens_without_eos():
    asked = []

    def decode(prompts, rows):
        asked.append(rows)
        return [f"{row} after {prompt}" for prompt, row in zip(prompts, rows, strict=True)]

    prompts = [Prompt(i, "x", (20 + i,)) for i in range(3)]
    found = base.texts_of(prompts, jnp.array(TOKENS), jnp.array(MASK), (9, 8), decode)
    assert found == ["[5] after (20,)", "[7] after (21,)", "[] after (22,)"]
    found = base.texts_of(prompts[:2], TOKENS, MASK, (), decode)
    assert found == ["[5, 9] after (20,)", "[9, 7, 9] after (21,)"]
    assert type(asked[0][0][0]) is int


class Counting:
    def __init__(self, counts):
        self.counts = counts

    def take_counts(self):
        counts, self.counts = self.counts, {}
        return counts


def counts():
    return {
        "responses": 40.0, "reward_truncated": 0.125, "reward_truncated/reward": 0.5,
        "missing_eos": 0.25, "reward/reward": 1.5,
    }  # fmt: skip


def test_counts_are_named_after_the_role_and_gone_once_taken():
    reward = Counting(counts())
    assert base.counts_of(reward) == {k: v for k, v in counts().items() if k != "responses"}
    assert base.counts_of(reward) == {}
    assert base.counts_of(Counting(counts()), "evaluator") == {
        "evaluator_truncated": 0.125, "evaluator_truncated/reward": 0.5,
        "evaluator_missing_eos": 0.25, "evaluator/reward": 1.5,
    }  # fmt: skip
    assert base.counts_of(lambda *rows: None) == base.counts_of(None) == {}


def test_shares_and_means_in_words():
    assert base.counts_line(base.counts_of(Counting(counts()))) == (
        "reward_truncated 12.5%, reward_truncated/reward 50.0%, missing_eos 25.0%, "
        "reward/reward 1.500"
    )
    assert base.counts_line({}) == ""
