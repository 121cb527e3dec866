"""QRPO's loss: numbers by hand, the paper's own form, and where training on it ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vbon_jax.bon import enumeration, targets
from vbon_jax.rl import pointwise

SIZE = 20


def test_qrpo_golden_under_jit():
    # 0.5 (1 - (-1))^2 = 2; 0.5 (-3 - (-3))^2 = 0; 0.5 (2 - 5)^2 = 4.5.
    got = jax.jit(pointwise.qrpo_loss)(
        jnp.float32([-1, -3, 5]), jnp.float32([1, -3, 2]), jnp.float32(0.5)
    )
    np.testing.assert_allclose(got, [2, 0, 4.5], rtol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("transform", targets.TRANSFORMS)
def test_qrpo_is_the_loss_of_the_paper_over_beta(rng, transform):
    """One response at a time, with the paper's quantile reward, Z and (f - beta log Z - ...)^2."""
    m, beta = 100_000, 0.3
    rewards, ratios = rng.normal(size=6), rng.normal(size=6)
    reference = np.sort(rng.normal(size=m))
    want, targets_6 = [], []
    for reward, ratio in zip(rewards, ratios, strict=True):
        q = sum(reference <= reward) / m
        f, z = {
            "log": (np.log(q), beta / (1 + beta)), "identity": (q, beta * (np.exp(1 / beta) - 1)),
        }[transform]  # fmt: skip
        want.append((f - beta * np.log(z) - beta * ratio) ** 2 / beta)
        low, mass = np.log(q - 1 / m), np.log(1 / m)
        targets_6.append(targets.qrpo_log_ratio(low, mass, beta, transform))
    got = pointwise.qrpo_loss(jnp.asarray(ratios), jnp.asarray(targets_6), beta)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


def test_the_gradient_at_the_reference_does_not_vanish_with_beta():
    """Targets are of the size of 1/beta, here exactly it."""
    for beta in (1.0, 0.1, 0.001):
        slope = jax.grad(pointwise.qrpo_loss)(jnp.float32(0), jnp.float32(1 / beta), beta)
        np.testing.assert_allclose(slope, -2, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["injective", "tied"])
@pytest.mark.parametrize(("transform", "beta"), [("log", 1 / 3), ("identity", 0.2)])
def test_qrpo_ends_at_its_optimum_whatever_the_frequencies(rng, transform, beta, tied):
    log_ref_S = rng.normal(size=SIZE)
    log_ref_S -= np.logaddexp.reduce(log_ref_S)
    rewards_S = rng.normal(size=SIZE)
    rewards_S = np.round(rewards_S) if tied else rewards_S
    ratio_S = targets.qrpo_log_ratio(
        *enumeration.log_f_and_mass(log_ref_S, rewards_S), beta, transform
    )
    got_S = descend(log_ref_S, ratio_S, beta, rng.random(SIZE) + 0.1)
    want_S = targets.qrpo(log_ref_S, rewards_S, beta, transform)
    assert enumeration.kl(want_S, log_ref_S) > 0.1
    np.testing.assert_allclose(got_S, want_S, atol=1e-3)
    if transform == "log":
        best_S = enumeration.log_bon(log_ref_S, rewards_S, 4)
        assert enumeration.kl(np.asarray(got_S, np.float64), best_S) < 1e-6


@partial(jax.jit, static_argnames="steps")
def descend(log_ref_S, target_S, beta, weights_S, steps=6000):
    """The log-probabilities of a table of logits after descent from the uniform distribution."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def loss(logits_S):
        ratio_S = jax.nn.log_softmax(logits_S) - log_ref_S
        return pointwise.qrpo_loss(ratio_S, target_S, beta) @ weights_S

    def step(carry, _):
        logits_S, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits_S), state)
        return (optax.apply_updates(logits_S, updates), state), None

    start_S = jnp.zeros(SIZE)
    (logits_S, _), _ = jax.lax.scan(step, (start_S, optimizer.init(start_S)), length=steps)
    log_p_S = jax.nn.log_softmax(logits_S)
    return log_p_S - jax.nn.logsumexp(log_p_S)
