import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vbon_jax import sharding
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.models import decoder, heads
from vbon_jax.sampling import decode
from vbon_jax.training import ppo, state

HIDDEN = jax.jit(decoder.hidden, static_argnums=1)


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def experience(world, mesh, batch, params=None, references=None, **changes):
    fn = jax.jit(ppo.experience, static_argnames=("config", "plan"))
    return fn(
        world.fresh(mesh).params if params is None else params,
        world.reference(mesh), batch, world.references if references is None else references,
        jnp.float32(world.n), jnp.float32(0.1), config=world.config,
        plan=dataclasses.replace(world.plan, **changes),
    )  # fmt: skip


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
        logits = logits / world.plan.temperature
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
    exp, metrics = experience(world, mesh, batch, params, whiten=False)
    reference = world.reference(mesh)
    gamma, lam, n = world.plan.gamma, world.plan.lam, world.n
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
    tied = batch._replace(reward_B=jnp.float32(np.arange(world.batch_size) % 3 > 0))
    references = bon_references.references(table, "harmonic", order)
    _, metrics = experience(world, mesh, tied, references=references)
    own = np.asarray(lf.response_order(batch.rollout.tokens_BxT, batch.rollout.mask_BxT))
    ratios = []
    for row in range(world.batch_size):
        at, reward = int(batch.row_B[row]), float(tied.reward_B[row])
        before = (table[at] < reward) | ((table[at] == reward) & (order[at] < own[row]))
        log_ref, _ = twin_log_probs(world, world.reference(mesh), batch, row)
        ratios.append(twin_log_ratio(log_ref.sum(), before.sum(), table.shape[1], world.n))
    np.testing.assert_allclose(metrics["sequence_reward"], np.mean(ratios) / world.n, atol=1e-4)
    np.testing.assert_allclose(metrics["kl_bon"], -np.mean(ratios), atol=1e-4)
    _, at_random = experience(world, mesh, tied, references=references._replace(order_PxM=None))
    assert abs(float(at_random["kl_bon"]) + np.mean(ratios)) > 0.1


def test_the_fitted_curve_is_what_the_exponential_estimator_reads(world, mesh, batch):
    references = bon_references.references(world.table, "exponential")
    assert np.asarray(references.fit.converged_P).all()
    _, metrics = experience(
        world, mesh, batch, references=references, estimator="exponential", objective="lower_bound"
    )
    row, reward = np.asarray(batch.row_B), np.asarray(batch.reward_B, np.float64)
    log_a, b = (np.asarray(x, np.float64)[row] for x in references.fit[:2])
    want = (world.n - 1) / world.n * -np.exp(log_a - b * reward)
    np.testing.assert_allclose(metrics["sequence_reward"], want.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="needs a table with its fits"):
        experience(world, mesh, batch, estimator="exponential")


def test_rollout_log_probs_are_those_of_the_update(world, mesh, batch):
    _, metrics = experience(world, mesh, batch)
    assert float(metrics["rollout_log_prob_error"]) < 1e-5


def test_the_policy_that_is_its_reference_has_no_kl(world, mesh, batch):
    _, metrics = experience(world, mesh, batch)
    assert float(metrics["kl_ref"]) == 0
    assert float(metrics["kl_ref_k1"]) == 0


def test_the_ratio_is_one_before_the_first_step(world, mesh, batch):
    exp, _ = experience(world, mesh, batch)
    info = jax.jit(ppo.loss, static_argnames=("config", "plan"))(
        world.fresh(mesh).params, world.reference(mesh), exp, jnp.float32(1), config=world.config,
        plan=world.plan,
    )[1]  # fmt: skip
    assert float(info["approx_kl"]) < 1e-10
    assert float(info["policy_clip_fraction"]) == 0
    assert float(info["value_clip_fraction"]) == 0


def test_padding_of_the_rollout_does_not_matter(world, mesh, batch):
    exp, metrics = experience(world, mesh, batch)
    rollout = batch.rollout
    noise = jax.random.randint(jax.random.key(4), rollout.tokens_BxT.shape, 0, 37)
    dirty = batch._replace(
        rollout=rollout._replace(tokens_BxT=jnp.where(rollout.mask_BxT, rollout.tokens_BxT, noise)),
        prompt_BxP=jnp.where(batch.prompt_mask_BxP, batch.prompt_BxP, 11),
    )
    other, other_metrics = experience(world, mesh, dirty)
    np.testing.assert_allclose(exp.advantages_BxT, other.advantages_BxT, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("objective", distribution.OBJECTIVES)
def test_an_update_improves_its_own_surrogate(world, mesh, batch, objective):
    exp, _ = experience(world, mesh, batch, objective=objective)
    new, metrics = world.iterate(mesh, world.fresh(mesh), batch, objective=objective)
    loss = jax.jit(ppo.loss, static_argnames=("config", "plan"))
    before, after = (
        loss(
            params,
            world.reference(mesh),
            exp,
            jnp.float32(exp.response_mask_BxT.sum()),
            config=world.config,
            plan=world.plan,
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
        _, metrics = world.iterate(mesh, world.fresh(mesh), batch, n=n)
        rewards.append(float(metrics["sequence_reward"]))
        sizes.append(ppo.iteration._cache_size())
    assert sizes[0] == sizes[1]
    assert rewards[0] != rewards[1]


def test_the_state_is_donated(world, mesh, batch):
    train_state = world.fresh(mesh)
    leaf = train_state.params["decoder"]["wte"]
    world.iterate(mesh, train_state, batch)
    assert leaf.is_deleted()


def test_gradients_stop_at_old_quantities(world, mesh, batch):
    """The loss moves with the parameters only through the new log-probs and values."""
    exp, _ = experience(world, mesh, batch)
    params, reference = world.fresh(mesh).params, world.reference(mesh)

    def loss(e):
        return ppo.loss(params, reference, e, jnp.float32(1), config=world.config, plan=world.plan)[
            0
        ]

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
    return ppo.RolloutBatch(prompt, prompt >= 0, rollout, reward, np.zeros(rows, np.int32))


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
    plan = dataclasses.replace(
        world.plan, objective=objective, penalty=penalty, whiten=False, lam=1.0, value_coef=0.0,
        estimator="smoothed", temperature=0.8,
    )  # fmt: skip
    n, table = jnp.float32(4.0), np.sort(batch.reward_B[::3])[None]
    references = bon_references.references(table, "smoothed")
    tokens = np.concatenate([batch.prompt_BxP, batch.rollout.tokens_BxT], axis=1)

    def log_probs(p):
        hidden = decoder.hidden(p["decoder"], config, tokens, np.ones_like(tokens, bool))[:, -4:-1]
        logits = decoder.logits(p["decoder"], config, hidden) / plan.temperature
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
        exp, _ = ppo.experience(
            jax.lax.stop_gradient(p), reference, batch, references, n, jnp.float32(1.0),
            config=config, plan=plan,
        )  # fmt: skip
        weights = jax.lax.stop_gradient(jnp.exp(log_probs(p)))

        def one(row):
            single = jax.tree.map(lambda x: jnp.asarray(x)[row][None], exp)
            return ppo.loss(p, reference, single, jnp.float32(1), config=config, plan=plan)[0]

        return jnp.sum(weights * jax.vmap(one)(jnp.arange(len(tokens))))

    want = jax.jit(jax.grad(objective_value))(params)["decoder"]
    found = jax.jit(jax.grad(expected_loss))(params)["decoder"]
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    assert 1e-3 < scale < np.inf  # a NaN would equal itself
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, atol=2e-4 * scale), found, want)


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
    minibatch = world.plan.minibatch_size
    assert shapes
    assert not [s for s in shapes if s[0] == minibatch * tokens]
    assert [s for s in shapes if s[0] == tokens]  # 8 rows on 8 devices: one each


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_sharded_equals_one_device(world, mesh, shape):
    """Sampling and one PPO update under a mesh give what one device gives."""
    many = sharding.make_mesh(*shape)
    results = []
    for m in (mesh, many):
        with jax.set_mesh(m):
            train_state = world.fresh(m)
            batch = world.rollout_batch(m, train_state)
            new, metrics = world.iterate(m, train_state, batch)
            results.append(jax.device_get((batch.rollout, new.params, metrics)))
            # The table still holds after the update, so the next call finds the program compiled.
            jax.tree.map(lambda x, s: assert_sharded(x, s), new, sharding.shardings(new, m))
            new, _ = world.iterate(m, new, batch)
            size = ppo.iteration._cache_size()
            world.iterate(m, new, batch)
            assert ppo.iteration._cache_size() == size
    (rollout, params, metrics), (rollout_many, params_many, metrics_many) = results
    np.testing.assert_array_equal(rollout.tokens_BxT, rollout_many.tokens_BxT)
    np.testing.assert_allclose(rollout.log_probs_BxT, rollout_many.log_probs_BxT, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, params_many)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_many[name], atol=2e-3, err_msg=name)


def test_decay_spares_norms_and_biases():
    params = {"wte": 1.0, "blocks": {"mlp": {"kernel": 1.0, "bias": 1.0}}, "ln_f": {"scale": 1.0}}
    params = jax.tree.map(jnp.float32, params)
    optimizer = state.adamw(optax.constant_schedule(1.0), 1e-8, 0.1, 1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {
        sharding.path_of(path)
        for path, u in jax.tree_util.tree_leaves_with_path(updates)
        if float(u) != 0
    }
    assert moved == {"wte", "blocks/mlp/kernel"}
