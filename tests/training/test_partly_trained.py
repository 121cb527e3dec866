"""What is trained, and how much is held at once, changes what a step costs, not what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.methods import vbon
from vbon_jax.models import heads, trainable
from vbon_jax.models.trainable import Trainable
from vbon_jax.training import state

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
