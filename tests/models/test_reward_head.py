import numpy as np

from vbon_jax.models import reward_head


def test_the_polynomials_are_orthonormal_on_the_unit_interval():
    u = (np.arange(20_000) + 0.5) / 20_000
    phi = reward_head.legendre(u, 6)
    np.testing.assert_allclose(phi.T @ phi / len(u), np.eye(6), atol=1e-4)
    np.testing.assert_allclose(phi.mean(axis=0), 0, atol=1e-4)


def test_a_fresh_head_says_what_the_pool_says():
    base = np.log(np.array([0.1, 0.2, 0.7], np.float32))
    basis = reward_head.legendre(np.array([0.05, 0.2, 0.65]), 4)
    found = reward_head.log_masses(reward_head.init(5, 4), np.ones((2, 5)), basis, base)
    np.testing.assert_allclose(found, np.tile(base, (2, 1)), rtol=1e-5)


def test_the_masses_are_those_of_the_exponential_family():
    rng = np.random.default_rng(0)
    base, basis = np.log(np.full(4, 0.25, np.float32)), rng.normal(size=(4, 2)).astype(np.float32)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    x = rng.normal(size=(1, 3))
    weight = np.exp((x @ params["kernel"] + params["bias"]) @ basis.T)
    found = np.exp(reward_head.log_masses(params, x, basis, base))
    np.testing.assert_allclose(found, weight / weight.sum(), rtol=1e-5)
