"""The exponential curve through log F against SciPy's curve_fit, prompt by prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import curve_fit

from vbon_jax.bon import exponential
from vbon_jax.bon.exponential import exponential_log_f, fit, log_f_with_fallback
from vbon_jax.bon.log_f import log_f, reference_ranks

M = 60


def curve(z, log_a, b):
    return -np.exp(np.minimum(log_a - b * z, 50))


def scipy_fit(rewards):
    """(log a, b) of the best of several starts, in float64."""
    rewards = rewards.astype(np.float64)
    rank = (rewards[:, None] > rewards).sum(1)
    want = np.log((rank + 1) / (rewards.size + 1))
    low, width = rewards[0], rewards[-1] - rewards[0]
    z = (rewards - low) / width * 4
    fits = []
    for start in (0.05, 0.5, 2.0, 10.0):
        log_a_and_b, _ = curve_fit(curve, z, want, p0=(0.5, start), maxfev=5000)
        fits.append((np.sum((curve(z, *log_a_and_b) - want) ** 2), *log_a_and_b))
    _, log_a, b = min(fits)
    b = b / width * 4
    return log_a + b * low, b


def shapes():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=M)
    return {
        "normal": normal,
        "gumbel": 3 * rng.gumbel(size=M) + 5,
        "skewed": -rng.exponential(size=M),
        "uniform": rng.random(M),
        "cauchy": rng.standard_cauchy(M),
        "one far above": np.append(normal[1:], 1000.0),
        "one far below": np.append(normal[1:], -1000.0),
        "far from 0": 1e4 + normal,
        "tiny": 1e-25 * normal,
        "huge": 1e25 * normal,
        "0/1": np.repeat([0.0, 1.0], [40, 20]),
        "three levels": np.repeat([0.0, 1.0, 2.0], [30, 20, 10]),
        "one below": np.append(np.ones(M - 1), 0.0),
    }


@pytest.fixture(scope="module")
def rows():
    return np.sort(np.stack(list(shapes().values())).astype(np.float32), axis=1)


@pytest.fixture(scope="module")
def fits(rows):
    return fit(rows)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("row", range(len(shapes())), ids=list(shapes()))
def test_the_fit_is_scipys(rows, fits, row):
    assert fits.converged_P[row] and fits.b_P[row] > 0
    log_a, b = scipy_fit(rows[row])
    np.testing.assert_allclose(fits.b_P[row], b, rtol=2e-4)
    # The curve at the references; float32 of 1e4 leaves 1e-3 of a standard deviation.
    got = np.asarray(exponential_log_f(fits.log_a_P[row], fits.b_P[row], rows[row]), np.float64)
    want = curve(rows[row].astype(np.float64), log_a, b)
    np.testing.assert_allclose(got, want, rtol=5e-3 if b * abs(rows[row]).max() > 500 else 3e-4)


def test_points_on_a_curve_give_that_curve():
    # With no ties F_i = i / (m + 1): the rewards at which -a exp(-b r) has these values.
    cdf = np.arange(1, M + 1) / (M + 1)
    want = np.array([[0.7, 1.3], [-4.0, 0.02]])
    rewards = np.stack([(log_a - np.log(-np.log(cdf))) / b for log_a, b in want])
    got = fit(rewards.astype(np.float32))
    np.testing.assert_allclose(np.stack([got.log_a_P, got.b_P], axis=1), want, rtol=1e-4)
    np.testing.assert_allclose(
        exponential_log_f(got.log_a_P[:, None], got.b_P[:, None], rewards),
        np.log(cdf)[None].repeat(2, axis=0),
        rtol=1e-3,
    )


def test_a_shift_and_a_scale_of_the_rewards_move_log_a_and_b_alone(rows):
    plain, moved = fit(rows[:4]), fit(rows[:4] * 8 - 16)
    np.testing.assert_allclose(moved.b_P, plain.b_P / 8, rtol=1e-3)
    np.testing.assert_allclose(moved.log_a_P, plain.log_a_P - 2 * plain.b_P, atol=2e-3)


def test_what_cannot_be_fitted_has_not_converged_and_harms_no_neighbour():
    normal = np.random.default_rng(1).normal(size=M)
    hard = [
        np.full(M, 2.0),
        np.append(normal[1:], np.inf),
        np.append(normal[1:], -np.inf),
        np.full(M, np.inf),
        normal,
    ]
    got = fit(np.sort(np.stack(hard).astype(np.float32), axis=1))
    assert got.converged_P.tolist() == [False] * 4 + [True]
    assert np.isnan(got.log_a_P[:4]).all() and np.isnan(got.b_P[:4]).all()
    alone = fit(np.sort(normal)[None].astype(np.float32))
    np.testing.assert_allclose(got.b_P[4], alone.b_P[0], rtol=1e-4)
    # One reference reward is all equal, too.
    assert not fit([[1.0]]).converged_P[0]


def test_a_solver_that_gives_up_has_not_converged(rows, monkeypatch):
    monkeypatch.setattr(exponential, "_MAX_STEPS", 1)
    exponential._fit.clear_cache()
    try:
        assert not fit(rows[:5]).converged_P.any()
    finally:
        monkeypatch.undo()
        exponential._fit.clear_cache()
    assert fit(rows[:5]).converged_P.all()


def test_log_f_is_finite_and_never_positive():
    with np.errstate(over="ignore"):
        rewards = np.float32([-3e38, -1e4, -1, 0, 1, 1e4, 3e38])
    got = np.asarray(exponential_log_f(0.5, 2.0, rewards))
    assert np.isfinite(got).all() and (got <= 0).all() and (np.diff(got) >= 0).all()
    np.testing.assert_allclose(got[2:5], -np.exp(0.5 - 2 * rewards[2:5]), rtol=1e-6)
    assert np.isfinite(1e7 * got).all()
    assert np.isnan(exponential_log_f(np.nan, 2.0, 1.0))


def test_the_fallback_is_smoothed(rows, fits):
    log_a, b = np.asarray(fits.log_a_P)[:3], np.asarray(fits.b_P)[:3]
    converged = np.array([True, False, True])
    log_a, b = np.where(converged, log_a, np.nan), np.where(converged, b, np.nan)
    rewards = np.float32([[-1.0, 0.5], [3.0, 9.0], [-0.1, 2.0]])
    below, _ = reference_ranks(rows[:3], rewards)
    got = log_f_with_fallback(log_a[:, None], b[:, None], converged[:, None], rewards, below, M)
    np.testing.assert_array_equal(got[1], log_f(below[1], M, "smoothed"))
    want = exponential_log_f(log_a[::2, None], b[::2, None], rewards[::2])
    np.testing.assert_array_equal(got[::2], want)
    assert np.isfinite(got).all() and (np.asarray(got) <= 0).all()
    traced = jax.jit(jax.vmap(log_f_with_fallback, in_axes=(0, 0, 0, 0, 0, None)))(
        log_a, b, converged, rewards, below, M
    )
    np.testing.assert_allclose(traced, got, rtol=1e-5)
    with pytest.raises(ValueError, match="got m=0"):
        log_f_with_fallback(0.0, 1.0, True, 0.0, 0, 0)


def test_fit_under_jit_and_vmap(rows, fits):
    batched = jax.jit(jax.vmap(fit))(jnp.asarray(rows[:4].reshape(2, 2, M)))
    assert batched.converged_P.shape == (2, 2) and batched.converged_P.all()
    np.testing.assert_allclose(batched.b_P.reshape(4), fits.b_P[:4], rtol=1e-4)


def test_bad_references_are_refused():
    with pytest.raises(ValueError, match="must be ascending"):
        fit([[1.0, 0.0]])
    with pytest.raises(ValueError, match="holds 1 NaN"):
        fit([[1.0, np.nan]])
    with pytest.raises(ValueError, match="one row a prompt"):
        fit([1.0, 2.0])
