import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.models import decoder
from vbon_jax.models import log_probs as score

B, S, T = 5, 9, 4


@pytest.fixture(scope="module")
def rows():
    """Tokens and mask [B, S]; some rows are padded on the left."""
    tokens = np.random.default_rng(0).integers(0, 37, (B, S)).astype(np.int32)
    mask = np.ones((B, S), bool)
    mask[1, :2] = mask[3, :4] = False
    return tokens, mask


def dense(params, config, tokens, mask, temperature):
    """log softmax of all logits at the response's predicting positions, [B, T, V]."""
    hidden = decoder.hidden(params, config, tokens, mask)[:, S - T - 1 : S - 1]
    return jax.nn.log_softmax(decoder.logits(params, config, hidden) / temperature)


@pytest.mark.parametrize("chunk", [3, 1_000])
def test_log_probs_and_their_gradient_are_those_of_all_logits(params, config, rows, chunk):
    tokens, mask = rows
    weights = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def chunked(p):
        found = score.log_probs(p, config, tokens, mask, T, 0.7, chunk)
        return jnp.sum(weights * found), found

    def whole(p):
        log_p = dense(p, config, tokens, mask, 0.7)
        found = jnp.take_along_axis(log_p, tokens[:, -T:, None], axis=-1)[..., 0]
        return jnp.sum(weights * found), found

    grads, found = jax.jit(jax.grad(chunked, has_aux=True))(params)
    wanted, expected = jax.jit(jax.grad(whole, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, wanted)


def test_policy_against_reference(params, config, rows):
    tokens, mask = rows
    other = jax.tree.map(lambda x: 1.1 * x, params)
    found = score.against(
        tuple(decoder.head(x, config) for x in (other, params)), (config, config),
        tuple(score.hidden(p, config, tokens, mask, T) for p in (other, params)),
        tokens[:, -T:], 0.7, 3,
    )  # fmt: skip
    log_p, log_q = (dense(p, config, tokens, mask, 0.7) for p in (other, params))
    chosen = [jnp.take_along_axis(x, tokens[:, -T:, None], -1)[..., 0] for x in (log_p, log_q)]
    np.testing.assert_allclose(found.log_prob, chosen[0], atol=1e-5)
    np.testing.assert_allclose(found.log_ref, chosen[1], atol=1e-5)
    np.testing.assert_allclose(found.kl, jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), atol=1e-5)
    np.testing.assert_allclose(found.entropy, -jnp.sum(jnp.exp(log_p) * log_p, -1), atol=1e-5)


def test_states_are_those_that_predict(params, config, rows):
    """Slot t comes from the state before token t: changing token t leaves it as it was."""
    tokens, mask = rows
    changed = tokens.copy()
    changed[:, -2] = (changed[:, -2] + 1) % 37
    a, b = (score.hidden(params, config, x, mask, T) for x in (tokens, changed))
    np.testing.assert_allclose(a[:, : T - 1], b[:, : T - 1], atol=1e-6)
    assert np.abs(a[:, T - 1] - b[:, T - 1]).max() > 1e-3
