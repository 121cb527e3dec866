import itertools

import numpy as np
import pytest
from scipy.integrate import quad

from vbon_jax.bon import enumeration, quantiles

EDGES = (0.0, 0.5, 0.75, 0.9, 1.0)


def test_overlaps_by_hand():
    got = quantiles.overlaps([0.4, 0.0, 0.95], [0.8, 1.0, 0.96], EDGES)
    want = [[0.25, 0.625, 0.125, 0], [0.5, 0.25, 0.15, 0.1], [0, 0, 0, 1]]
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2.5, 8])
@pytest.mark.parametrize("m", [3, 50])
def test_without_ties_the_parts_are_integrals(rng, n, m):
    """Whatever the rewards and however few: F is uniform."""
    got = quantiles.best_of_n(rng.normal(size=(2, m)), n, EDGES)

    def density(f):
        return n * f ** (n - 1)

    def gain(f):
        return density(f) * np.log(density(f)) if f else 0.0

    for name, values in (("share_PxQ", density), ("log_ratio_PxQ", gain)):
        want = [quad(values, low, high)[0] for low, high in itertools.pairwise(EDGES)]
        np.testing.assert_allclose(getattr(got, name), [want, want], atol=1e-9)
    bound = np.log(n) - (n - 1) / n
    np.testing.assert_allclose(got.log_ratio_PxQ.sum(axis=1), bound, atol=1e-12)


def test_tied_groups_have_their_masses():
    """Rewards of 3 values, in the proportions of a reference that is enumerated."""
    rewards = np.repeat([2.0, 0.0, 1.0], [2, 5, 3])[None]
    n, p = 4.0, np.array([0.5, 0.3, 0.2])  # of rewards 0, 1, 2
    bon = np.exp(enumeration.log_bon(np.log(p), np.arange(3), n))
    got = quantiles.best_of_n(rewards, n, (0, 0.5, 0.65, 1))
    np.testing.assert_allclose(got.share_PxQ, [[bon[0], bon[1] / 2, bon[1] / 2 + bon[2]]])
    gain = bon * np.log(bon / p)
    np.testing.assert_allclose(got.log_ratio_PxQ, [[gain[0], gain[1] / 2, gain[1] / 2 + gain[2]]])


def test_an_order_breaks_ties_and_equal_responses_stay_tied(rng):
    rewards = np.zeros((1, 6))
    distinct = quantiles.best_of_n(rewards, 3, EDGES, rng.permutation(6)[None])
    continuous = quantiles.best_of_n(np.arange(6.0)[None], 3, EDGES)
    np.testing.assert_allclose(distinct.log_ratio_PxQ, continuous.log_ratio_PxQ)
    twice = quantiles.best_of_n(rewards, 3, EDGES, np.array([[4, 1, 7, 2, 7, 3]]))
    as_tied = quantiles.best_of_n(np.array([[0, 1, 2, 3, 4, 4.0]]), 3, EDGES)
    np.testing.assert_allclose(twice.log_ratio_PxQ, as_tied.log_ratio_PxQ)
    assert twice.log_ratio_PxQ.sum() < distinct.log_ratio_PxQ.sum()


@pytest.mark.parametrize("rate", [0.3, 7.0, 60.0, 900.0])
def test_best_of_poisson_without_ties_is_integrals(rng, rate):
    """At 60 and 900 the exponential integral is taken by its series, where it would overflow."""
    edges = (0.0, 0.5, 0.9, 0.99, 1.0)
    got = quantiles.best_of_poisson(rng.normal(size=(2, 9)), rate, edges)

    def density(f):
        return (1 + rate * f) * np.exp(-rate * (1 - f))

    def gain(f):
        return density(f) * (np.log1p(rate * f) - rate * (1 - f))

    for name, values in (("share_PxQ", density), ("log_ratio_PxQ", gain)):
        want = [quad(values, low, high, limit=200)[0] for low, high in itertools.pairwise(edges)]
        np.testing.assert_allclose(getattr(got, name), [want, want], atol=1e-8)


def test_best_of_poisson_with_ties_is_its_mixture():
    """Rewards of 3 values: the probabilities of best-of-n are mixed, then held against p."""
    rewards, rate = np.repeat([2.0, 0.0, 1.0], [2, 5, 3])[None], 3.0
    p = np.array([0.5, 0.3, 0.2])
    chance, mixed = np.exp(-rate), np.zeros(3)
    for k in range(60):
        mixed += chance * np.exp(enumeration.log_bon(np.log(p), np.arange(3), k + 1.0))
        chance *= rate / (k + 1)
    got = quantiles.best_of_poisson(rewards, rate, (0, 1))
    np.testing.assert_allclose(got.log_ratio_PxQ, [[(mixed * np.log(mixed / p)).sum()]])
    with pytest.raises(ValueError, match=r"rate must be finite and > 0, .*got rate=0"):
        quantiles.best_of_poisson(rewards, 0, (0, 1))
