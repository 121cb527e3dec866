"""Clipped losses against hand-worked numbers and rlax; diagnostics; padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from vbon_jax.rl.ppo import explained_variance, policy_loss, token_entropy, value_loss

MASK = np.arange(6) < np.array([[6], [2], [0], [5]])


def batch(seed, how_many):
    return np.random.default_rng(seed).normal(size=(how_many, 4, 6)).astype(np.float32)


def test_policy_loss_golden_under_jit_and_vmap():
    # Ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -2, clip 0.2:
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-1, -1.6) = 1.2, -1.5, 0.5, -1.6.
    log_prob = np.float32(np.log([[1.5, 1.5, 0.5, 0.5, 9]]))
    advantages = np.float32([[1, -1, 1, -2, 9]])
    mask = np.array([[1, 1, 1, 1, 0]])
    args = (log_prob, np.zeros_like(log_prob), advantages, mask)
    loss, info = jax.jit(policy_loss)(*args, 0.2)
    np.testing.assert_allclose(loss, 0.35, rtol=1e-6)
    np.testing.assert_allclose(info["clip_fraction"], 1)
    np.testing.assert_allclose(info["ratio_mean"], 1, rtol=1e-6)
    np.testing.assert_allclose(info["approx_kl"], -np.log(0.75) / 2, rtol=1e-5)
    _, info = policy_loss(*args, 0.6)
    np.testing.assert_allclose(info["clip_fraction"], 0)
    mapped, _ = jax.vmap(lambda *a: policy_loss(*a, 0.2))(*[np.stack([x, x]) for x in args])
    np.testing.assert_allclose(mapped, [0.35, 0.35], rtol=1e-6)


def test_policy_loss_and_its_gradient_equal_rlax():
    old, change, advantages = batch(0, 3)
    log_prob = old + 0.3 * change

    def ours(log_prob):
        return policy_loss(log_prob, old, advantages, MASK, 0.2)[0]

    def theirs(log_prob):
        ratio = jnp.exp(log_prob - old)[MASK]
        return rlax.clipped_surrogate_pg_loss(ratio, jnp.asarray(advantages[MASK]), 0.2)

    got, want = jax.value_and_grad(ours)(log_prob), jax.value_and_grad(theirs)(log_prob)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    assert np.asarray(got[1]).any()


def test_on_the_first_update_the_gradient_is_reinforce():
    log_prob, advantages = batch(1, 2)
    loss, info = policy_loss(log_prob, log_prob, advantages, MASK, 0.2)
    np.testing.assert_allclose(loss, -advantages[MASK].mean(), rtol=1e-5)
    assert (info["ratio_mean"], info["clip_fraction"], info["approx_kl"]) == (1, 0, 0)
    gradient = jax.grad(lambda x: policy_loss(x, log_prob, advantages, MASK, 0.2)[0])(log_prob)
    np.testing.assert_allclose(gradient, np.where(MASK, -advantages / MASK.sum(), 0), atol=1e-6)


def test_value_loss_golden():
    # clip 1: moved by 3, clipped to 1; errors to return 2: 3 -> 1, clipped 1 -> 1, worst 1.
    # moved by -3 towards return -3: 0, clipped -1 -> 4, worst 4. moved by 0.5: error 0.25.
    values, returns = np.float32([[3, -3, 0.5, 7]]), np.float32([[2, -3, 0, 7]])
    loss, info = jax.jit(value_loss)(
        values, np.zeros_like(values), returns, np.array([[1, 1, 1, 0]]), 1.0
    )
    np.testing.assert_allclose(loss, (1 + 4 + 0.25) / 3 / 2, rtol=1e-6)
    np.testing.assert_allclose(info["clip_fraction"], 2 / 3, rtol=1e-6)


def test_value_loss_without_clipping_is_half_the_squared_error():
    values, old, returns = batch(2, 3)
    loss, info = value_loss(values, old, returns, MASK, 1e6)
    np.testing.assert_allclose(loss, np.square(values - returns)[MASK].mean() / 2, rtol=1e-5)
    assert info["clip_fraction"] == 0


@pytest.mark.parametrize("of", [policy_loss, value_loss])
def test_parts_of_a_minibatch_add_up_to_the_whole(of):
    arrays, count = batch(6, 3), np.float32(MASK.sum())

    def part(rows, count):
        def loss(first):
            return of(first, arrays[1][rows], arrays[2][rows], MASK[rows], 0.2, count)

        (value, info), slope = jax.value_and_grad(loss, has_aux=True)(arrays[0][rows])
        return {"loss": value, **info}, slope

    whole, slope = part(slice(None), None)
    parts = [part(slice(i, i + 1), count) for i in range(len(MASK))]
    for name, value in whole.items():
        np.testing.assert_allclose(sum(p[0][name] for p in parts), value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), slope, rtol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_matters_to_no_loss_and_no_gradient(junk):
    arrays = batch(3, 3)

    def both(first, second, third):
        policy, policy_info = policy_loss(first, second, third, MASK, 0.2)
        value, value_info = value_loss(first, second, third, MASK, 0.2)
        extra = explained_variance(first, second, MASK)
        return policy + 3 * value, (policy_info, value_info, extra)

    run = jax.jit(jax.value_and_grad(both, has_aux=True))
    clean = jax.tree.leaves(run(*arrays))
    dirty = jax.tree.leaves(run(*np.where(MASK, arrays, np.float32(junk))))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_but_padding_gives_zero():
    none = np.zeros((4, 6), bool)
    policy, policy_info = policy_loss(*batch(4, 3), none, 0.2)
    value, value_info = value_loss(*batch(4, 3), none, 0.2)
    assert (policy, value) == (0, 0)
    assert not any(np.asarray(jax.tree.leaves((policy_info, value_info))))


def test_a_nan_inside_the_mask_is_not_hidden():
    log_prob, old, advantages = batch(5, 3)
    for spoilt in range(3):
        arrays = [log_prob.copy(), old.copy(), advantages.copy()]
        arrays[spoilt][0, 0] = np.nan
        assert np.isnan(policy_loss(*arrays, MASK, 0.2)[0])
        assert np.isnan(value_loss(*arrays, MASK, 0.2)[0])


def summed_entropy(logits, mask):
    return token_entropy(jax.nn.log_softmax(logits, axis=-1), mask).sum()


def test_entropy_golden_and_limits():
    logits = np.full((1, 4, 4), -np.inf, np.float32)
    logits[0, 0] = 3.0  # uniform over 4
    logits[0, 1, :2] = -1.0  # uniform over 2
    logits[0, 2, 3] = 0.0  # certain
    logits[0, 3] = np.nan  # padding
    mask = np.array([[1, 1, 1, 0]])
    found = token_entropy(jax.nn.log_softmax(logits, axis=-1), mask)
    np.testing.assert_allclose(found, [[np.log(4), np.log(2), 0, 0]], atol=1e-6)
    log_probs = np.float32([[[-np.inf, 0.0]]])
    assert np.isfinite(jax.grad(lambda x: token_entropy(x, np.ones((1, 1))).sum())(log_probs)).all()


def test_entropy_gradient_equals_the_formula():
    # dH / dlogit_v = -p_v (log p_v + H)
    logits = np.float32([[[0.5, -1.0, 2.0]]])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    want = -np.exp(log_p) * (log_p - np.sum(np.exp(log_p) * log_p))
    found = jax.grad(summed_entropy)(logits, np.ones((1, 1)))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_explained_variance():
    returns = np.float32([[1, 2, 3, 4, 9]])
    mask = np.array([[1, 1, 1, 1, 0]])
    for values, want in [
        ([[1, 2, 3, 4, 0]], 1.0),
        ([[6, 7, 8, 9, 0]], 1.0),  # a constant shift is not variance
        ([[5, 5, 5, 5, 0]], 0.0),
        ([[4, 3, 2, 1, 0]], -3.0),
        ([[1, 2, 4, 3, 0]], 0.6),  # errors 0, 0, -1, 1: 1 - 0.5 / 1.25
    ]:
        got = jax.jit(explained_variance)(np.float32(values), returns, mask)
        np.testing.assert_allclose(got, want, atol=1e-6)
    flat = np.ones((1, 5), np.float32)
    assert explained_variance(2 * flat, flat, mask) == 1
    assert explained_variance(returns, flat, mask) == 0
