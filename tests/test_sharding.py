import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vbon_jax import sharding
from vbon_jax.errors import InputError


def test_default_mesh_is_one_device():
    assert sharding.make_mesh().size == 1
    assert tuple(sharding.make_mesh().shape) == ("data", "fsdp", "tensor")


def test_minus_one_takes_the_rest():
    assert dict(sharding.make_mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize("sizes", [(16, 1, 1), (0, 1, 1), (-1, -1, 1), (-1, 16, 1), (-2, 1, 1)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(InputError, match="mesh"):
        sharding.make_mesh(*sizes)


def test_every_parameter_matrix_is_in_the_table(params):
    mesh = sharding.make_mesh(2, 2, 2)
    specs = {
        sharding.path_of(path): sharding.spec_for(
            "decoder/" + sharding.path_of(path), x.shape, mesh
        )
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    replicated = {path for path, spec in specs.items() if not any(spec)}
    # Norms and the biases added after a sharded product; wte's odd vocabulary keeps only fsdp.
    assert all("ln_" in path or path.endswith("bias") for path in replicated), replicated
    assert specs["wte"] == P(None, "fsdp")
    assert specs["blocks/attention/q/kernel"] == P(None, "fsdp", "tensor")


def test_a_parameter_that_no_line_names_is_an_error():
    mesh = sharding.make_mesh(2, 2, 2)
    for path in ("decoder/blocks/mlp/router/kernel", "opt_state/1/0/mu/decoder/extra"):
        with pytest.raises(ValueError, match=f"{path} .*no line of sharding.TABLE"):
            sharding.spec_for(path, (2, 4), mesh)
    assert sharding.spec_for("opt_state/1/0/count", (), mesh) == P()
    assert sharding.spec_for("score/kernel", (8, 2), mesh) == P()


def held_in(axes, x, *, mesh=(2, 2, 2)):
    """The shape that a device has of an activation held to axes."""
    mesh = sharding.make_mesh(*mesh)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.held(x * 2, *axes))(x)
    np.testing.assert_array_equal(out, x * 2)
    return out.addressable_shards[0].data.shape


def test_an_activation_is_held_to_what_divides_it():
    assert held_in((sharding.BATCH, "tensor"), jnp.ones((8, 6))) == (2, 3)
    assert held_in((sharding.BATCH, "tensor"), jnp.ones((8, 5))) == (2, 5)
    assert held_in((None, "tensor"), jnp.ones((7, 6))) == (7, 3)
    x = jnp.ones((8, 3))
    assert sharding.held(x, sharding.BATCH) is x and sharding.parts("tensor", 8) == 1


def test_weights_are_gathered_and_their_gradients_scattered():
    mesh = sharding.make_mesh(2, 2, 2)
    layer = {"mlp": {"up": {"kernel": jnp.arange(32.0).reshape(4, 8), "bias": jnp.ones(8)}}}
    where = {"mlp": {"up": {"kernel": P("fsdp", "tensor"), "bias": P()}}}
    put = lambda tree: jax.tree.map(  # noqa: E731
        lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), tree, where
    )

    @jax.jit
    def whole_and_gradient(layer):
        def loss(layer):
            found = sharding.gathered(layer, "decoder/blocks", "bfloat16", layer=True)
            return jnp.sum(found["mlp"]["up"]["kernel"].astype(jnp.float32) ** 2), found

        (_, found), grad = jax.value_and_grad(loss, has_aux=True)(layer)
        return found, grad

    with jax.set_mesh(mesh):
        found, grad = whole_and_gradient(put(layer))
        assert sharding.parts("tensor", 8, 4) == 2 and sharding.parts("tensor", 8, 5) == 1
    kernel, slope = (tree["mlp"]["up"]["kernel"] for tree in (found, grad))
    assert kernel.dtype == jnp.bfloat16 and slope.dtype == jnp.float32
    assert kernel.addressable_shards[0].data.shape == (4, 4)
    assert slope.addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(slope, 2 * layer["mlp"]["up"]["kernel"])
    assert found["mlp"]["up"]["bias"].dtype == jnp.float32


def test_an_axis_that_does_not_divide_is_dropped():
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.spec_for("decoder/wte", (8, 6), mesh) == P("tensor", "fsdp")
    assert sharding.spec_for("decoder/wte", (7, 6), mesh) == P(None, "fsdp")
    assert sharding.spec_for("batch", (8, 3), mesh) == P(("data", "fsdp"))
    assert sharding.spec_for("batch", (6, 3), mesh) == P()


def test_optimizer_moments_are_sharded_like_parameters():
    mesh = sharding.make_mesh(1, 2, 2)
    path = "opt_state/1/0/mu/decoder/blocks/mlp/up/kernel"
    assert sharding.spec_for(path, (2, 4, 8), mesh) == P(None, "fsdp", "tensor")


def test_place_splits_rows():
    mesh = sharding.make_mesh(data=8)
    x = sharding.place({"tokens": np.arange(16).reshape(8, 2)}, mesh, "batch")["tokens"]
    assert {s.data.shape for s in x.addressable_shards} == {(1, 2)}


def test_a_population_is_split_by_members_whole():
    """Each device has whole policies, whatever the names inside would be sharded by otherwise."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    path = "population/decoder/blocks/attention/q/kernel"
    assert sharding.spec_for(path, (8, 2, 16, 2, 8), mesh) == P(("data", "fsdp"))
    tree = {"decoder": {"wte": np.zeros((8, 6, 4))}, "step": np.zeros(8)}
    placed = sharding.place(tree, mesh, "population")
    assert {s.data.shape for s in placed["decoder"]["wte"].addressable_shards} == {(2, 6, 4)}
    assert {s.data.shape for s in placed["step"].addressable_shards} == {(2,)}


def test_constrain_inside_a_shard_map_leaves_all_local():
    """A member's own update is constrained by nothing: its axes are taken by the population."""
    mesh = sharding.make_mesh(data=4)
    with jax.set_mesh(mesh):
        spread = jax.shard_map(
            lambda x: sharding.constrain(x * 2, "batch"), in_specs=P("data"), out_specs=P("data")
        )
        np.testing.assert_array_equal(jax.jit(spread)(jnp.ones((16, 3))), 2)


def test_constrain_without_a_mesh_changes_nothing():
    x = jnp.ones((4, 2))
    assert sharding.constrain(x, "batch") is x


def test_constrain_under_a_mesh_shards():
    mesh = sharding.make_mesh(data=4)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain({"a": x * 2}, "batch"))(jnp.ones((8, 3)))
    assert {s.data.shape for s in out["a"].addressable_shards} == {(2, 3)}


def own_sum(shared, rows):
    """What gradients look like: a matrix and a norm of a model, and a metric."""
    return {
        "decoder": {"wte": rows.T @ rows * shared, "ln_f": {"scale": rows.sum(axis=0)}},
        "loss": rows.sum(),
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 1, 4), (2, 2, 2)])
def test_a_sum_over_rows_is_the_same_on_every_mesh(sizes):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = sharding.place(rows, mesh, "batch")
        found = jax.jit(lambda rows: sharding.summed(own_sum, 2.0, rows))(placed)
    expected = own_sum(2.0, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                 found, expected)  # fmt: skip


def test_matrices_alone_are_sent_in_the_dtype_of_products():
    """A norm's gradient and a metric come from no product of matrices; CPUs send all as it is."""
    rows = jnp.full((16, 4), 1.001, jnp.float32)
    mesh = sharding.make_mesh(data=4)
    f = jax.jit(lambda rows: sharding.summed(own_sum, 1.0, rows, jnp.bfloat16))
    with jax.set_mesh(mesh):
        found = f(sharding.place(rows, mesh, "batch"))
        text = jax.export.export(f, platforms=["tpu"])(rows).mlir_module()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, own_sum(1.0, rows))
    sent = re.findall(r"all_reduce.*?\}\) : \(tensor<([^>]*)>\)", text, re.DOTALL)
    assert sorted(sent) == ["4x4xbf16", "4xf32", "f32"]


def counted(carry, rows):
    """Steps until the sum of a device's rows is used up, as a loop that decides by it counts."""
    del carry
    left = sharding.in_step(rows.sum())
    done = jax.lax.while_loop(lambda n: n < left, lambda n: n + 1, jnp.int32(0))
    return jnp.broadcast_to(done, rows.shape)


@pytest.mark.parametrize(("sizes", "expected"), [((4, 1, 1), [1, 2, 3, 4]), ((4, 1, 2), [4] * 4)])
def test_a_device_decides_alone_unless_it_computes_with_others(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        rows = sharding.place(jnp.arange(1, 5, dtype=jnp.int32), mesh, "batch")
        found = jax.jit(lambda rows: sharding.apart(counted, None, rows))(rows)
    np.testing.assert_array_equal(found, expected)
