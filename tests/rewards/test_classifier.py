import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.models import heads
from vbon_jax.rewards import classifier

LABELS = ("NEGATIVE", "POSITIVE")
EOS = 3


@pytest.fixture(scope="module")
def scorer(params, config):
    tree = {"decoder": params, "score": heads.init_score(config, 2, jax.random.key(5))}

    def make(kind="logit", label="POSITIVE"):
        return classifier.ClassifierReward(tree, config, LABELS, label, kind, EOS)

    return make


PROMPT = (jnp.array([[0, 5, 6], [7, 8, 9]]), jnp.array([[0, 1, 1], [1, 1, 1]], bool))
RESPONSE = (
    jnp.array([[10, 11, EOS, 0], [12, 13, 14, 15]]),
    jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool),
)


def test_kinds_agree_with_each_other(scorer):
    p = np.asarray(scorer("prob")(None, *PROMPT, *RESPONSE))
    odds = np.asarray(scorer("log_odds")(None, *PROMPT, *RESPONSE))
    both = [np.asarray(scorer("logit", name)(None, *PROMPT, *RESPONSE)) for name in LABELS]
    np.testing.assert_allclose(odds, both[1] - both[0], atol=1e-5)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-odds)), atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(scorer("log_odds", "NEGATIVE")(None, *PROMPT, *RESPONSE)), -odds, atol=1e-5
    )


def test_the_reward_is_of_the_text_without_eos_and_padding(scorer):
    with_eos = np.asarray(scorer()(None, *PROMPT, *RESPONSE))
    without = np.asarray(scorer()(None, *PROMPT, RESPONSE[0], RESPONSE[1].at[0, 2].set(False)))
    np.testing.assert_allclose(with_eos, without, atol=1e-6)
    # The same text as one right-padded row scores the same.
    tokens = jnp.array([[5, 6, 10, 11, 0, 0, 0], [7, 8, 9, 12, 13, 14, 15]])
    mask = jnp.array([[1, 1, 1, 1, 0, 0, 0], [1] * 7], bool)
    whole = np.asarray(scorer()(None, tokens[:, :3], mask[:, :3], tokens[:, 3:], mask[:, 3:]))
    np.testing.assert_allclose(with_eos, whole, atol=1e-5)


def test_an_empty_response_is_scored_at_its_prompt(scorer):
    mask = jnp.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    out = np.asarray(scorer()(None, *PROMPT, RESPONSE[0].at[0, 0].set(EOS), mask))
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize(
    ("labels", "label", "kind", "message"),
    [
        (LABELS, "GOOD", "logit", "reward.label='GOOD': the reward model knows NEGATIVE, POSITIVE"),
        (LABELS, "POSITIVE", "rank", "reward.score='rank': choose one of"),
        (("LABEL_0",), "LABEL_0", "prob", "needs two labels"),
    ],
)
def test_bad_settings_are_named(params, config, labels, label, kind, message):
    with pytest.raises(InputError, match=message):
        classifier.ClassifierReward({"decoder": params}, config, labels, label, kind, EOS)
