"""An update of Algorithm 1: against a slow twin, on its own objective, on several devices."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import tiny
from vbon_jax import sharding
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.methods import vbon
from vbon_jax.models import decoder, heads
from vbon_jax.rl import prefix
from vbon_jax.training import state

HIDDEN = jax.jit(decoder.hidden, static_argnums=1)


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def twin_log_probs(world, params, batch, row):
    """Log-probs and values of one response, one token at a time, without padding or cache."""
    prompt = np.asarray(batch.prompt_BxP[row])[np.asarray(batch.prompt_mask_BxP[row])]
    response = np.asarray(batch.rollout.tokens_BxT[row])[np.asarray(batch.rollout.mask_BxT[row])]
    log_probs, values = [], []
    for t in range(len(response)):
        tokens = np.concatenate([prompt, response[:t]])[None]
        padded = np.zeros((1, 16), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        mask = np.arange(16)[None] < tokens.shape[1]
        hidden = HIDDEN(params["decoder"], world.config, padded, mask)[:, tokens.shape[1] - 1]
        logits = np.asarray(decoder.logits(params["decoder"], world.config, hidden), np.float64)[0]
        logits = logits / batch.temperature
        log_probs.append(logits[response[t]] - np.log(np.sum(np.exp(logits))))
        values.append(
            float(heads.value(params["value"]["head"], hidden)[0]) if "value" in params else 0.0
        )
    return np.array(log_probs), np.array(values)


def twin_log_ratio(log_mass, k, m, n):
    """Formula (1) with the harmonic estimate of log F, in float64."""
    log_f = sum(1 / i for i in range(1, k + 1)) - sum(1 / i for i in range(1, m + 1))
    f, g = np.exp(log_f), np.exp(log_mass)
    f = min(f, 1 - g)
    # g is far below float64's rounding of F here, where the ratio tends to n F^(n-1).
    return np.log(n) + (n - 1) * np.log(f) if g < 1e-12 else np.log(((f + g) ** n - f**n) / g)


def test_experience_equals_a_slow_twin(world, mesh, batch):
    # A policy that is not its reference, so that the KL penalty is seen.
    params = jax.tree.map(lambda x: x * 1.1, world.fresh(mesh).params)
    exp, metrics = world.experience(mesh, batch, params, whiten=False)
    reference = world.reference(mesh)
    gamma, lam, n = world.setup.train.gamma, world.setup.train.lam, world.n
    totals, ratios = [], []
    for row in range(world.batch_size):
        keep = np.asarray(exp.response_mask_BxT[row])
        log_policy, values = twin_log_probs(world, params, batch, row)
        log_ref, _ = twin_log_probs(world, reference, batch, row)
        np.testing.assert_allclose(np.asarray(exp.log_probs_BxT[row])[keep], log_policy, atol=1e-5)
        np.testing.assert_allclose(np.asarray(exp.values_BxT[row])[keep], values, atol=1e-5)
        references = world.table[int(batch.row_B[row])]
        below = np.sum(references < float(batch.reward_B[row]))
        ratio = twin_log_ratio(log_ref.sum(), below, len(references), n)
        rewards = -(log_policy - log_ref) / n
        rewards[-1] += ratio / n
        advantage, following, advantages = 0.0, 0.0, []
        for r, v in zip(rewards[::-1], values[::-1]):
            advantage = r + gamma * following - v + gamma * lam * advantage
            following = v
            advantages.append(advantage)
        np.testing.assert_allclose(
            np.asarray(exp.advantages_BxT[row])[keep], advantages[::-1], atol=2e-5
        )
        np.testing.assert_allclose(
            np.asarray(exp.returns_BxT[row])[keep], np.array(advantages[::-1]) + values, atol=2e-5
        )
        totals.append(rewards.sum())
        ratios.append(ratio)
    np.testing.assert_allclose(metrics["objective"], np.mean(totals), atol=1e-4)
    np.testing.assert_allclose(metrics["kl_bon"], metrics["kl_ref"] - np.mean(ratios), atol=1e-4)
    assert float(metrics["eos_rate"]) + float(metrics["truncation_rate"]) == pytest.approx(1)


def test_ties_broken_by_order_are_those_of_a_slow_twin(world, mesh, batch):
    """Rewards of two values: F counts what comes before in the order, g is pi_ref (App. C)."""
    rng = np.random.default_rng(3)
    table = (world.table > 2).astype(np.float32)
    order = rng.integers(0, 2**32, size=table.shape, dtype=np.uint32)
    tied = dataclasses.replace(batch, reward_B=jnp.float32(np.arange(world.batch_size) % 3 > 0))
    references = bon_references.references(table, "harmonic", order)
    _, metrics = world.experience(mesh, tied, references=references)
    own = np.asarray(lf.response_order(batch.rollout.tokens_BxT, batch.rollout.mask_BxT))
    ratios = []
    for row in range(world.batch_size):
        at, reward = int(batch.row_B[row]), float(tied.reward_B[row])
        before = (table[at] < reward) | ((table[at] == reward) & (order[at] < own[row]))
        log_ref, _ = twin_log_probs(world, world.reference(mesh), batch, row)
        ratios.append(twin_log_ratio(log_ref.sum(), before.sum(), table.shape[1], world.n))
    np.testing.assert_allclose(metrics["sequence_reward"], np.mean(ratios) / world.n, atol=1e-4)
    np.testing.assert_allclose(metrics["kl_bon"], -np.mean(ratios), atol=1e-4)
    _, at_random = world.experience(mesh, tied, references=references._replace(order_PxM=None))
    assert abs(float(at_random["kl_bon"]) + np.mean(ratios)) > 0.1


def test_the_fitted_curve_is_what_the_exponential_estimator_reads(world, mesh, batch):
    references = bon_references.references(world.table, "exponential")
    assert np.asarray(references.fit.converged_P).all()
    _, metrics = world.experience(
        mesh, batch, references=references, estimator="exponential", objective="lower_bound"
    )
    row, reward = np.asarray(batch.row_B), np.asarray(batch.reward_B, np.float64)
    log_a, b = (np.asarray(x, np.float64)[row] for x in references.fit[:2])
    want = (world.n - 1) / world.n * -np.exp(log_a - b * reward)
    np.testing.assert_allclose(metrics["sequence_reward"], want.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="needs a table with its fits"):
        world.experience(mesh, batch, estimator="exponential")


@pytest.mark.parametrize("objective", distribution.OBJECTIVES)
def test_an_update_improves_its_own_surrogate(world, mesh, batch, objective):
    exp, _ = world.experience(mesh, batch, objective=objective)
    new, metrics = world.update(mesh, world.fresh(mesh), batch, objective=objective)
    before, after = (
        tiny.loss(
            params,
            world.reference(mesh),
            exp,
            jnp.float32(exp.response_mask_BxT.sum()),
            setup=world.setup,
        )[1]["policy_loss"]
        for params in (world.fresh(mesh).params, new.params)
    )
    assert float(before) == pytest.approx(0, abs=1e-6)  # advantages are whitened
    assert float(after) < -0.01
    assert int(new.step) == 1
    assert all(np.isfinite(float(v)) for v in metrics.values())


def test_n_and_beta_are_data(world, mesh, batch):
    """Another n needs no compile and changes the reward."""
    sizes, rewards = [], []
    for n in (2.0, 64.0):
        _, metrics = world.update(mesh, world.fresh(mesh), batch, n=n)
        rewards.append(float(metrics["sequence_reward"]))
        sizes.append(vbon.update._cache_size())
    assert sizes[0] == sizes[1]
    assert rewards[0] != rewards[1]


def test_the_state_is_donated(world, mesh, batch):
    train_state = world.fresh(mesh)
    leaf = train_state.params["decoder"]["wte"]
    world.update(mesh, train_state, batch)
    assert leaf.is_deleted()


def assert_sharded(x, wanted):
    assert x.sharding.is_equivalent_to(wanted, x.ndim), (x.shape, x.sharding, wanted)


def test_devices_share_a_minibatch(world):
    """Over 8 devices, no matrix product has all rows of a minibatch."""
    many = sharding.make_mesh(8)
    with jax.set_mesh(many):
        train_state = world.fresh(many)
        batch = world.rollout_batch(many, train_state)
        text = world.lower(many, train_state, batch).compile().as_text()
    tokens = batch.prompt_BxP.shape[1] + 6
    shapes = [
        tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
    ]
    minibatch = world.setup.train.minibatch_size
    assert shapes
    assert not [s for s in shapes if s[0] == minibatch * tokens]
    assert [s for s in shapes if s[0] == tokens]  # 8 rows on 8 devices: one each


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_sharded_equals_one_device(world, mesh, shape):
    """Sampling and one PPO update under a mesh give what one device gives."""
    many = sharding.make_mesh(*shape)
    results = []
    for m in (mesh, many):
        with jax.set_mesh(m):
            train_state = world.fresh(m)
            batch = world.rollout_batch(m, train_state)
            new, metrics = world.update(m, train_state, batch)
            results.append(jax.device_get((batch.rollout, new.params, metrics)))
            # The table still holds after the update, so the next call finds the program compiled.
            jax.tree.map(lambda x, s: assert_sharded(x, s), new, sharding.shardings(new, m))
            new, _ = world.update(m, new, batch)
            size = vbon.update._cache_size()
            world.update(m, new, batch)
            assert vbon.update._cache_size() == size
    (rollout, params, metrics), (rollout_many, params_many, metrics_many) = results
    np.testing.assert_array_equal(rollout.tokens_BxT, rollout_many.tokens_BxT)
    np.testing.assert_allclose(rollout.log_probs_BxT, rollout_many.log_probs_BxT, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, params_many)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_many[name], atol=2e-3, err_msg=name)


def test_stored_samples_and_muon_on_several_devices(world, mesh):
    """Rows beside a rollout, and orthogonalised momentum of sharded matrices."""
    own = copy.copy(world)
    own.optimizer = state.muon(optax.constant_schedule(1e-2), 1e-4, 0.0, 1.0)
    own.setup = dataclasses.replace(
        tiny.changed(world.setup, replay=1, objective="jeffreys", penalty="response"),
        optimizer=own.optimizer,
    )
    results = []
    for m in (mesh, sharding.make_mesh(2, 2, 2)):
        with jax.set_mesh(m):
            first = own.fresh(m)
            batch = own.rollout_batch(m, first)
            stored = own.rollout_batch(m, first, step=1)
            stored = dataclasses.replace(stored, reward_B=stored.reward_B + 0.25)
            new, metrics = own.update(m, first, dataclasses.replace(batch, stored=stored))
            jax.tree.map(lambda x, s: assert_sharded(x, s), new, sharding.shardings(new, m))
            results.append(jax.device_get((new.params, metrics)))
    (params, metrics), (params_many, metrics_many) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, params_many)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_many[name], atol=2e-3, err_msg=name)


def test_values_of_prefixes_are_a_baseline_that_learns_from_each_rollout(world, mesh, batch):
    fresh = world.fresh(mesh)
    rng = np.random.default_rng(5)
    shape = batch.rollout.mask_BxT.shape
    of_prefixes = np.sort(rng.normal(2, 1, shape).astype(np.float32), axis=1)
    with_prefixes = dataclasses.replace(batch, prefix_reward_BxT=of_prefixes)
    ranks = np.asarray(vbon.prefix_ranks(world.references, with_prefixes))
    row, t = 3, shape[1] - 1
    rewards = world.table[int(batch.row_B[row])]
    np.testing.assert_allclose(ranks[row, t], np.mean(rewards < of_prefixes[row, t]), atol=1e-6)

    changes = {"value_network": "prefix", "whiten": False}
    exp, _ = world.experience(mesh, batch, {"decoder": fresh.params["decoder"]}, **changes)
    table = prefix.empty()
    params = {"decoder": fresh.params["decoder"], "prefix": prefix.empty()}
    optimizer = world.optimizer.init({"decoder": fresh.params["decoder"]})
    first = fresh._replace(params=params, opt_state=optimizer)
    state, _ = world.update(mesh, first, with_prefixes, **changes)
    # Without values the returns are the sums of the rewards to come, and the advantages theirs.
    learned = prefix.updated(table, ranks, exp.returns_BxT, exp.response_mask_BxT, vbon.KEEP)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params["prefix"], learned
    )
    assert set(state.params) == {"decoder", "prefix"}
    # The next baseline is what was learned; a prefix's own reward says nothing here.
    values = prefix.values(learned, ranks)
    assert np.ptp(values) > 0
    _, again = world.update(mesh, state, with_prefixes, **changes)
    tokens = exp.response_mask_BxT.sum()
    shown = jnp.sum(jnp.where(exp.response_mask_BxT, values, 0)) / tokens
    np.testing.assert_allclose(again["value_mean"], shown, rtol=1e-4)
