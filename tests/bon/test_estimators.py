"""What each estimator of log F would lead to, with training taken as perfect.

The optimum under an estimated ratio is p(y) ~ pi_ref(y) exp(estimated log ratio). On a world that
is enumerated its distance to best-of-n is the estimator's error alone.
"""

import numpy as np
import pytest

from vbon_jax.bon import enumeration
from vbon_jax.bon import log_f as lf

N = 8.0
DRAWS = 40


@pytest.fixture(scope="module")
def world():
    """log pi_ref and rewards of 1,296 strings, like the tabular world's: entropy 6.5 nats."""
    rng = np.random.default_rng(0)
    log_ref = rng.normal(0, 1.2, size=1296)
    return log_ref - np.logaddexp.reduce(log_ref), rng.permutation(1296).astype(np.float32)


@pytest.fixture(scope="module")
def errors(world):
    """{(estimator, m): mean KL(optimum || bon) over DRAWS sets of m reference samples}."""
    log_ref, rewards = world
    log_bon = enumeration.log_bon(log_ref, rewards, N)
    rng = np.random.default_rng(1)
    found = {}
    for m in (16, 64, 200):
        drawn = np.sort(rng.choice(rewards, size=(DRAWS, m), p=np.exp(log_ref)), axis=1)
        below, equal = lf.reference_ranks(drawn, np.tile(rewards, (DRAWS, 1)))
        for estimator in lf.ESTIMATORS:
            ratio = lf.log_ratio(estimator, below, equal, m, N, log_mass=log_ref.astype(np.float32))
            optimum = log_ref + np.asarray(ratio, np.float64)
            optimum -= np.logaddexp.reduce(optimum, axis=1, keepdims=True)
            found[estimator, m] = np.mean([enumeration.kl(p, log_bon) for p in optimum])
    return found


@pytest.mark.parametrize("estimator", lf.ESTIMATORS)
def test_more_samples_lead_closer_to_best_of_n(errors, estimator):
    assert errors[estimator, 16] > 2 * errors[estimator, 64]
    assert errors[estimator, 64] > 2 * errors[estimator, 200]
    assert errors[estimator, 200] < 0.02


@pytest.mark.parametrize("m", [16, 64, 200])
def test_interval_does_best(errors, m):
    """Why it is the default: no estimator has a lower error (1%: the noise of the draws)."""
    best = min(errors[estimator, m] for estimator in lf.ESTIMATORS)
    assert errors["interval", m] <= 1.01 * best
