"""The optimum each method is held against, worked out anew on a world of six responses."""

import itertools
import math

import numpy as np
import pytest

from vbon_jax import methods
from vbon_jax.bon import enumeration
from vbon_jax.evaluation import exact
from vbon_jax.training.options import Offline

P_REF = np.array([0.30, 0.05, 0.20, 0.10, 0.15, 0.20])
LOG_REF = np.log(P_REF)
REWARDS = np.array([0.5, 3.0, -1.0, 2.0, 1.0, -0.2])
F = np.array([P_REF[r > REWARDS].sum() for r in REWARDS])
UP_TO = F + P_REF
N, BETA = 3, 0.4


def normalised(p):
    return p / p.sum()


def best_of_n():
    """Every way to draw three responses."""
    p = np.zeros(6)
    for draws in itertools.product(range(6), repeat=N):
        p[max(draws, key=lambda i: REWARDS[i])] += math.prod(P_REF[i] for i in draws)
    return p


BON = best_of_n()


def bonbon_loss(log_p):
    """BoNBoN's expected loss, alpha such that both terms weigh alike at the reference."""
    gap = (N - 1) * (1 + 1 / 2)
    alpha = gap**2 / (gap**2 + np.sum(BON * -LOG_REF))
    ratio = log_p - LOG_REF
    total = alpha * np.sum(BON * -log_p)
    for draws in itertools.product(range(6), repeat=N):
        best, worst = (f(draws, key=lambda i: REWARDS[i]) for f in (max, min))
        p = math.prod(P_REF[i] for i in draws)
        total += (1 - alpha) * p * (ratio[best] - ratio[worst] - gap) ** 2
    return total


TARGETS = {
    "bon": BON,
    "vbon": BON,
    "bon_sft": BON,
    "lower_bound": normalised(P_REF * F ** (N - 1)),
    "bond": normalised(P_REF * UP_TO ** (N - 1)),
    "ppo": normalised(P_REF * np.exp(REWARDS / BETA)),
    "dpo": normalised(P_REF * np.exp(REWARDS / BETA)),
    "qrpo": UP_TO ** (1 + 1 / BETA) - F ** (1 + 1 / BETA),
    "qrpo_identity": normalised(np.exp(UP_TO / BETA) - np.exp(F / BETA)),
}


def optimum(method, beta=None, matched=N, labels="soft"):
    """What the rows of a method are held against, as its record says."""
    if method == "bon":
        return exact.Optimum(
            "bon", "pi_bon", lambda log_ref, rewards: enumeration.log_bon(log_ref, rewards, N), N,
            None,
        )  # fmt: skip
    series = methods.SERIES[method][1]
    return exact.Optimum(
        series.label, series.formula,
        lambda log_ref, rewards: series.optimum(
            log_ref, rewards, N, 0.0 if beta is None else beta, Offline(labels=labels)
        ),
        float(matched), beta,
    )  # fmt: skip


def target(method, log_ref, rewards, beta=BETA, **given):
    return optimum(method, beta, **given).log_probs(log_ref, rewards)


@pytest.mark.parametrize("method", TARGETS)
def test_the_optimum_of_each_method(method):
    got = np.exp(target(method, LOG_REF, REWARDS))
    np.testing.assert_allclose(got, TARGETS[method], atol=1e-12)


def test_the_optimum_of_bonbon_is_where_its_loss_is_least(rng):
    """Every direction leads up; with whole draws of three, best and worst are those of one draw."""
    best = target("bonbon", LOG_REF, REWARDS, 0.0)
    assert np.exp(best).sum() == pytest.approx(1)
    lowest = bonbon_loss(best)
    for _ in range(50):
        moved = best + rng.normal(size=6) * 0.02
        moved -= np.log(np.exp(moved).sum())
        assert bonbon_loss(moved) > lowest
    assert bonbon_loss(LOG_REF) > lowest + 0.1 and bonbon_loss(np.log(BON)) > lowest + 1e-3


def test_every_curve_of_a_sweep_has_an_optimum_and_its_formula():
    assert {label: series.formula for label, (_, series) in methods.SERIES.items()} == {
        "vbon": "pi_bon",
        "bon_sft": "pi_bon",
        "lower_bound": "pi_ref F^(n-1) / Z",
        "bond": "pi_ref p_<=^(n-1) / Z",
        "ppo": "pi_ref exp(r / beta) / Z",
        "dpo": "pi_ref exp(r / beta) / Z",
        "qrpo": "pi_ref q^(1 / beta) / Z",
        "qrpo_identity": "pi_ref exp(q / beta) / Z",
        "bonbon": "argmin of its loss",
    }


def kl(p, q):
    said = p > 0
    return float(np.sum(p[said] * np.log(p[said] / q[said])))


def win_rate(p):
    return float(p @ (F + P_REF / 2))


def row(method, policies, beta=None, matched=N):
    """The row of a policy of two prompts; the second prompt has the strings in another order."""
    back = np.arange(6)[::-1]
    log_p = [np.log(policies[0]), np.log(policies[1])[back]]
    log_ref, rewards = [LOG_REF, LOG_REF[back]], np.array([REWARDS, REWARDS[back]])
    return exact.row(optimum(method, beta, matched), log_p, log_ref, rewards)


def test_figures_are_means_over_prompts():
    first, second = normalised(np.arange(1.0, 7)), normalised(np.array([5.0, 1, 4, 1, 5, 9]))
    found = row("ppo", (first, second), beta=BETA)
    aim = TARGETS["ppo"]
    for name, value in {
        "kl_target": (kl(first, aim) + kl(second, aim)) / 2,
        "kl_bon": (kl(first, BON) + kl(second, BON)) / 2,
        "kl_ref": (kl(first, P_REF) + kl(second, P_REF)) / 2,
        "win_rate": (win_rate(first) + win_rate(second)) / 2,
        "target_kl_bon": kl(aim, BON),
        "target_win_rate": win_rate(aim),
    }.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["method"] == "ppo" and found["beta"] == BETA and found["n"] == N
    assert found["target"] == "pi_ref exp(r / beta) / Z"


@pytest.mark.parametrize("method", ["vbon", "bond", "bon_sft", "bonbon", "dpo", "qrpo"])
def test_a_policy_at_its_optimum_has_nothing_left_to_learn(method):
    aim = np.exp(target(method, LOG_REF, REWARDS))
    found = row(method, (aim, aim), beta=BETA)
    assert found["kl_target"] == pytest.approx(0, abs=1e-9)
    assert found["kl_bon"] == pytest.approx(found["target_kl_bon"], abs=1e-9)
    assert found["win_rate"] == pytest.approx(found["target_win_rate"], abs=1e-9)
    reference = row(method, (P_REF, P_REF), beta=BETA)
    assert reference["kl_ref"] == 0 and reference["win_rate"] == pytest.approx(0.5)
    assert reference["kl_target"] > 0.01


def test_a_beta_stands_for_the_n_it_is_matched_with():
    found = row("dpo", (P_REF, P_REF), beta=0.5, matched=2.0)
    two = normalised(UP_TO**2 - F**2)
    assert found["n"] == 2.0
    assert found["kl_bon"] == pytest.approx(kl(P_REF, two), abs=1e-12)


def test_what_is_infinite_is_left_out():
    """The bound's optimum never says the worst response; a softmax does."""
    found = row("lower_bound", (BON, BON))
    assert found["kl_target"] is None
    assert found["target_kl_bon"] == pytest.approx(kl(TARGETS["lower_bound"], BON))
    at_optimum = TARGETS["lower_bound"]
    with np.errstate(divide="ignore"):
        assert row("lower_bound", (at_optimum, at_optimum))["kl_target"] == pytest.approx(0)


def test_where_there_is_no_optimum_none_is_claimed():
    """Hard labels push DPO on for ever; BoNBoN's is only derived without ties."""
    assert target("dpo", LOG_REF, REWARDS, labels="hard") is None
    tied = np.round(REWARDS / 3)
    assert target("bonbon", LOG_REF, tied) is None
    hard = optimum("dpo", BETA, labels="hard")
    row = exact.row(hard, [LOG_REF], [LOG_REF], REWARDS[None])
    assert row["kl_target"] is row["target_kl_bon"] is row["target_win_rate"] is None
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(np.sum(P_REF * (LOG_REF - np.log(BON))))
