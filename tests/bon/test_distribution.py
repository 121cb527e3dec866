"""Formula (1) and the objectives: accuracy against mpmath, limits, and what is refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from vbon_jax.bon import distribution, enumeration, targets

LOG_F = np.float32([-np.inf, -300, -50, -10, -3, -1, -0.7, -0.3, -0.1, -1e-3, -1e-6, 0])
LOG_MASS = np.float32(
    [-300, -150, -100, -88, -50, -20, -16, -14, -10, -5, -2, -1, -0.8, -0.7, -0.1, -1e-3, 0]
)
N = [1.0, 1.0001, 1.5, 2.0, 8.0, 100.0, 1000.0]


def mp_exp(x):
    return mpmath.mpf(0) if x == -np.inf else mpmath.exp(mpmath.mpf(float(x)))


def mp_log_bon_ratio(log_f, log_mass, n):
    """Formula (1) as it is written, with enough digits for F^n next to (F + g)^n."""
    with mpmath.workdps(320):
        f, g, n = mp_exp(log_f), mp_exp(log_mass), mpmath.mpf(float(n))
        return float(mpmath.log(((f + g) ** n - f**n) / g))


def is_possible(log_f, log_mass):
    return np.exp(np.float64(log_f)) + np.exp(np.float64(log_mass)) <= 1 + 1e-15


@pytest.mark.parametrize("n", N)
def test_log_bon_ratio_equals_mpmath(n):
    grid = [pair for pair in itertools.product(LOG_F, LOG_MASS) if is_possible(*pair)]
    assert len(grid) > 100
    log_f, log_mass = np.float32(grid).T
    got = np.asarray(distribution.log_bon_ratio(log_f, log_mass, n))
    want = np.array([mp_log_bon_ratio(f, g, np.float32(n)) for f, g in grid])
    assert got.dtype == np.float32
    np.testing.assert_array_less(np.abs(got - want), 1e-5 * np.maximum(1, np.abs(want)))


def test_log_bon_ratio_next_to_a_total_of_one():
    # F + g = 1 up to float32: the true value is close to -log g, as BoN cannot miss the best.
    log_mass = np.float32(np.log([1e-6, 0.01, 0.3, 0.5, 0.9]))
    log_f = np.float32(np.log1p(-np.exp(np.float64(log_mass))))
    for n in (2.0, 100.0):
        got = np.asarray(distribution.log_bon_ratio(log_f, log_mass, n))
        want = [-np.log(g) + np.log1p(-((1 - g) ** n)) for g in np.exp(np.float64(log_mass))]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_log_bon_ratio_golden():
    # F = 1/4, g = 1/2, n = 2: ((3/4)^2 - (1/4)^2) / (1/2) = 1. F = 0, g = 1/2, n = 3: 1/4.
    got = distribution.log_bon_ratio(np.log([0.25, 1e-300]), np.log([0.5, 0.5]), [2.0, 3.0])
    np.testing.assert_allclose(np.exp(got), [1.0, 0.25], rtol=1e-6)


def test_log_bon_ratio_at_n_of_one_is_exactly_zero():
    grid = np.float32(list(itertools.product(LOG_F, LOG_MASS))).T
    assert (np.asarray(distribution.log_bon_ratio(*grid, 1)) == 0).all()


@pytest.mark.parametrize("n", [1.5, 8.0, 1000.0])
def test_log_bon_ratio_limits(n):
    log_f = np.float32([-7, -1, -1e-3])
    no_mass = np.log(n) + (n - 1) * np.float64(log_f)
    for log_mass in (-150.0, -1e4, -np.inf):
        got = distribution.log_bon_ratio(log_f, log_mass, n)
        np.testing.assert_allclose(got, no_mass, rtol=1e-5, atol=1e-5)
    log_mass = np.float32([-150, -3, -1e-3, 0])
    got = distribution.log_bon_ratio(-np.inf, log_mass, n)
    np.testing.assert_allclose(got, (n - 1) * np.float64(log_mass), rtol=1e-6)
    assert distribution.log_bon_ratio(-np.inf, -np.inf, n) == -np.inf


def test_log_bon_ratio_is_continuous_across_its_branches():
    # d = log g - log F through 0, where one form hands over to the other, and u through 1e-6.
    log_f = np.float32(-2.0)
    log_mass = np.float32(
        np.concatenate([np.linspace(-2.001, -1.999, 101), -2 - np.linspace(13.81, 13.82, 101)])
    )
    got = np.asarray(distribution.log_bon_ratio(log_f, log_mass, 8.0))
    want = [mp_log_bon_ratio(log_f, g, 8) for g in log_mass]
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_an_estimate_of_f_above_what_is_possible_is_read_as_one_minus_g():
    log_mass = np.float32(np.log(0.3))
    want = np.log((1 - 0.7**8) / 0.3)
    for log_f in (0.0, 1e-3, np.log(0.71)):
        got = distribution.log_bon_ratio(log_f, log_mass, 8.0)
        np.testing.assert_allclose(got, want, atol=2e-6)
    assert distribution.log_bon_ratio(0.0, 1e-7, 8.0) == 0.0  # log_mass rounded above log 1


@pytest.mark.parametrize("n", [1.0, 8.0])
def test_nan_is_not_hidden(n):
    assert np.isnan(distribution.log_bon_ratio(np.nan, -1.0, n))
    assert np.isnan(distribution.log_bon_ratio(-1.0, np.nan, n))
    for objective in ("exact", "lower_bound", "jensen_bound"):
        got = distribution.sequence_reward(objective, n=n, log_f=np.float32(np.nan), log_mass=-1.0)
        assert np.isnan(got)
    assert np.isnan(distribution.sequence_reward("backward", n=n, log_up_to=np.float32(np.nan)))


def test_n_may_be_traced_and_batched():
    log_f, log_mass = np.float32([-2, -1, -np.inf]), np.float32([-150, -1.5, -3])
    ns = np.float32([1, 2.5, 64])
    got = jax.jit(jax.vmap(lambda n: distribution.log_bon_ratio(log_f, log_mass, n)))(ns)
    want = [np.asarray(distribution.log_bon_ratio(log_f, log_mass, float(n))) for n in ns]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.asarray(got)[0] == 0).all()


def test_log_bon_prob_sums_to_one_and_may_not_exceed_it():
    ref = np.random.default_rng(0).dirichlet(np.ones(50))
    log_f = np.append(-np.inf, np.log(np.cumsum(ref)[:-1]))
    for n in (1.0, 3.7, 200.0):
        log_bon = np.asarray(distribution.log_bon_prob(log_f, np.log(ref), n))
        np.testing.assert_allclose(np.exp(log_bon).sum(), 1, rtol=1e-5)
        assert (log_bon <= 1e-6).all()


@pytest.mark.parametrize("bad", [0.99, 0, -3, np.nan, np.inf])
def test_bad_n_is_refused_by_name_and_value(bad):
    calls = [
        lambda: distribution.log_bon_ratio(-1.0, -2.0, bad),
        lambda: distribution.log_bon_ratio(-1.0, -2.0, jnp.float32([2, bad])),
        lambda: distribution.log_bon_prob(-1.0, -2.0, bad),
        lambda: distribution.sequence_reward("lower_bound", n=bad, log_f=-1.0),
        lambda: distribution.kl_coefficient("exact", bad),
        lambda: distribution.kl_coefficient("backward", bad),
        lambda: distribution.entropy_coefficient("jensen_bound", bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"n must be .*got n=-?[\dni]"):
            call()


def test_golden_objectives():
    # n = 4: beta = 10, gamma = 6, alpha = 9, and everything over beta.
    log_f, log_ratio = np.float32([-1.0, -2.0]), np.float32([0.5, -3.0])
    log_up_to = np.float32([-0.3, 0.0])
    reward = distribution.sequence_reward
    for name in ("exact", "jeffreys"):
        np.testing.assert_allclose(reward(name, n=4, log_ratio=log_ratio), [0.125, -0.75])
    np.testing.assert_allclose(reward("lower_bound", n=4, log_f=log_f), [-0.75, -1.5])
    np.testing.assert_allclose(reward("jensen_bound", n=4, log_f=log_f), [-0.6, -1.2], rtol=1e-6)
    np.testing.assert_allclose(reward("backward", n=4, log_up_to=log_up_to), log_up_to)
    np.testing.assert_allclose(reward("reward", reward=log_ratio), log_ratio)
    assert distribution.OBJECTIVES == (
        "exact", "jeffreys", "lower_bound", "jensen_bound", "backward", "reward"
    )  # fmt: skip
    kl = [distribution.kl_coefficient(name, 4, 0.05) for name in distribution.OBJECTIVES]
    np.testing.assert_allclose(kl, [0.25, 0.25, 0.25, 1.0, 1 / 3, 0.05])
    entropy = [distribution.entropy_coefficient(name, 4) for name in distribution.OBJECTIVES]
    np.testing.assert_allclose(entropy, [0, 0, 0, -0.9, 0, 0])


def test_exact_reward_uses_formula_1():
    log_f, log_mass = np.float32([-1, -np.inf]), np.float32([-2, -3])
    got = distribution.sequence_reward("exact", n=8, log_f=log_f, log_mass=log_mass)
    np.testing.assert_allclose(got, distribution.log_bon_ratio(log_f, log_mass, 8) / 8)


def test_f_of_zero_is_seen_in_the_bounds_unless_n_is_one():
    for objective in ("lower_bound", "jensen_bound"):
        assert distribution.sequence_reward(objective, n=2, log_f=-np.inf) == -np.inf
        assert distribution.sequence_reward(objective, n=1, log_f=-np.inf) == 0


@pytest.fixture
def world():
    rng = np.random.default_rng(3)
    return np.log(rng.dirichlet(np.ones(30))), rng.permutation(30).astype(np.float32)


def objective_value(objective, log_p_S, log_ref_S, rewards_S, n):
    """c-scaled objective of a policy on an enumerated world."""
    log_f_S, log_mass_S = enumeration.log_f_and_mass(log_ref_S, rewards_S)
    p_S = np.exp(log_p_S)
    reward_S = distribution.sequence_reward(
        objective,
        n=n,
        log_f=log_f_S,
        log_mass=log_mass_S,
        log_up_to=np.logaddexp(log_f_S, log_mass_S),
    )
    said = p_S > 0
    value = np.sum(p_S[said] * np.asarray(reward_S, np.float64)[said])
    value -= float(distribution.kl_coefficient(objective, n)) * enumeration.kl(log_p_S, log_ref_S)
    entropy = -np.sum(p_S[said] * log_p_S[said])
    return value + float(distribution.entropy_coefficient(objective, n)) * entropy


def random_policies(world, how_many):
    """Policies that never say the string of the lowest reward, where log F is -inf."""
    rng = np.random.default_rng(4)
    for concentration in rng.uniform(0.05, 3, how_many):
        p_S = rng.dirichlet(np.full(30, concentration)) + 1e-12
        p_S[np.argmin(world[1])] = 0
        with np.errstate(divide="ignore"):
            yield np.log(p_S / p_S.sum())


@pytest.mark.parametrize("n", [2.0, 5.0, 32.0])
def test_the_bounds_are_ordered_below_the_exact_objective(world, n):
    # J >= L (Theorem 2) and L >= L1 (Theorem 4), J = -KL(policy || bon), for integer n.
    for log_p_S in random_policies(world, 10):
        exact = n * objective_value("exact", log_p_S, *world, n)
        lower = n * objective_value("lower_bound", log_p_S, *world, n)
        jensen = n * (n + 1) / 2 * objective_value("jensen_bound", log_p_S, *world, n)
        np.testing.assert_allclose(
            exact, -enumeration.kl(log_p_S, enumeration.log_bon(*world, n)), rtol=1e-5
        )
        assert exact >= lower - 1e-6 >= jensen - 2e-6


def test_the_optimum_of_the_exact_objective_is_bon(world):
    best = objective_value("exact", enumeration.log_bon(*world, 8.0), *world, 8.0)
    assert abs(best) < 1e-6
    assert all(objective_value("exact", p, *world, 8.0) < -1e-3 for p in random_policies(world, 10))


def test_the_optimum_of_the_jensen_bound(world):
    # L1 = gamma E[log F] + H + beta E[log ref], so its optimum is F^gamma ref^beta, normalised.
    n, log_ref_S = 3.0, world[0]
    log_f_S, _ = enumeration.log_f_and_mass(*world)
    log_best_S = 3 * log_f_S + 6 * log_ref_S
    log_best_S -= np.logaddexp.reduce(log_best_S)
    best = objective_value("jensen_bound", log_best_S, *world, n)
    for log_p_S in random_policies(world, 10):
        assert objective_value("jensen_bound", log_p_S, *world, n) < best
        with np.errstate(divide="ignore"):
            near = np.log(0.99 * np.exp(log_best_S) + 0.01 * np.exp(log_p_S))
        assert objective_value("jensen_bound", near, *world, n) < best


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1.5, 3.0, 64.0])
def test_the_optimum_of_the_backward_objective(world, n, tied):
    """E[R] - c KL(p || ref) is largest at ref exp(R / c) / Z, where it is c log Z."""
    log_ref_S, rewards_S = world[0], np.floor(world[1] / 4) if tied else world[1]
    up_to_S = [np.exp(log_ref_S[rewards_S <= r]).sum() for r in rewards_S]
    weight_S = np.exp(log_ref_S) * np.array(up_to_S) ** (n - 1)
    log_best_S = targets.bond_backward(log_ref_S, rewards_S, n)
    np.testing.assert_allclose(np.exp(log_best_S), weight_S / weight_S.sum(), rtol=1e-9)
    best = objective_value("backward", log_best_S, log_ref_S, rewards_S, n)
    np.testing.assert_allclose(best, np.log(weight_S.sum()) / (n - 1), rtol=1e-5)
    for log_p_S in random_policies(world, 10):
        assert objective_value("backward", log_p_S, log_ref_S, rewards_S, n) < best
        near = np.logaddexp(np.log(0.9) + log_best_S, np.log(0.1) + log_p_S)
        assert objective_value("backward", near, log_ref_S, rewards_S, n) < best


def test_the_backward_objective_at_n_of_one_and_near_it():
    # At n = 1 the reference is the optimum: all weight is on the KL.
    assert distribution.kl_coefficient("backward", 1) == np.inf
    np.testing.assert_allclose(distribution.kl_coefficient("backward", np.float32([1.25, 9])),
                               [4, 0.125])  # fmt: skip


def test_missing_and_unknown_arguments_are_named():
    with pytest.raises(ValueError, match=re.escape("objective='exakt'")) as error:
        distribution.sequence_reward("exakt", n=2, log_f=-1.0)
    assert all(name in str(error.value) for name in distribution.OBJECTIVES)
    for call, message in [
        (lambda: distribution.sequence_reward("exact", n=2, log_f=-1.0), "needs log_mass"),
        (lambda: distribution.sequence_reward("exact", n=2, log_mass=-1.0), "needs log_f"),
        (lambda: distribution.sequence_reward("lower_bound", n=2), "needs log_f"),
        (lambda: distribution.sequence_reward("jensen_bound", log_f=-1.0), "n must be"),
        (lambda: distribution.sequence_reward("backward", n=2, log_f=-1.0), "needs log_up_to"),
        (lambda: distribution.sequence_reward("reward", n=2), "needs reward"),
        (lambda: distribution.kl_coefficient("backward"), "n must be"),
        (lambda: distribution.kl_coefficient("reward", 2), "needs beta"),
        (lambda: distribution.kl_coefficient("reward", 2, -0.1), "got beta=-0.1"),
        (lambda: distribution.kl_coefficient("reward", 2, np.nan), "got beta=nan"),
        (lambda: distribution.kl_coefficient("ppo", 2), "objective='ppo'"),
        (lambda: distribution.entropy_coefficient("ppo", 2), "objective='ppo'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_coefficients_may_be_made_inside_jit():
    def coefficients(n, beta):
        return (
            distribution.kl_coefficient("reward", n, beta),
            distribution.kl_coefficient("reward", n, 0.3),  # concrete under a trace
            distribution.kl_coefficient("jensen_bound", 4.0),
            distribution.kl_coefficient("backward", n),
            distribution.entropy_coefficient("jensen_bound", n),
            distribution.sequence_reward("lower_bound", n=4, log_f=-1.0),
        )

    got = jax.jit(coefficients)(4.0, 0.5)
    np.testing.assert_allclose(got, [0.5, 0.3, 1.0, 1 / 3, -0.9, -0.75], rtol=1e-6)
