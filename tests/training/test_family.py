"""Rows of several n in one update: each is learned from as its own policy would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax import sharding
from vbon_jax.models import family, trainable
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import ppo
from vbon_jax.training.learner import Member

TOP = 16.0
N_G = np.array([2.0, 16.0, 5.0, 3.0, 9.0, 2.5, 12.0, 4.0], np.float32)  # of pairs of rows
EACH = tiny.BATCH // len(N_G)


@pytest.fixture(scope="module")
def own(world):
    """A family away from its start."""
    what = trainable.Trainable(rank=3, targets=("q", "down"))
    tree = family.gated(trainable.start(world._host, what, jax.random.key(3)), world.config.width)
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return treedef.unflatten(
        [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def batch(world, mesh, own):
    base = world.reference(mesh)["decoder"]
    policy = trainable.join(base, family.opened(own, jnp.asarray(N_G), TOP))
    drawn = world.draw(mesh, policy)
    rewards = tiny.token_reward(None, *drawn.prompts, *drawn.rollout[:2])
    rows = np.arange(tiny.BATCH, dtype=np.int32) // 2
    placed = sharding.place((rewards, rows), mesh, "batch")
    n_B = sharding.place(np.repeat(N_G, EACH), mesh, "batch")
    return ScoredRollout(*drawn.prompts, drawn.rollout, *placed, drawn.temperature, n_B=n_B)


def settings(world, **changes):
    return tiny.changed(world.setup, top=TOP, group=EACH, whiten=False, **changes)


def experience(world, mesh, own, batch, n, setup):
    params = {"decoder": own, "value": world.fresh(mesh).params["value"]}
    return tiny.experience(
        params, world.reference(mesh), batch, world.references, jnp.asarray(n, jnp.float32),
        jnp.float32(0.1), setup=setup,
    )  # fmt: skip


def test_responses_are_drawn_from_the_policy_of_their_n(world, mesh, own, batch):
    """The decode loop's log-probs of a row are those of its own n, not of another."""
    found, metrics = experience(world, mesh, own, batch, batch.n_B, settings(world))
    assert float(metrics["rollout_log_prob_error"]) < 1e-5
    mixed = dataclasses.replace(batch, n_B=jnp.flip(batch.n_B))
    _, metrics = experience(world, mesh, own, mixed, mixed.n_B, settings(world))
    assert float(metrics["rollout_log_prob_error"]) > 1e-2
    assert found.n_B is not None


@pytest.mark.parametrize("penalty", ["sampled", "full"])
def test_each_row_is_scored_as_its_own_policy_scores_it(world, mesh, own, batch, penalty):
    """Advantages, returns and penalties by n: those of a batch in which all rows have it."""
    setup = settings(world, penalty=penalty)
    together, _ = experience(world, mesh, own, batch, batch.n_B, setup)
    plain = dataclasses.replace(batch, n_B=None)
    for g in (0, 1, 4):
        fixed = family.fixed(own, N_G[g], TOP)
        alone, _ = experience(world, mesh, fixed, plain, N_G[g], setup)
        rows = slice(EACH * g, EACH * (g + 1))
        for name in ("log_probs_BxT", "values_BxT", "advantages_BxT", "returns_BxT", "kl_weight_B"):
            a, b = getattr(together, name), getattr(alone, name)
            np.testing.assert_allclose(a[rows], b[rows], atol=2e-5, err_msg=name)
    assert len(np.unique(np.asarray(together.advantages_BxT[:, 0]))) == tiny.BATCH


def test_the_gradient_is_the_sum_of_those_of_each_n(world, mesh, own, batch):
    """Of A, B and gates, over minibatches whose rows were shuffled and split."""
    setup = settings(world, minibatch_size=tiny.BATCH, accumulate=2)
    exp, _ = experience(world, mesh, own, batch, batch.n_B, setup)
    value = world.fresh(mesh).params["value"]
    reference = world.reference(mesh)
    order = np.random.default_rng(0).permutation(len(N_G))
    rows = (order[:, None] * EACH + np.arange(EACH)).reshape(-1)
    shuffled = jax.tree.map(lambda x: x[rows], exp)
    found = tiny.gradients({"decoder": own, "value": value}, reference, shuffled, setup=setup)[0]

    count = jnp.sum(exp.response_mask_BxT).astype(jnp.float32)

    @jax.jit
    def of(own, n, rows):
        params = {"decoder": family.fixed(own, n, TOP), "value": value}
        return ppo.loss(params, reference, rows, count, setup=setup)[0]

    total = jax.tree.map(jnp.zeros_like, own)
    for g, n in enumerate(N_G):
        one = jax.tree.map(lambda x, g=g: x[EACH * g : EACH * (g + 1)], exp)
        one = dataclasses.replace(one, n_B=None)
        total = jax.tree.map(jnp.add, total, jax.grad(of)(own, n, one))
    for a, b in zip(jax.tree.leaves(found["decoder"]), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert float(jnp.max(jnp.abs(b))) > 1e-4


def test_n_is_spread_over_the_groups_of_an_iteration():
    member = Member(64.0, 0.1, seed=5, m=8, low=2.0)
    drawn = [member.n_of(step, 16) for step in range(40)]
    for n in drawn:  # one in each sixteenth of [log 2, log 64], whichever group has it
        at = np.log(n / 2) / np.log(32) * 16
        np.testing.assert_array_equal(np.sort(np.floor(at)), np.arange(16))
    np.testing.assert_array_equal(drawn[3], member.n_of(3, 16))
    assert len({float(n[0]) for n in drawn}) == 40
    assert Member(8.0, 0.1, 5, 8).n_of(0, 4) is None
