import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.rl.next_token import log_prob, temper
from vbon_jax.sampling import logits as lg


def twin_sample(uniform, logits):
    """Inverse CDF in float64, one row at a time."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    cdf = np.cumsum(p) / p.sum()
    return int(np.searchsorted(cdf, uniform, side="right"))


@pytest.mark.parametrize("vocab", [5, 256, 257, 1000])
def test_sample_is_the_inverse_cdf(rng, vocab):
    logits = rng.normal(size=(64, vocab)).astype(np.float32) * 3
    uniform = rng.random(64).astype(np.float32)
    tokens = np.asarray(lg.sample(jnp.asarray(uniform), jnp.asarray(logits)))
    expected = np.array([twin_sample(u, row) for u, row in zip(uniform, logits)])
    # A uniform within float32 rounding of a boundary may fall to either side.
    assert np.mean(tokens == expected) >= 63 / 64
    assert np.all(np.abs(tokens - expected) <= 1)


def test_sample_never_returns_an_impossible_token():
    for vocab, possible in ((10, [3]), (600, [599]), (600, [0]), (600, [255, 256])):
        logits = np.full((1000, vocab), -np.inf, np.float32)
        logits[:, possible] = 0.0
        uniform = np.linspace(0, np.nextafter(np.float32(1), np.float32(0)), 1000, dtype=np.float32)
        tokens = np.asarray(lg.sample(jnp.asarray(uniform), jnp.asarray(logits)))
        assert set(tokens) == set(possible)


def test_sample_frequencies_follow_softmax(rng):
    logits = rng.normal(size=300).astype(np.float32) * 2
    count = 40_000
    uniform = jax.random.uniform(jax.random.key(0), (count,))
    tokens = np.asarray(
        jax.jit(lg.sample)(uniform, jnp.broadcast_to(jnp.asarray(logits), (count, 300)))
    )
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    found = np.bincount(tokens, minlength=300) / count
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p / count) + 1e-4)


def test_temper_divides_and_is_float32():
    out = temper(jnp.array([1.0, 2.0], jnp.bfloat16), 0.5)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [2.0, 4.0])


def test_filters_keep_what_they_should():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda x: np.isfinite(np.asarray(x))[0].tolist()  # noqa: E731
    assert kept(lg.filter_top_k(logits, 2)) == [True, True, False, False]
    assert kept(lg.filter_top_k(logits, 0)) == [True] * 4
    assert kept(lg.filter_top_p(logits, 0.8)) == [True, True, False, False]
    assert kept(lg.filter_top_p(logits, 0.81)) == [True, True, True, False]
    assert kept(lg.filter_top_p(logits, 1e-6)) == [True, False, False, False]
    assert kept(lg.filter_top_p(logits, 1.0)) == [True] * 4


def test_log_prob_is_log_softmax(rng):
    logits = rng.normal(size=(4, 3, 7)).astype(np.float32)
    tokens = rng.integers(7, size=(4, 3))
    expected = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(log_prob(logits, jnp.asarray(tokens)), expected, rtol=1e-6)
