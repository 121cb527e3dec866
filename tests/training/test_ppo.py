"""The pieces of an update: a rollout scored, its advantages, the losses and their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.models import decoder, heads
from vbon_jax.sampling import decode
from vbon_jax.sampling.sampler import ScoredRollout
from vbon_jax.training import ppo


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def test_rollout_log_probs_are_those_of_the_update(world, mesh, batch):
    _, metrics = world.experience(mesh, batch)
    assert float(metrics["rollout_log_prob_error"]) < 1e-5


def test_the_policy_that_is_its_reference_has_no_kl(world, mesh, batch):
    _, metrics = world.experience(mesh, batch)
    assert float(metrics["kl_ref"]) == 0
    assert float(metrics["kl_ref_k1"]) == 0


def test_the_ratio_is_one_before_the_first_step(world, mesh, batch):
    exp, _ = world.experience(mesh, batch)
    info = tiny.loss(
        world.fresh(mesh).params, world.reference(mesh), exp, jnp.float32(1), setup=world.setup
    )[1]
    assert float(info["approx_kl"]) < 1e-10
    assert float(info["policy_clip_fraction"]) == 0
    assert float(info["value_clip_fraction"]) == 0


def test_padding_of_the_rollout_does_not_matter(world, mesh, batch):
    exp, metrics = world.experience(mesh, batch)
    rollout = batch.rollout
    noise = jax.random.randint(jax.random.key(4), rollout.tokens_BxT.shape, 0, 37)
    dirty = dataclasses.replace(
        batch,
        rollout=rollout._replace(tokens_BxT=jnp.where(rollout.mask_BxT, rollout.tokens_BxT, noise)),
        prompt_BxP=jnp.where(batch.prompt_mask_BxP, batch.prompt_BxP, 11),
    )
    other, other_metrics = world.experience(mesh, dirty)
    np.testing.assert_allclose(exp.advantages_BxT, other.advantages_BxT, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], atol=1e-5, err_msg=name)


def test_gradients_stop_at_old_quantities(world, mesh, batch):
    """The loss moves with the parameters only through the new log-probs and values."""
    exp, _ = world.experience(mesh, batch)
    params, reference = world.fresh(mesh).params, world.reference(mesh)

    def loss(e):
        return ppo.loss(params, reference, e, jnp.float32(1), setup=world.setup)[0]

    grads = jax.jit(jax.grad(loss, allow_int=True))(exp)
    for name in ("log_probs_BxT", "values_BxT", "advantages_BxT", "returns_BxT"):
        np.testing.assert_array_equal(getattr(grads, name), 0, err_msg=name)


def all_responses(world, mesh, length, vocab):
    """Every response of ``length`` ids below ``vocab`` to one prompt, as a rollout batch."""
    strings = np.stack(np.meshgrid(*[np.arange(vocab)] * length, indexing="ij"), -1)
    strings = strings.reshape(-1, length).astype(np.int32)
    rows = len(strings)
    mask = np.ones((rows, length), bool)
    rollout = decode.Rollout(strings, mask, np.zeros(mask.shape, np.float32), np.ones(rows, bool))
    reward = np.random.default_rng(8).permutation(rows).astype(np.float32)
    prompt = np.full((rows, 1), 1, np.int32)
    return ScoredRollout(
        prompt, prompt >= 0, rollout, reward, np.zeros(rows, np.int32), temperature=0.8
    )


@pytest.mark.parametrize("objective", ["exact", "jensen_bound", "backward"])
@pytest.mark.parametrize("penalty", ["sampled", "full"])
def test_the_expected_gradient_is_that_of_the_objective(world, mesh, penalty, objective):
    """Over all strings of a closed world, the loss's expected gradient is -grad J, exactly.

    J is computed by enumeration from the parameters alone: E[R] - c KL(policy || ref) + w H, with R
    the estimated sequence reward of each string. Both penalties must give its gradient.
    """
    config = dataclasses.replace(world.config, vocab_size=4)
    params, reference = (
        {"decoder": jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(s))}
        for s in (1, 2)
    )
    params["value"] = {"head": heads.init_value(config, jax.random.key(0))}
    batch = all_responses(world, mesh, 3, 4)
    setup = tiny.changed(
        world.setup, config=config, objective=objective, penalty=penalty, whiten=False, lam=1.0,
        value_coef=0.0, estimator="smoothed",
    )  # fmt: skip
    n, table = jnp.float32(4.0), np.sort(batch.reward_B[::3])[None]
    references = bon_references.references(table, "smoothed")
    tokens = np.concatenate([batch.prompt_BxP, batch.rollout.tokens_BxT], axis=1)

    def log_probs(p):
        hidden = decoder.hidden(p["decoder"], config, tokens, np.ones_like(tokens, bool))[:, -4:-1]
        logits = decoder.logits(p["decoder"], config, hidden) / batch.temperature
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch.rollout.tokens_BxT[..., None], axis=-1
        )
        return chosen[..., 0].sum(axis=1)

    log_ref = log_probs(reference)
    below, equal = lf.reference_ranks(table, batch.reward_B[None])
    log_f, log_up_to = (lf.log_f(k[0], table.shape[1], "smoothed") for k in (below, below + equal))
    sequence_reward = distribution.sequence_reward(
        objective, n=n, log_f=log_f, log_mass=jnp.maximum(log_ref, jnp.log(equal[0] / table.size)),
        log_up_to=log_up_to,
    )  # fmt: skip
    c = distribution.kl_coefficient(objective, n)
    w = distribution.entropy_coefficient(objective, n)

    def objective_value(p):
        log_p = log_probs(p)
        gains = sequence_reward - c * (log_p - log_ref) - w * log_p
        return jnp.sum(jnp.exp(log_p) * gains)

    def expected_loss(p):
        exp, _ = tiny.experience(
            jax.lax.stop_gradient(p), reference, batch, references, n, jnp.float32(1.0),
            setup=setup,
        )  # fmt: skip
        weights = jax.lax.stop_gradient(jnp.exp(log_probs(p)))

        def one(row):
            single = jax.tree.map(lambda x: jnp.asarray(x)[row][None], exp)
            return ppo.loss(p, reference, single, jnp.float32(1), setup=setup)[0]

        return jnp.sum(weights * jax.vmap(one)(jnp.arange(len(tokens))))

    want = jax.jit(jax.grad(objective_value))(params)["decoder"]
    found = jax.jit(jax.grad(expected_loss))(params)["decoder"]
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    assert 1e-3 < scale < np.inf  # a NaN would equal itself
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, atol=2e-4 * scale), found, want)
