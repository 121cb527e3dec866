"""Rejection sampling of best-of-n from a policy, held against enumeration."""

import numpy as np
import pytest

from vbon_jax.bon import correction, enumeration


def log_softmax(x):
    return x - np.logaddexp.reduce(x)


@pytest.fixture(scope="module")
def world():
    """(log pi_ref, log pi_bon, log of a policy near it) of 200 responses, n = 8."""
    rng = np.random.default_rng(0)
    log_ref = log_softmax(rng.normal(size=200))
    log_bon = enumeration.log_bon(log_ref, rng.normal(size=200), 8.0)
    return log_ref, log_bon, log_softmax(log_bon + 0.5 * rng.normal(size=200))


def test_it_is_best_of_n_where_the_bound_holds(world):
    _, log_bon, log_policy = world
    bound = float(np.exp(np.max(log_bon - log_policy))) * 1.01
    log_p, proposals = correction.exact(log_policy, log_bon, bound)
    np.testing.assert_allclose(log_p, log_bon, atol=1e-9)
    assert proposals == pytest.approx(bound)


def test_two_proposals_are_nearly_best_of_8(world):
    """From a policy at 0.07 nats; best-of-8 takes eight."""
    log_ref, log_bon, log_policy = world
    assert enumeration.kl(log_policy, log_bon) == pytest.approx(0.07, abs=0.01)
    log_p, proposals = correction.exact(log_policy, log_bon, 2.0)
    assert enumeration.kl(log_p, log_bon) < 0.01 and 2.0 <= proposals < 2.2
    kls = [enumeration.kl(correction.exact(log_policy, log_bon, c)[0], log_bon) for c in (1, 2, 4)]
    assert kls[0] > kls[1] > kls[2] and kls[2] < 0.002
    # Without a policy the price is that of the reference: n where rewards do not tie.
    assert correction.exact(log_ref, log_bon, 8.0)[1] == pytest.approx(8.0)


def test_kept_proposals_have_that_distribution(world):
    _, log_bon, log_policy = world
    rng = np.random.default_rng(1)
    drawn = rng.choice(200, size=400_000, p=np.exp(log_policy))
    weights = (log_bon - log_policy)[drawn]
    kept = drawn[correction.accepts(weights, 2.0, rng.random(drawn.size))]
    log_p, proposals = correction.exact(log_policy, log_bon, 2.0)
    assert drawn.size / kept.size == pytest.approx(proposals, rel=0.01)
    share = np.bincount(kept, minlength=200) / kept.size
    assert np.abs(share - np.exp(log_p)).sum() / 2 < 0.012


def test_a_proposal_of_any_weight_is_decided():
    log_weight = np.array([-np.inf, np.log(2.0), np.log(2.0), 5.0, 0.0, 0.0])
    uniform = np.array([0.0, 0.999, 0.0, 0.999, 0.49, 0.51])
    kept = correction.accepts(log_weight, 2.0, uniform)
    assert kept.tolist() == [False, True, True, True, True, False]
    with pytest.raises(ValueError, match=r"bound is 0\.5: give at least 1"):
        correction.accepts([0.0], 0.5, [0.1])


def test_one_is_taken_in_proportion_to_its_weight():
    weights = np.log([1.0, 3.0, 0.5, 0.5]) - 800.0
    uniform = (np.arange(1000) + 0.5) / 1000
    chosen = np.bincount([correction.resampled(weights, u) for u in uniform])
    assert chosen.tolist() == [200, 600, 100, 100]
    assert correction.resampled([-np.inf, -np.inf], 0.7) == 0
    assert correction.resampled([-np.inf, 0.0], 0.0) == 1


def test_distributions_must_be_whole(world):
    _, log_bon, log_policy = world
    with pytest.raises(ValueError, match="log_policy_S must hold every string"):
        correction.exact(log_policy + 0.1, log_bon, 2.0)
    with pytest.raises(ValueError, match="200 responses and log_bon_S 1"):
        correction.exact(log_policy, [0.0], 2.0)
