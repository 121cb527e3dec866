"""The gradient steps of an update: the losses, their gradients, the passes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import tiny
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.models import decoder, heads
from vbon_jax.rl import prefix
from vbon_jax.sampling import decode
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import ppo


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def test_the_ratio_is_one_before_the_first_step(world, mesh, batch):
    exp, _ = world.experience(mesh, batch)
    info = tiny.loss(
        world.fresh(mesh).params, world.reference(mesh), exp, jnp.float32(1), setup=world.setup
    )[1]
    assert float(info["approx_kl"]) < 1e-10
    assert float(info["policy_clip_fraction"]) == 0
    assert float(info["value_clip_fraction"]) == 0


def test_gradients_stop_at_old_quantities(world, mesh, batch):
    """The loss moves with the parameters only through the new log-probs and values."""
    exp, _ = world.experience(mesh, batch)
    params, reference = world.fresh(mesh).params, world.reference(mesh)

    def loss(e):
        return ppo.loss(params, reference, e, jnp.float32(1), setup=world.setup)[0]

    grads = jax.jit(jax.grad(loss, allow_int=True))(exp)
    for name in ("log_probs_BxT", "values_BxT", "advantages_BxT", "returns_BxT"):
        np.testing.assert_array_equal(getattr(grads, name), 0, err_msg=name)


def test_the_group_baseline_reaches_the_experience_and_teaches_no_values(world, mesh, batch):
    exp, _ = world.experience(mesh, batch, baseline="group", group=2, whiten=False)
    first = np.asarray(exp.advantages_BxT[:, 0])  # a whole return less that of the only other
    np.testing.assert_allclose(first[::2], -first[1::2], atol=1e-5)
    assert np.median(np.abs(first)) > 1e-2
    for baseline in ("group", "both"):
        setup = tiny.changed(world.setup, baseline=baseline, group=2)
        grads = tiny.gradients(world.fresh(mesh).params, world.reference(mesh), exp, setup=setup)[0]
        assert (float(optax.tree.norm(grads["value"])) == 0) == (baseline == "group")
        assert float(optax.tree.norm(grads["decoder"])) > 0


passes = jax.jit(ppo.epochs, static_argnames="setup")


def test_passes_over_a_rollout_end_beyond_the_kl_target(world, mesh, batch):
    """One pass of three is done, and the weights are those of one pass that was asked for."""
    exp, _ = world.experience(mesh, batch)

    def updated(**changes):
        setup = tiny.changed(world.setup, **changes)
        state, metrics = passes(world.fresh(mesh), world.reference(mesh), exp, setup=setup)
        counts = [int(x) for _, x in optax.tree.get_all_with_path(state.opt_state, "count")]
        return state, {k: float(x) for k, x in metrics.items()}, sorted(counts)

    one, of_one, _ = updated(ppo_epochs=1)
    cut, of_cut, at_cut = updated(ppo_epochs=3, kl_target=of_one["kl_rollout"] / 2)
    jax.tree.map(np.testing.assert_array_equal, cut.params, one.params)
    assert of_cut == pytest.approx(of_one, rel=1e-6) and of_cut["epochs"] == 1
    far, of_far, at_far = updated(ppo_epochs=3, kl_target=100.0)
    assert of_far["epochs"] == 3 and 0 < of_one["kl_rollout"] < of_far["kl_rollout"] < 100
    assert float(jnp.max(jnp.abs(far.params["decoder"]["wte"] - cut.params["decoder"]["wte"]))) > 0
    # Adam has seen the steps that were done; the learning rate is where three passes put it.
    assert (at_cut, at_far) == ([2, 6], [6, 6])


def test_members_of_a_population_end_their_passes_each_for_itself(world, mesh, batch):
    """Side by side, as `vmap` computes them: one goes on where the other has ended."""
    exp, _ = world.experience(mesh, batch)
    still = dataclasses.replace(exp, advantages_BxT=jnp.zeros_like(exp.advantages_BxT))
    setup = tiny.changed(world.setup, ppo_epochs=3, kl_target=1e-4, value_coef=0.0)
    fresh, reference = world.fresh(mesh), world.reference(mesh)
    both = jax.tree.map(lambda *x: jnp.stack(x), exp, still)
    state, metrics = jax.jit(jax.vmap(lambda e: ppo.epochs(fresh, reference, e, setup)))(both)
    assert metrics["epochs"].tolist() == [1, 3]
    for k, e in enumerate((exp, still)):
        alone, of_alone = passes(fresh, reference, e, setup=setup)
        for name, x in of_alone.items():
            np.testing.assert_allclose(metrics[name][k], x, atol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a[k], b, atol=1e-4)


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


def looked_ahead(batch, params, config, count):
    """The batch with rewards of prefixes and of next tokens: any function of the prefix."""
    rng = np.random.default_rng(4)
    (rows, length), prompt = batch.rollout.tokens_BxT.shape, batch.prompt_BxP
    tokens = np.concatenate([prompt, batch.rollout.tokens_BxT], axis=1)
    at = np.tril(np.ones((length, length), int), -1) * 4 ** np.arange(length)
    prefixes = batch.rollout.tokens_BxT @ at.T + 4**length * np.arange(length)

    def of_prefixes(*shape):
        return rng.normal(rows / 2, rows / 4, (length * 4**length, *shape))[prefixes]

    hidden = decoder.hidden(params["decoder"], config, tokens, np.ones_like(tokens, bool))
    logits = decoder.logits(params["decoder"], config, hidden[:, -length - 1 : -1])
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(logits / batch.temperature), count)
    end = jnp.asarray(of_prefixes(count) > 0.7 * rows)
    return dataclasses.replace(
        batch,
        rollout=batch.rollout._replace(likeliest=decode.Likeliest(ids, log_p, end)),
        prefix_reward_BxT=of_prefixes().astype(np.float32),
        candidate_reward_BxTxK=of_prefixes(count).astype(np.float32),
    )


@pytest.mark.parametrize(
    "objective, penalty, candidates, replay",
    [
        *itertools.product(["exact", "jensen_bound", "backward"], ["sampled", "full"], [0], [0]),
        ("exact", "full", 2, 0), ("jensen_bound", "full", 2, 0), ("exact", "sampled", 2, 0),
        ("exact", "response", 0, 0), ("jensen_bound", "response", 0, 0),
        ("exact", "full", 0, 1), ("jensen_bound", "response", 0, 1), ("exact", "sampled", 0, 3),
        ("jeffreys", "full", 0, 1), ("jeffreys", "response", 0, 3),
    ],
)  # fmt: skip
def test_the_expected_gradient_is_that_of_the_objective(
    world, mesh, penalty, candidates, replay, objective
):
    """Over all strings of a closed world, the loss's expected gradient is -grad J, exactly.

    J is computed by enumeration from the parameters alone: E[R] - c KL(policy || ref) + w H, with R
    the estimated sequence reward of each string. All penalties must give its gradient; so must a
    sum over next tokens, whatever their values are, and stored samples of the reference, with their
    weights, beside the policy's own. Of "jeffreys", J has the forward KL as well.
    """
    config = dataclasses.replace(world.config, vocab_size=4)
    params, reference = (
        {"decoder": jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(s))}
        for s in (1, 2)
    )
    params["value"] = {"head": heads.init_value(config, jax.random.key(0))}
    batch = all_responses(world, mesh, 3, 4)
    if candidates:
        batch = looked_ahead(batch, params, config, candidates)
        table = np.random.default_rng(6).normal(size=(2, prefix.POSITIONS, prefix.RANKS))
        params["prefix"] = prefix.Table(*jnp.float32([table[0], 1 + table[1] ** 2]))
    setup = tiny.changed(
        world.setup, config=config, objective=objective, penalty=penalty, whiten=False, lam=1.0,
        value_coef=0.0, estimator="smoothed", replay=replay,
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
        likelihood = jnp.sum(jnp.exp(log_ref + n * sequence_reward) * log_p) / n
        both = objective == "jeffreys"
        return jnp.sum(jnp.exp(log_p) * gains) + (likelihood if both else 0.0)

    # Every string as a response of the policy, then ``replay`` times as one of the reference.
    whole = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * (1 + replay)), batch)

    def expected_loss(p):
        exp, _ = tiny.experience(
            jax.lax.stop_gradient(p), reference, whole, references, n, jnp.float32(1.0),
            setup=setup,
        )  # fmt: skip
        weights = jnp.exp(jnp.concatenate([log_probs(p), *[log_ref] * replay])) / (1 + replay)

        def one(row):
            single = jax.tree.map(lambda x: jnp.asarray(x)[row][None], exp)
            return ppo.loss(p, reference, single, jnp.float32(1), setup=setup)[0]

        losses = jax.vmap(one)(jnp.arange(len(weights)))
        return jnp.sum(jax.lax.stop_gradient(weights) * losses)

    want = jax.jit(jax.grad(objective_value))(params)["decoder"]
    found = jax.jit(jax.grad(expected_loss))(params)["decoder"]
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    assert 1e-3 < scale < np.inf  # a NaN would equal itself
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, atol=2e-4 * scale), found, want)
