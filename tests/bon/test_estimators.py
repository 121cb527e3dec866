"""What each estimator of log F would lead to, with training taken as perfect.

The optimum under an estimated ratio is p(y) ~ pi_ref(y) exp(estimated log ratio). On a world that
is enumerated its distance to best-of-n is the estimator's error alone.
"""

import numpy as np
import pytest

from vbon_jax.bon import enumeration, references
from vbon_jax.bon import log_f as lf

N = 8.0
DRAWS = 40
M = (16, 64, 200)
OF_RANKS = (*lf.LOG_F_ESTIMATORS, "interval")


@pytest.fixture(scope="module")
def world():
    """log pi_ref and places in the order of rewards of 1,296 strings, like the tabular world's:
    entropy 6.5 nats."""
    rng = np.random.default_rng(0)
    log_ref = rng.normal(0, 1.2, size=1296)
    return log_ref - np.logaddexp.reduce(log_ref), rng.permutation(1296)


def gumbel_rewards(log_ref, places):
    """Rewards in the order of places whose log F is -exp(-r), the curve of `exponential`."""
    log_f, log_mass = enumeration.log_f_and_mass(log_ref, places)
    rewards = -np.log(-np.logaddexp(log_f, log_mass - np.log(2))).astype(np.float32)
    assert np.array_equal(np.argsort(rewards), np.argsort(places))
    return rewards


def mean_error(log_ref, rewards, m, estimator):
    """Mean KL(optimum || bon) over DRAWS sets of m reference samples."""
    log_bon = enumeration.log_bon(log_ref, rewards, N)
    rng = np.random.default_rng(m)
    drawn = rng.choice(rewards, size=(DRAWS, m), p=np.exp(log_ref))
    table = references.references(drawn, estimator)
    found = references.density(
        table, np.repeat(np.arange(DRAWS), len(rewards)), np.tile(rewards, DRAWS), None,
        np.tile(log_ref, DRAWS).astype(np.float32), N, estimator=estimator,
    )  # fmt: skip
    optimum = log_ref + np.asarray(found.log_ratio_B, np.float64).reshape(DRAWS, -1)
    optimum -= np.logaddexp.reduce(optimum, axis=1, keepdims=True)
    return np.mean([enumeration.kl(p, log_bon) for p in optimum])


@pytest.fixture(scope="module")
def errors(world):
    """{(estimator, m): error} where `exponential` has the right curve; the others see ranks only,
    to which the rewards' distribution is all one."""
    rewards = gumbel_rewards(*world)
    return {(e, m): mean_error(world[0], rewards, m, e) for m in M for e in lf.ESTIMATORS}


@pytest.mark.parametrize("estimator", lf.ESTIMATORS)
def test_more_samples_lead_closer_to_best_of_n(errors, estimator):
    assert errors[estimator, 16] > 2 * errors[estimator, 64]
    assert errors[estimator, 64] > 2 * errors[estimator, 200]
    assert errors[estimator, 200] < 0.02


@pytest.mark.parametrize("m", M)
def test_interval_does_best(errors, m):
    """Why it is the default: no estimator of ranks has a lower error (1%: the noise of draws)."""
    best = min(errors[estimator, m] for estimator in OF_RANKS)
    assert errors["interval", m] <= 1.01 * best


def test_the_curve_does_better_where_it_is_right_and_few_samples_are_there(errors):
    assert errors["exponential", 16] < 0.7 * errors["interval", 16]


def test_the_curve_does_not_get_better_with_m_where_it_is_wrong(world):
    """Why it is not the default: uniform rewards have no log F of that form."""
    log_ref, places = world
    rewards = places.astype(np.float32)
    error = {m: mean_error(log_ref, rewards, m, "exponential") for m in (64, 200)}
    assert min(error.values()) > 0.05
    assert error[200] > 5 * mean_error(log_ref, rewards, 200, "interval")
