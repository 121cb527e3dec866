import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.rl import kl, ppo
from vbon_jax.rl.next_token import NextToken, next_token

V = 7


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    logits, ref = (jnp.float32(rng.normal(0, 2, (2, 3, V))) for _ in range(2))
    return logits, ref, jnp.int32(rng.integers(0, V, (2, 3)))


def by_definition(logits, ref, tokens):
    """The same from normalised arrays, as autodiff sees it."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    chosen, chosen_ref = (
        jnp.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in (log_p, log_q)
    )
    ones = jnp.ones(tokens.shape, bool)
    return NextToken(
        chosen, chosen_ref, kl.full_kl(log_p, log_q, ones), ppo.token_entropy(log_p, ones)
    )


def test_values_by_hand():
    logits, ref = jnp.log(jnp.float32([[[0.5, 0.25, 0.25]]])), jnp.zeros((1, 1, 3))
    found = next_token(logits + 3, ref - 2, jnp.int32([[1]]))
    assert float(found.log_prob[0, 0]) == pytest.approx(np.log(0.25), abs=1e-6)
    assert float(found.log_ref[0, 0]) == pytest.approx(-np.log(3), abs=1e-6)
    entropy = 0.5 * np.log(2) + 0.5 * np.log(4)
    assert float(found.entropy[0, 0]) == pytest.approx(entropy, abs=1e-6)
    assert float(found.kl[0, 0]) == pytest.approx(np.log(3) - entropy, abs=1e-6)


def test_equals_the_definition_and_its_gradient(drawn):
    logits, ref, tokens = drawn
    for got, expected in zip(next_token(*drawn), by_definition(*drawn)):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    weights = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)
    weights[1] = 0  # the reference's log-prob has no gradient into the policy

    def loss(of):
        return jax.grad(lambda x: sum(jnp.sum(w * y) for w, y in zip(weights, of(x, ref, tokens))))

    np.testing.assert_allclose(
        jax.jit(loss(next_token))(logits), loss(by_definition)(logits), atol=1e-5
    )


def test_equal_distributions_have_no_divergence_and_no_gradient_of_it(drawn):
    logits, _, tokens = drawn
    found = next_token(logits, logits + 5, tokens)
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    np.testing.assert_allclose(found.log_prob, found.log_ref, atol=1e-5)
    slope = jax.grad(lambda x: next_token(x, logits + 5, tokens).kl.sum())(logits)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_large_logits_stay_finite():
    logits = jnp.float32([[[1e4, 0, -1e4]]])
    found, slope = jax.value_and_grad(
        lambda x: sum(y.sum() for y in next_token(x, -logits, jnp.int32([[0]])))
    )(logits)
    assert np.isfinite(found) and np.isfinite(slope).all()
