"""What is trained, and how much is held at once, changes what a step costs, not what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.methods import learning, vbon
from vbon_jax.models import decoder, heads, trainable
from vbon_jax.models.trainable import Trainable
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import lengths, scoring, state
from vbon_jax.training.options import Lora, Train

TOP, LORA, WHOLE = Trainable(1), Trainable(rank=2, targets=("q", "out", "down")), Trainable()


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def parts(world, mesh, what):
    """The reference as ``what`` wants it, and a policy that is not quite it."""
    base = trainable.divide(world.reference(mesh)["decoder"], what, world.config.layers)
    own = trainable.start(base, what, jax.random.key(3))
    leaves, tree = jax.tree.flatten(own)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    own = tree.unflatten(
        [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    return {"decoder": base}, {"decoder": own, "value": world.fresh(mesh).params["value"]}


def experience(world, reference, params, batch, setup):
    return tiny.experience(
        params, reference, batch, world.references, jnp.float32(world.n), jnp.float32(0.1),
        setup=setup,
    )  # fmt: skip


def close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("penalty", ["sampled", "full"])
@pytest.mark.parametrize("what", [TOP, LORA], ids=["top", "lora"])
def test_results_are_those_of_the_unshared_computation(world, mesh, batch, what, penalty):
    """Experience, loss and gradient equal those of policy and reference as two whole models."""
    setup = tiny.changed(world.setup, penalty=penalty)
    reference, params = parts(world, mesh, what)
    exp, metrics = experience(world, reference, params, batch, setup)
    whole_ref = {"decoder": trainable.merged(reference["decoder"])}
    policy = trainable.merged(
        trainable.join(reference["decoder"], params["decoder"]), world.config.lora_alpha
    )
    whole = params | {"decoder": policy}
    expected, expected_metrics = experience(world, whole_ref, whole, batch, setup)
    assert (exp.trunk_BxSxD is not None) == (what is TOP)
    close(dataclasses.replace(exp, trunk_BxSxD=None), expected, 1e-4)
    close(metrics, expected_metrics, 1e-3)
    assert float(metrics["kl_ref"]) > 1e-3  # a policy that is its reference would show nothing

    rows = jax.tree.map(lambda x: x[:8], exp)
    grads, info = tiny.gradients(params, reference, rows, setup)
    whole_rows = dataclasses.replace(rows, trunk_BxSxD=None)
    whole_grads, whole_info = tiny.gradients(whole, whole_ref, whole_rows, setup)
    close(info, whole_info, 1e-4)
    if what is TOP:
        top = jax.tree.map(lambda x: x[-1:], whole_grads["decoder"]["blocks"])
        close(grads["decoder"], {"blocks": top, "ln_f": whole_grads["decoder"]["ln_f"]}, 1e-4)
    close(grads["value"], whole_grads["value"], 1e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["decoder"])) > 1e-3


def test_epochs_do_not_run_the_trunk(world, mesh, batch):
    """With a broken trunk the loss is what it was: activations come from the rollout's one pass."""
    reference, params = parts(world, mesh, TOP)
    setup = tiny.changed(world.setup, penalty="full")
    exp, _ = experience(world, reference, params, batch, setup)
    base = reference["decoder"]
    broken = jax.tree.map(lambda x: x * jnp.nan, base["blocks"][0])
    without = {
        "decoder": base | {"blocks": (broken, base["blocks"][1]), "wpe": base["wpe"] * jnp.nan}
    }
    found = tiny.gradients(params, without, exp, setup)
    close(found, tiny.gradients(params, reference, exp, setup), 0)
    assert np.isfinite(float(found[1]["loss"]))
    # Not so without them.
    exp = dataclasses.replace(exp, trunk_BxSxD=None)
    assert np.isnan(float(tiny.gradients(params, without, exp, setup)[1]["loss"]))


@pytest.mark.parametrize("columns", [1, 8])
def test_a_rollout_tells_what_its_frozen_trunk_made_of_it(world, mesh, columns):
    """As the whole forward makes it, wherever a prediction depends on it; score runs it no more."""
    reference, params = parts(world, mesh, TOP)
    base = reference["decoder"]
    policy = tiny.sampler(
        world.config, trainable.join(base, params["decoder"]), mesh, temperature=tiny.TEMPERATURE,
        max_new_tokens=tiny.T, end_ids=(3,), pad_id=0, trunk_layers=world.config.layers - 1,
    )  # fmt: skip
    requests = [Request(p.id, s, p.tokens[-columns:]) for p in world.prompts for s in range(2)]
    drawn = policy.draw(jax.random.key(9), 0, requests, columns)
    tokens = jnp.concatenate([drawn.prompts.tokens_BxP, drawn.rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([drawn.prompts.mask_BxP, drawn.rollout.mask_BxT], axis=1)
    assert 0 < float(jnp.mean(drawn.rollout.mask_BxT)) < 1
    told = drawn.rollout.trunk_BxSxD
    read = mask.at[:, -1].set(False)[..., None]  # nothing comes after the last
    whole = decoder.trunk(base, world.config, tokens, mask)
    close(jnp.where(read, told, 0.0), jnp.where(read, whole, 0.0))

    broken = jax.tree.map(lambda x: x * jnp.nan, base["blocks"][0])
    without = {
        "decoder": base | {"blocks": (broken, base["blocks"][1]), "wpe": base["wpe"] * jnp.nan}
    }
    rewards, rows = np.zeros(len(requests), np.float32), np.arange(len(requests)) // 2
    scored = ScoredRollout(*drawn.prompts, drawn.rollout, rewards, rows, drawn.temperature)
    found, metrics = experience(world, without, params, scored, world.setup)
    close(found.log_probs_BxT, drawn.rollout.log_probs_BxT)
    assert float(metrics["kl_ref"]) > 1e-3 and float(metrics["rollout_log_prob_error"]) < 1e-4
    np.testing.assert_array_equal(found.trunk_BxSxD, told)


def test_a_policy_with_a_frozen_trunk_asks_its_rollouts_for_it(world):
    def trunk_layers(**changes):
        keys = {name: changes.pop(name) for name in ("rank", "from_store") if name in changes}
        training = learning.Training(
            Train(**{"minibatch_size": 8} | changes), lora=Lora(rank=keys.pop("rank", 0))
        )
        job = learning.Job(vbon.METHOD, vbon.VBoN(n=4.0), training, world.config, 8, **keys)
        return job.program().trunk_layers

    layers = world.config.layers
    assert trunk_layers(num_layers_unfrozen=1) == layers - 1
    assert trunk_layers() == trunk_layers(rank=2) == 0
    assert trunk_layers(num_layers_unfrozen=1, replay=1, minibatch_size=16) == 0  # stored: untold
    assert trunk_layers(num_layers_unfrozen=1, from_store=True) == 0


@pytest.mark.parametrize("what", [TOP, LORA], ids=["top", "lora"])
def test_an_iteration_trains_what_is_trained_and_starts_at_ratio_one(world, mesh, batch, what):
    base = trainable.divide(world.reference(mesh)["decoder"], what, world.config.layers)
    own = trainable.start(base, what, jax.random.key(3))
    params = {"decoder": own, "value": world.fresh(mesh).params["value"]}
    before = jax.device_get(params)
    new, metrics = vbon.update(
        state.create(params, world.optimizer, jax.random.key(7)), {"decoder": base}, (batch,),
        world.references, jnp.float32(world.n), jnp.float32(0.1), setup=world.setup,
    )  # fmt: skip
    assert float(metrics["first_approx_kl"]) < 1e-10 and float(metrics["kl_ref"]) < 1e-6
    assert jax.tree.structure(new.params) == jax.tree.structure(before)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), new.params, before)
    assert max(jax.tree.leaves(moved["decoder"])) > 1e-4


@pytest.mark.parametrize("accumulate", [4])
def test_microbatches_add_up_to_the_minibatch(world, mesh, batch, accumulate):
    """Responses differ in length, so that a mean of means would be another loss."""
    reference, params = parts(world, mesh, WHOLE)
    exp, _ = experience(world, reference, params, batch, world.setup)
    lengths = exp.response_mask_BxT.sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    rows = jax.tree.map(lambda x: None if x is None else x[:8], exp)
    setup = tiny.changed(world.setup, accumulate=accumulate)
    once = tiny.gradients(params, reference, rows, world.setup)
    close(tiny.gradients(params, reference, rows, setup), once)


@pytest.mark.parametrize("what", [TOP, WHOLE], ids=["top", "whole"])
def test_a_prompt_that_is_run_once_for_its_responses_changes_nothing(world, mesh, batch, what):
    """Beside each other or not, the responses have the same losses and gradients."""
    alone = tiny.changed(world.setup, penalty="full", accumulate=2)
    setup = tiny.changed(alone, group=2)
    assert (alone.together, setup.together) == (1, 2)
    reference, params = parts(world, mesh, what)
    exp, metrics = experience(world, reference, params, batch, setup)
    expected, expected_metrics = experience(world, reference, params, batch, alone)
    for name in ("trunk_BxSxD", "ref_hidden_BxTxD"):  # where nobody looks they may differ
        real = exp.mask_BxS if name == "trunk_BxSxD" else exp.response_mask_BxT
        one, other = (getattr(x, name) for x in (exp, expected))
        if one is not None:
            close(*(jnp.where(real[..., None], x, 0.0) for x in (one, other)))
    rest = {"trunk_BxSxD": None, "ref_hidden_BxTxD": None}
    close(dataclasses.replace(exp, **rest), dataclasses.replace(expected, **rest))
    close(metrics, expected_metrics, 1e-4)
    got = tiny.gradients(params, reference, exp, setup)
    close(got, tiny.gradients(params, reference, expected, alone))

    def flops(setup):
        run = tiny.gradients.lower(params, reference, exp, setup=setup).compile()
        return run.cost_analysis()["flops"]

    assert flops(setup) < 0.9 * flops(alone)


@pytest.mark.parametrize(
    ("group", "replay", "rows", "together"),
    [
        (1, 0, 64, 1),
        (4, 0, 64, 4),
        (256, 256, 512, 8),
        (6, 4, 64, 2),
        (12, 0, 6, 1),
        (9, 0, 27, 3),
        (4, 0, 8, 2),
    ],
)
def test_the_rows_kept_together_divide_a_group_and_a_microbatch(
    world, group, replay, rows, together
):
    setup = tiny.changed(world.setup, group=group, replay=replay, minibatch_size=rows)
    assert setup.together == together
    small = tiny.changed(setup, accumulate=rows // 2 if rows % 2 == 0 else rows)
    assert small.microbatch % small.together == 0


def test_groups_stay_together_in_parts():
    rows = jnp.arange(12)
    assert scoring.in_parts(rows, 3, 2).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    seen = []

    def f(part):
        seen.append(part.shape)
        return 10 * part

    assert scoring.in_microbatches(f, rows, 4, 2).tolist() == (10 * rows).tolist()
    assert seen == [(4,)]
    mask = jnp.arange(5) < jnp.array([1, 5, 2, 2, 4, 1, 3, 3])[:, None]
    order = lengths.order(mask, 2, 2)
    longest = scoring.in_parts(mask.sum(1)[order], 2, 2).max(axis=1)
    assert sorted(longest.tolist()) == [3, 5] and sorted(order.tolist()) == list(range(8))


@pytest.mark.parametrize("chunk", [5])
def test_the_chunk_of_logits_changes_nothing(world, mesh, batch, chunk):
    reference, params = parts(world, mesh, WHOLE)
    setup = tiny.changed(world.setup, chunk=chunk, penalty="full")
    whole = tiny.changed(setup, chunk=10_000)
    exp, metrics = experience(world, reference, params, batch, setup)
    expected, expected_metrics = experience(world, reference, params, batch, whole)
    close(exp, expected)
    close(metrics, expected_metrics, 1e-4)
    close(
        tiny.gradients(params, reference, exp, setup),
        tiny.gradients(params, reference, expected, whole),
    )


def test_a_value_network_of_its_own(world, mesh, batch):
    """With the policy's weights and head it gives the head's values; its gradient is its own."""
    reference, params = parts(world, mesh, WHOLE)
    network = {"decoder": jax.tree.map(jnp.copy, params["decoder"]), **params["value"]}
    own = params | {"value": network}
    setup = tiny.changed(world.setup, value_config=world.config)
    with_head, _ = experience(world, reference, params, batch, world.setup)
    found, _ = experience(world, reference, own, batch, setup)
    close(found, with_head, 1e-5)
    grads, info = tiny.gradients(own, reference, found, setup)
    shared, shared_info = tiny.gradients(params, reference, with_head, world.setup)
    close(info, shared_info, 1e-5)
    # What one tree gets from both losses, two trees get apart.
    both = jax.tree.map(jnp.add, grads["decoder"], grads["value"]["decoder"])
    close(both, shared["decoder"], 2e-4)
    assert float(jnp.abs(grads["value"]["decoder"]["wte"]).max()) > 1e-6


def test_parameters_in_bfloat16_stay_so(world, mesh, batch):
    base = world.reference(mesh)["decoder"]
    own = trainable.start(base, WHOLE, jax.random.key(3), "bfloat16")
    params = {"decoder": own, "value": {"head": heads.init_value(world.config, jax.random.key(1))}}
    new, metrics = vbon.update(
        state.create(params, world.optimizer, jax.random.key(7)), {"decoder": base}, (batch,),
        world.references, jnp.float32(world.n), jnp.float32(0.1),
        setup=tiny.changed(world.setup, accumulate=2),
    )  # fmt: skip
    assert {str(x.dtype) for x in jax.tree.leaves(new.params["decoder"])} == {"bfloat16"}
    assert np.isfinite(float(metrics["loss"]))
