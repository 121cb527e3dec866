"""The band of the density ratio against its closed form, and against draws from known rewards."""

import numpy as np
import pytest

from vbon_jax.bon import adaptive


def true_log_ratio(prob, n):
    upto = np.cumsum(prob)
    below = upto - prob
    return np.log((upto**n - below**n) / prob)


@pytest.mark.parametrize("n", [2, 8, 32])
def test_without_ties_the_variance_is_n_less_1_over_m(n):
    m = 4096
    found = adaptive.half_width(np.random.default_rng(0).normal(size=(3, m)), n)
    np.testing.assert_allclose(found, adaptive.Z * np.sqrt((n - 1) / m), rtol=0.02)
    assert np.ptp(found) < 1e-12  # ranks alone count


@pytest.mark.parametrize("prob", [(0.5, 0.5), (0.7, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)])
def test_the_band_is_that_of_estimates_from_many_draws(prob):
    """The spread of the plug-in estimate over 4,000 sets of m rewards, where best-of-n is."""
    prob, n, m = np.array(prob), 8, 4000
    counts = np.random.default_rng(1).multinomial(m, prob, size=4000)
    estimates = np.array([true_log_ratio(c / m, n) for c in counts if c.all()])
    mass = prob * np.exp(true_log_ratio(prob, n))
    spread = np.sqrt(np.sum(mass * estimates.var(axis=0)))
    rewards = np.repeat(np.arange(len(prob)), np.round(prob * m).astype(int))[None]
    assert adaptive.half_width(rewards, n)[0] == pytest.approx(adaptive.Z * spread, rel=0.05)


def test_rewards_that_all_tie_are_not_taken_for_known():
    """A better reward of mass 1 / (m + 1) may not have been seen."""
    widths = [adaptive.half_width(np.zeros((1, m)), 8)[0] for m in (8, 64, 512)]
    np.testing.assert_allclose(widths, [adaptive.Z * 7 / m for m in (8, 64, 512)], rtol=0.02)


def test_order_and_scale_do_not_count_and_n_1_needs_nothing():
    rewards = np.random.default_rng(2).integers(0, 6, (4, 50)).astype(float)
    found = adaptive.half_width(rewards, 8)
    np.testing.assert_allclose(adaptive.half_width(3 * rewards[:, ::-1] - 1, 8), found)
    np.testing.assert_allclose(adaptive.half_width(rewards, 1), 0, atol=1e-9)
    assert np.isfinite(adaptive.half_width(rewards, 512)).all()  # powers of n that are 0


def test_n_below_1_is_refused():
    with pytest.raises(ValueError, match="n must be"):
        adaptive.half_width(np.zeros((1, 3)), 0.5)
