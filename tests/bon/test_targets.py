"""Fixed points, against the conditions that define them and against slow twins."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from vbon_jax.bon import enumeration, targets
from vbon_jax.bon.distribution import entropy_coefficient, kl_coefficient, sequence_reward

REF = np.array([0.1, 0.25, 0.05, 0.4, 0.2])
INJECTIVE = np.array([3.0, -1.0, 0.5, 0.0, 2.0])
TIED = np.array([1.0, 0.0, 1.0, 0.0, 2.0])
LOG_REF = np.log(REF)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(3)
    log_ref_S = 1.5 * rng.normal(size=30)
    return log_ref_S - np.logaddexp.reduce(log_ref_S), rng.normal(size=30)


def test_tilted_by_hand():
    # 0.5 * 4 : 0.25 * 1 : 0.25 * 8
    got = targets.tilted(np.log([0.5, 0.25, 0.25]), np.log([2, 1, np.sqrt(8)]), 0.5)
    np.testing.assert_allclose(np.exp(got), np.array([2, 0.25, 2]) / 4.25, rtol=1e-12)


def test_lower_bound_and_bond_by_hand():
    # F = 0.9, 0, 0.65, 0.25, 0.7 and p_<= = 1, 0.25, 0.7, 0.65, 0.9, squared for n = 3.
    weights = REF * np.array([0.9, 0, 0.65, 0.25, 0.7]) ** 2
    np.testing.assert_allclose(
        np.exp(targets.lower_bound(LOG_REF, INJECTIVE, 3)), weights / weights.sum(), rtol=1e-12
    )
    weights = REF * np.array([1, 0.25, 0.7, 0.65, 0.9]) ** 2
    np.testing.assert_allclose(
        np.exp(targets.bond_backward(LOG_REF, INJECTIVE, 3)), weights / weights.sum(), rtol=1e-12
    )


@pytest.mark.parametrize("rewards_S", [INJECTIVE, TIED], ids=["injective", "tied"])
@pytest.mark.parametrize("n", [1.0, 2.5, 16.0])
@pytest.mark.parametrize("objective", ["lower_bound", "jensen_bound", "reward"])
def test_targets_are_stationary_for_the_objectives_that_are_trained(objective, n, rewards_S):
    """d/dp of E[R] - c KL + w H is R - c log(p / ref) - w log p - (c + w): alike on all strings."""
    beta = 0.7
    if objective == "reward":
        log_p_S = targets.tilted(LOG_REF, rewards_S, beta)
    else:
        log_p_S = getattr(targets, objective)(LOG_REF, rewards_S, n)
    np.testing.assert_allclose(np.exp(log_p_S).sum(), 1, rtol=1e-12)
    log_f_S, _ = enumeration.log_f_and_mass(LOG_REF, rewards_S)
    reward_S = np.asarray(sequence_reward(objective, n=n, log_f=log_f_S, reward=rewards_S))
    c, w = float(kl_coefficient(objective, n, beta)), float(entropy_coefficient(objective, n))
    said_S = log_p_S > -np.inf
    np.testing.assert_array_equal(said_S, reward_S > -np.inf)
    log_p_S = log_p_S[said_S]
    slope_S = reward_S[said_S] - c * (log_p_S - LOG_REF[said_S]) - w * log_p_S
    # The rewards are float32.
    np.testing.assert_allclose(slope_S, slope_S[0], atol=2e-7 * max(1, np.max(np.abs(log_p_S))))


def test_n_of_one_is_the_reference():
    for target in (targets.lower_bound, targets.bond_backward, targets.jensen_bound):
        np.testing.assert_allclose(target(LOG_REF, INJECTIVE, 1), LOG_REF, atol=1e-12)


def test_strings_that_are_never_said_stay_so():
    log_ref_S, rewards_S = np.append(LOG_REF, [-np.inf, -np.inf]), np.append(INJECTIVE, [9, -9])
    for got_S, want_S in (
        (targets.tilted(log_ref_S, rewards_S, 1), targets.tilted(LOG_REF, INJECTIVE, 1)),
        (targets.lower_bound(log_ref_S, rewards_S, 4), targets.lower_bound(LOG_REF, INJECTIVE, 4)),
        (targets.jensen_bound(log_ref_S, rewards_S, 1), LOG_REF),
        (targets.bonbon(log_ref_S, rewards_S, 4, 0.5), targets.bonbon(LOG_REF, INJECTIVE, 4, 0.5)),
    ):
        np.testing.assert_allclose(got_S[:5], want_S, atol=1e-9)
        assert (got_S[5:] == -np.inf).all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_and_worst_equals_a_walk_over_all_draws(n):
    want_SxS = np.zeros((5, 5))
    for draw in itertools.product(range(5), repeat=n):
        best, worst = max(draw, key=INJECTIVE.__getitem__), min(draw, key=INJECTIVE.__getitem__)
        want_SxS[best, worst] += np.prod(REF[list(draw)])
    np.testing.assert_allclose(
        targets.best_and_worst(LOG_REF, INJECTIVE, n), want_SxS, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("n", [2, 8, 600])
def test_best_and_worst_have_best_of_n_as_margins(world, n):
    log_ref_S, rewards_S = world
    joint_SxS = targets.best_and_worst(log_ref_S, rewards_S, n)
    for axis, sign in ((1, 1), (0, -1)):
        np.testing.assert_allclose(
            joint_SxS.sum(axis=axis),
            np.exp(enumeration.log_bon(log_ref_S, sign * rewards_S, n)),
            atol=1e-13,
        )
    assert (joint_SxS[rewards_S[:, None] < rewards_S] == 0).all()


def bonbon_loss(log_p_S, log_ref_S, joint_SxS, n, alpha):
    """The expected loss, term by term."""
    h_S = log_p_S - log_ref_S
    beta_n = 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))
    losses_SxS = -alpha * log_p_S[:, None]
    losses_SxS = losses_SxS + (1 - alpha) * (h_S[:, None] - h_S - 1 / (2 * beta_n)) ** 2
    return np.sum(joint_SxS * losses_SxS)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.5), (8, 0.02), (8, 0.9)])
def test_bonbon_equals_generic_minimisation(n, alpha):
    joint_SxS = targets.best_and_worst(LOG_REF, INJECTIVE, n)

    def value(logits_S):
        log_p_S = logits_S - np.logaddexp.reduce(logits_S)
        return bonbon_loss(log_p_S, LOG_REF, joint_SxS, n, alpha)

    generic = scipy.optimize.minimize(
        value,
        LOG_REF,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-13, "maxfev": 9999},
    )
    got_S = targets.bonbon(LOG_REF, INJECTIVE, n, alpha)
    np.testing.assert_allclose(np.exp(got_S).sum(), 1, rtol=1e-12)
    assert value(got_S) <= generic.fun + 1e-12
    want_S = generic.x - np.logaddexp.reduce(generic.x)
    np.testing.assert_allclose(got_S, want_S, atol=1e-5)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.9), (8, 0.5), (32, 0.001)])
def test_bonbon_has_no_slope_left(world, n, alpha):
    """By central differences of the literal loss, in every logit."""
    log_ref_S, rewards_S = world
    joint_SxS = targets.best_and_worst(log_ref_S, rewards_S, n)
    got_S = targets.bonbon(log_ref_S, rewards_S, n, alpha)

    def value(logits_S):
        log_p_S = logits_S - np.logaddexp.reduce(logits_S)
        return bonbon_loss(log_p_S, log_ref_S, joint_SxS, n, alpha)

    step_SxS = 1e-4 * np.eye(30)
    slope_S = np.array([(value(got_S + s) - value(got_S - s)) / 2e-4 for s in step_SxS])
    # An error of the difference itself: third derivatives times 1e-9, rounding of the value / 1e-4.
    np.testing.assert_allclose(slope_S, 0, atol=1e-7 + 1e-10 * value(got_S))
    away_S = np.array([(value(log_ref_S + s) - value(log_ref_S - s)) / 2e-4 for s in step_SxS])
    assert np.max(np.abs(away_S)) > 1e-2


@pytest.mark.parametrize("n", [2, 8, 600])
def test_bonbon_of_the_likelihood_alone_is_best_of_n(world, n):
    log_bon_S = enumeration.log_bon(*world, n)
    assert abs(enumeration.kl(log_bon_S, targets.bonbon(*world, n, 1.0))) < 1e-9
    kls = [enumeration.kl(targets.bonbon(*world, n, a), log_bon_S) for a in (0.01, 0.5, 0.99)]
    assert kls[0] > kls[1] > kls[2] >= 0


def test_bonbon_of_many_draws_is_the_best_string(world):
    log_ref_S, rewards_S = world
    best = np.argmax(rewards_S)
    p_best = [np.exp(targets.bonbon(log_ref_S, rewards_S, n, 0.5))[best] for n in (4, 64, 5000)]
    assert p_best[0] < p_best[1] < p_best[2]
    assert p_best[2] > 0.999


@pytest.mark.parametrize("alpha", [0.001, 0.5, 1.0])
def test_bonbon_of_a_wide_world_is_found(alpha):
    """Masses from 0.1 down to 1e-130 among strings of like rewards."""
    rng = np.random.default_rng(1)
    log_ref_S = np.append(rng.normal(size=40), np.linspace(-10, -300, 10))
    log_ref_S -= np.logaddexp.reduce(log_ref_S)
    got_S = targets.bonbon(log_ref_S, rng.normal(size=50), 16, alpha)
    assert np.isfinite(got_S).all()
    np.testing.assert_allclose(np.exp(got_S).sum(), 1, rtol=1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="beta must be > 0"):
        targets.tilted(LOG_REF, INJECTIVE, 0)
    with pytest.raises(ValueError, match=r"beta must be finite and >= 0.*-1"):
        targets.tilted(LOG_REF, INJECTIVE, -1.0)
    with pytest.raises(ValueError, match="score_S must be finite, got inf"):
        targets.tilted(LOG_REF, [0, 1, np.inf, 2, 3], 1)
    with pytest.raises(ValueError, match="no string has any weight"):
        targets.lower_bound(LOG_REF, np.ones(5), 2)
    with pytest.raises(ValueError, match=r"n=0\.5"):
        targets.jensen_bound(LOG_REF, INJECTIVE, 0.5)
    with pytest.raises(ValueError, match=r"whole number of draws, got n=2\.5"):
        targets.best_and_worst(LOG_REF, INJECTIVE, 2.5)
    with pytest.raises(ValueError, match="its 5 rewards have 3 values"):
        targets.best_and_worst(LOG_REF, TIED, 2)
    with pytest.raises(ValueError, match=r">= 2.*got n=1"):
        targets.bonbon(LOG_REF, INJECTIVE, 1, 0.5)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got alpha=0"):
        targets.bonbon(LOG_REF, INJECTIVE, 4, 0)


def slow_qrpo(ref_S, rewards_S, beta, transform):
    """pi_ref times the mean of exp(f(q) / beta) / Z over a string's quantiles, by quadrature."""
    f = {"log": np.log, "identity": lambda q: q}[transform]

    def integral(low, high):
        return scipy.integrate.quad(lambda q: np.exp(f(q) / beta), low, high, epsabs=1e-14)[0]

    p = []
    for ref, reward in zip(ref_S, rewards_S, strict=True):
        low, mass = ref_S[rewards_S < reward].sum(), ref_S[rewards_S == reward].sum()
        p.append(ref * integral(low, low + mass) / mass)
    return np.array(p) / integral(0, 1)


@pytest.mark.parametrize("rewards_S", [INJECTIVE, TIED], ids=["injective", "tied"])
@pytest.mark.parametrize("beta", [0.05, 1 / 2, 3.0])
@pytest.mark.parametrize("transform", targets.TRANSFORMS)
def test_qrpo_equals_quadrature_and_needs_no_normalisation(transform, beta, rewards_S):
    got_S = np.exp(targets.qrpo(LOG_REF, rewards_S, beta, transform))
    np.testing.assert_allclose(got_S, slow_qrpo(REF, rewards_S, beta, transform), rtol=1e-9)
    log_f_S, log_mass_S = enumeration.log_f_and_mass(LOG_REF, rewards_S)
    ratio_S = targets.qrpo_log_ratio(log_f_S, log_mass_S, beta, transform)
    np.testing.assert_allclose(REF @ np.exp(ratio_S), 1, rtol=1e-12)


@pytest.mark.parametrize("rewards_S", [INJECTIVE, TIED], ids=["injective", "tied"])
def test_qrpo_of_the_log_is_best_of_n(rewards_S):
    for n in (1.5, 8.0, 500.0):
        np.testing.assert_allclose(
            targets.qrpo(LOG_REF, rewards_S, 1 / (n - 1), "log"),
            enumeration.log_bon(LOG_REF, rewards_S, n), rtol=1e-9, atol=1e-9,
        )  # fmt: skip


@pytest.mark.parametrize(("transform", "log_z"), [
    ("log", lambda beta: np.log(beta / (1 + beta))),
    ("identity", lambda beta: np.log(beta * np.expm1(1 / beta))),
])  # fmt: skip
def test_qrpo_of_little_mass_is_the_formula_of_the_paper(transform, log_z):
    """f(q) / beta - log Z with q = F + g, up to terms of order g / beta."""
    q, beta = np.array([0.1, 0.5, 1.0]), 0.2
    got = targets.qrpo_log_ratio(np.log(q - 1e-9), np.full(3, np.log(1e-9)), beta, transform)
    f = np.log(q) if transform == "log" else q
    np.testing.assert_allclose(got, f / beta - log_z(beta), atol=1e-6)


def test_qrpo_where_a_string_is_never_said_and_where_its_arguments_are_bad():
    log_ref_S = np.log([0.5, 0.5, 1e-300])
    log_ref_S[2] = -np.inf
    got_S = np.exp(targets.qrpo(log_ref_S, [0.0, 1.0, 2.0], 1.0, "log"))
    np.testing.assert_allclose(got_S, [0.25, 0.75, 0])
    with pytest.raises(ValueError, match="beta must be > 0"):
        targets.qrpo(LOG_REF, INJECTIVE, 0.0, "log")
    with pytest.raises(ValueError, match="transform must be one of log, identity"):
        targets.qrpo(LOG_REF, INJECTIVE, 1.0, "cube")
