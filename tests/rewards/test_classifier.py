import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.models import encoder, heads
from vbon_jax.models.hf import Labels, config_files
from vbon_jax.rewards import classifier
from vbon_jax.rewards.classifier import Classifier, ClassifierReward

NAMES = ("NEGATIVE", "POSITIVE")
LABELS = Labels(NAMES)
ONE = Labels(("LABEL_0",))
EOS = 3


@pytest.fixture(scope="module")
def scorer(params, config):
    tree = {"decoder": params, "score": heads.init_score(config, 2, jax.random.key(5))}

    def make(kind="logit", label="POSITIVE"):
        return ClassifierReward(Classifier(tree, config, LABELS, label, kind), (EOS,))

    return make


PROMPT = (jnp.array([[0, 5, 6], [7, 8, 9]]), jnp.array([[0, 1, 1], [1, 1, 1]], bool))
RESPONSE = (
    jnp.array([[10, 11, EOS, 0], [12, 13, 14, 15]]),
    jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool),
)


@pytest.mark.parametrize(
    ("kind", "label", "want"),
    [
        ("logit", 1, [0.5, -2.0]),
        # e^1, e^0.5, e^-1: p = 1.6487 / (2.7183 + 1.6487 + 0.3679); then e^0, e^-2, e^0.
        ("prob", 1, [0.348208, 0.063379]),
        ("log_odds", 1, [-0.626929, -2.693147]),
        ("prob", 2, [0.077695, 0.468311]),
    ],
)
def test_the_kinds_by_hand(kind, label, want):
    logits = jnp.float32([[1.0, 0.5, -1.0], [0.0, -2.0, 0.0]])
    got = classifier.score_of(logits, kind, label)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_independent_labels_have_a_sigmoid_each():
    """sigmoid(0.5) = 0.622459, sigmoid(-2) = 0.119203; the other labels do not matter."""
    logits = jnp.float32([[1.0, 0.5, -1.0], [0.0, -2.0, 0.0]])
    got = classifier.score_of(logits, "prob", 1, independent=True)
    np.testing.assert_allclose(got, [0.622459, 0.119203], atol=1e-6)
    for kind in ("log_odds", "logit"):
        got = classifier.score_of(logits, kind, 1, independent=True)
        np.testing.assert_array_equal(got, [0.5, -2.0])


def test_a_reward_scores_labels_as_their_problem_says(params, config):
    tree = {"decoder": params, "score": heads.init_score(config, 2, jax.random.key(5))}

    def scores(problem, kind):
        labels = Labels(NAMES, problem)
        reward = ClassifierReward(Classifier(tree, config, labels, "POSITIVE", kind), (EOS,))
        return np.asarray(reward(None, *PROMPT, *RESPONSE))

    single, multi, regression = config_files.PROBLEMS
    logit = scores(single, "logit")
    np.testing.assert_array_equal(scores(regression, "logit"), logit)
    np.testing.assert_array_equal(scores(multi, "log_odds"), logit)
    np.testing.assert_allclose(scores(multi, "prob"), 1 / (1 + np.exp(-logit)), atol=1e-6)
    assert np.abs(scores(single, "prob") - scores(multi, "prob")).max() > 1e-4


def test_scalar_is_the_only_column_and_bf16_is_read_as_float32():
    got = classifier.score_of(jnp.bfloat16([[1.5], [-3.0]]), "scalar", 0)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1.5, -3.0])
    with pytest.raises(ValueError, match="kind is 'rank'"):
        classifier.score_of(jnp.zeros((1, 1)), "rank", 0)


def test_log_odds_do_not_saturate_where_probabilities_do():
    logits = jnp.float32([[0.0, 30.0], [0.0, 40.0]])
    assert len(np.unique(classifier.score_of(logits, "prob", 1))) == 1
    np.testing.assert_array_equal(classifier.score_of(logits, "log_odds", 1), [30, 40])


def test_kinds_agree_with_each_other(scorer):
    p = np.asarray(scorer("prob")(None, *PROMPT, *RESPONSE))
    odds = np.asarray(scorer("log_odds")(None, *PROMPT, *RESPONSE))
    both = [np.asarray(scorer("logit", name)(None, *PROMPT, *RESPONSE)) for name in NAMES]
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


@pytest.mark.parametrize("kind", ["logit", "prob"])
def test_prefixes_have_the_rewards_that_they_have_alone(scorer, kind):
    """One pass over the response, against one for each of its prefixes."""
    found = scorer(kind).of_prefixes(None, *PROMPT, *RESPONSE)
    assert found.shape == (2, 4) and found.dtype == jnp.float32
    for t in range(4):
        alone = scorer(kind)(None, *PROMPT, RESPONSE[0], RESPONSE[1] & (jnp.arange(4) < t))
        np.testing.assert_allclose(found[:, t], alone, atol=1e-5)
    assert np.ptp(found[1]) > 1e-3


@pytest.mark.parametrize("kind", ["logit", "prob"])
def test_candidates_have_the_rewards_that_they_have_alone(scorer, kind):
    """Two other tokens in place of each of a response's, of which one ends it, at once."""
    ids = jnp.stack([(RESPONSE[0] + 3) % 17, jnp.array([[5, EOS, 6, 7], [4, 8, 9, EOS]])], axis=-1)
    found = scorer(kind).of_candidates(None, *PROMPT, *RESPONSE, ids)
    assert found.shape == (2, 4, 2) and found.dtype == jnp.float32
    for t in range(4):
        for k in range(2):
            with_it = jnp.where(jnp.arange(4) == t, ids[:, t, k, None], RESPONSE[0])
            seen = jnp.where(jnp.arange(4) == t, True, RESPONSE[1] & (jnp.arange(4) < t))
            alone = scorer(kind)(None, *PROMPT, with_it, seen)
            np.testing.assert_allclose(found[:, t, k], alone, atol=1e-5)


def test_an_encoder_is_told_by_its_config():
    config = encoder.EncoderConfig(
        vocab_size=17, positions=8, layers=1, width=8, heads=2, mlp_width=12, head="distilbert",
        initializer_range=0.5,
    )  # fmt: skip
    params = encoder.init(config, 1, jax.random.key(0))
    tokens, mask = jnp.array([[2, 5, 9, 0], [2, 4, 3, 1]]), jnp.array([[1, 1, 1, 0], [1] * 4], bool)
    got = classifier.score(params, tokens, mask, config=config, kind="scalar", label=0)
    np.testing.assert_allclose(
        got, encoder.score(params, config, tokens, mask)[:, 0], rtol=1e-5, atol=1e-6
    )
    assert abs(float(got[0] - got[1])) > 1e-3
    # It reads both ways, so a prefix has to be read by itself.
    model = Classifier({}, config, Labels(("x",), "regression"), "x", "scalar")
    reward = ClassifierReward(model, (EOS,))
    assert reward.of_prefixes(None, *PROMPT, *RESPONSE) is None
    assert reward.of_candidates(None, *PROMPT, *RESPONSE, RESPONSE[0][..., None]) is None


@pytest.mark.parametrize(
    ("labels", "label", "kind", "message"),
    [
        (LABELS, "GOOD", "logit", "reward.label='GOOD': the reward model knows NEGATIVE, POSITIVE"),
        (LABELS, "POSITIVE", "rank", "reward.score='rank': choose one of"),
        (LABELS, "POSITIVE", "scalar", r"reward.score='scalar' is for models with one.*has 2"),
        (ONE, "LABEL_0", "prob", "needs two labels.*set reward.score=scalar"),
        (ONE, "LABEL_0", "log_odds", "needs two labels"),
        (LABELS, "POSITIVE", "scalar", r"set reward\.label to one of them"),
        (Labels(NAMES, "regression"), "POSITIVE", "prob", "regression: set reward.score=logit"),
    ],
)
def test_bad_settings_are_named(params, config, labels, label, kind, message):
    with pytest.raises(InputError, match=message):
        ClassifierReward(Classifier({"decoder": params}, config, labels, label, kind), (EOS,))


def test_one_label_with_a_sigmoid_has_odds():
    only = Labels(("toxic",), "multi_label_classification")
    assert classifier.label_index(only, "toxic", "prob", "reward") == 0


def test_a_scalar_model_needs_no_label_and_messages_name_their_key():
    assert classifier.label_index(ONE, "", "scalar", "reward") == 0
    assert classifier.label_index(LABELS, "POSITIVE", "prob", "reward") == 1
    with pytest.raises(InputError, match=r"^reward\.others\.tone\.label='x'"):
        classifier.label_index(LABELS, "x", "prob", "reward.others.tone")
