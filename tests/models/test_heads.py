import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vbon_jax.models import decoder, heads, hf
from vbon_jax.rl import ppo

CONFIG = decoder.DecoderConfig(vocab_size=5, positions=9, layers=1, width=2, heads=1, mlp_width=4)


def test_value_is_zero_at_first_and_learns():
    params = heads.init_value(CONFIG, jax.random.key(0))
    hidden_BxTxD = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    np.testing.assert_array_equal(heads.value(params, hidden_BxTxD), [[0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda p: heads.value(p, hidden_BxTxD).sum())(params)
    np.testing.assert_allclose(gradient["kernel"], [[9.0], [12.0]])
    np.testing.assert_allclose(gradient["bias"], [3.0])


def test_value_by_hand():
    params = {"kernel": jnp.array([[10.0], [1.0]]), "bias": jnp.array([0.5])}
    hidden_BxTxD = jnp.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], jnp.bfloat16)
    value_BxT = heads.value(params, hidden_BxTxD)
    assert value_BxT.dtype == jnp.float32
    np.testing.assert_array_equal(value_BxT, [[12.5, 34.5], [56.5, 78.5]])


def test_a_fitted_value_head_is_that_of_ridge_regression(rng):
    """Against NumPy's least squares with the penalty as further rows; padding is not learned from.

    Its explained variance is what it has by its values.
    """
    shape, width = (40, 6), 5
    hidden = rng.normal(1, 2, (*shape, width)).astype(np.float32)
    mask = rng.random(shape) < 0.7
    returns = np.where(mask, hidden @ rng.normal(size=width) + 3 + rng.normal(size=shape), 100.0)
    returns = returns.astype(np.float32)
    found = heads.moments(jnp.array(hidden), jnp.array(returns), jnp.array(mask))
    head = heads.fit_value(found)
    x, y = hidden[mask].astype(np.float64), returns[mask].astype(np.float64)
    centred, count = x - x.mean(axis=0), len(x)
    penalty = np.sqrt(np.trace(centred.T @ centred) / count) * np.eye(width)
    rows = np.concatenate([centred, penalty]), np.concatenate([y - y.mean(), np.zeros(width)])
    kernel = np.linalg.lstsq(*rows, rcond=None)[0]
    np.testing.assert_allclose(head["kernel"][:, 0], kernel, rtol=1e-4)
    np.testing.assert_allclose(head["bias"], y.mean() - x.mean(axis=0) @ kernel, rtol=1e-4)
    values = heads.value(head, hidden)
    share = ppo.explained_variance(values, jnp.array(returns), jnp.array(mask))
    assert 0.8 < share < 1
    np.testing.assert_allclose(heads.explained_variance(head, found), share, rtol=1e-4)
    # Of other tokens too, whose mean it does not have.
    other = heads.moments(jnp.array(hidden + 1), jnp.array(returns), jnp.array(mask))
    np.testing.assert_allclose(heads.explained_variance(head, other), share, rtol=1e-4)


def test_a_head_that_has_next_to_no_tokens_is_their_mean(rng):
    hidden, returns = rng.normal(size=(1, 2, 64)), np.array([[1.0, 3.0]])
    found = heads.moments(jnp.array(hidden), jnp.array(returns), jnp.ones((1, 2), bool))
    values = heads.value(heads.fit_value(found), jnp.array(rng.normal(size=(1, 50, 64))))
    np.testing.assert_allclose(values.mean(), 2, atol=0.1)
    assert values.std() < 0.2
    nothing = heads.moments(jnp.zeros((1, 2, 3)), jnp.full((1, 2), 5.0), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(heads.fit_value(nothing)["bias"], 5.0)
    assert heads.explained_variance(heads.fit_value(nothing), nothing) == 0


def test_score_is_taken_at_the_last_real_token():
    params = {"kernel": jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])}
    hidden_BxTxD = jnp.arange(30.0).reshape(5, 3, 2) ** 2
    mask_BxT = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    got = heads.score(params, hidden_BxTxD, mask_BxT)
    last = [4, 8, 14, 22, 28]  # the first of the two features there is last ** 2
    expected = [[a**2, (a + 1) ** 2, a**2 - (a + 1) ** 2] for a in last]
    np.testing.assert_array_equal(got, expected)


def test_score_has_no_bias_and_a_row_a_label():
    params = heads.init_score(CONFIG, 4, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {"kernel": (2, 4)}
    assert 0 < float(jnp.abs(params["kernel"]).max()) < 0.1
    with pytest.raises(ValueError, match="num_labels is 0"):
        heads.init_score(CONFIG, 0, jax.random.key(0))


def test_scores_equal_those_of_torch(torch_classifier, padded_batch, tmp_path):
    model = torch_classifier(id2label={0: "bad", 1: "good", 2: "neither"})
    model.save_pretrained(tmp_path)
    config, params, labels = hf.load_classifier(tmp_path)
    assert labels == hf.Labels(("bad", "good", "neither"), "single_label_classification")
    tokens_BxT, mask_BxT = padded_batch

    @jax.jit
    def score(params, tokens_BxT, mask_BxT):
        hidden_BxTxD = decoder.hidden(params["decoder"], config, tokens_BxT, mask_BxT)
        return heads.score(params["score"], hidden_BxTxD, mask_BxT)

    mask = torch.tensor(mask_BxT).long()
    expected = model(
        input_ids=torch.tensor(tokens_BxT).long(),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    np.testing.assert_allclose(
        score(params, tokens_BxT, mask_BxT), expected.detach().numpy(), rtol=0, atol=1e-4
    )
