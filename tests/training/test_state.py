"""The optimizer: what decays, and in what dtype its moments are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.training import state


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


def test_moments_are_stored_in_their_own_dtype():
    params = {"kernel": jnp.linspace(-1.0, 1.0, 64)}
    grads = {"kernel": jnp.cos(7 * params["kernel"])}
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = state.adamw(optax.constant_schedule(1e-2), 1e-8, 0.0, 1e9, dtype)
        opt_state = optimizer.init(params)
        for _ in range(3):
            updates[dtype], opt_state = optimizer.update(grads, opt_state, params)
        moments = [x for x in jax.tree.leaves(opt_state) if x.shape == (64,)]
        assert len(moments) == 2 and {str(x.dtype) for x in moments} == {dtype}
        assert updates[dtype]["kernel"].dtype == jnp.float32
    a, b = (updates[dtype]["kernel"] for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-5)
    assert not np.array_equal(a, b)


def test_the_learning_rate_is_put_where_a_count_of_steps_says():
    optimizer = state.adamw(optax.linear_schedule(1.0, 0.0, 10), 1e-8, 0.0, 1e9)
    params, grads = {"kernel": jnp.ones(3)}, {"kernel": jnp.full(3, 0.5)}
    fresh = optimizer.init(params)
    moved = optimizer.update(grads, state.at_step(fresh, jnp.int32(4)), params)
    np.testing.assert_allclose(moved[0]["kernel"], -0.6, rtol=1e-5)  # Adam's first step is 1
    # Adam's own count is that of the steps it has seen, whatever the learning rate's.
    counts = sorted(int(x) for _, x in optax.tree.get_all_with_path(moved[1], "count"))
    assert counts == [1, 5]


def test_muon_orthogonalises_the_matrices_of_the_blocks_and_no_others():
    """Against its definition: the momentum's singular values near 1, at Adam's root mean square."""
    rng = np.random.default_rng(0)
    shapes = {
        "blocks/attention/q/kernel": (2, 12, 4, 3), "blocks/attention/out/kernel": (2, 4, 3, 12),
        "blocks/mlp/up/kernel": (2, 12, 20), "blocks/mlp/up/bias": (2, 20), "wte": (7, 12),
    }  # fmt: skip
    params = {}
    for name, shape in shapes.items():
        *folders, leaf = name.split("/")
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at[leaf] = jnp.array(rng.normal(size=shape), jnp.float32)
    grads = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), jnp.float32), params)
    constant = optax.constant_schedule(1.0)
    moved = {}
    for make in (state.muon, state.adamw):
        optimizer = make(constant, 1e-8, 0.0, 1e9)
        moved[make] = optimizer.update(grads, optimizer.init(params), params)[0]
    by_muon, by_adam = moved[state.muon], moved[state.adamw]
    up = by_muon["blocks"]["mlp"]["up"]
    matrices = [
        *up["kernel"],
        *by_muon["blocks"]["attention"]["q"]["kernel"].reshape(2, 12, 12),
        *by_muon["blocks"]["attention"]["out"]["kernel"].reshape(2, 12, 12),
    ]
    gradients = grads["blocks"]["mlp"]["up"]["kernel"]
    for update, gradient in zip(matrices[:2], gradients, strict=True):
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        cosine = -np.sum(update * (u @ v)) / np.linalg.norm(update) / np.sqrt(12)
        assert cosine > 0.97
    for update in matrices:
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(max(update.shape)))
        assert values.min() > 0.3 and values.max() < 1.3
    for one, other in (
        (by_muon["wte"], by_adam["wte"]),
        (up["bias"], by_adam["blocks"]["mlp"]["up"]["bias"]),
    ):
        np.testing.assert_allclose(np.sign(one), np.sign(other))
        assert np.all(np.abs(one) > 0.5)  # a step of Adam's size


def test_moments_of_muon_are_stored_in_their_own_dtype_and_its_constants_are_not():
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.ones((1, 4, 6))}}}, "wte": jnp.ones((3, 4))}
    optimizer = state.muon(optax.constant_schedule(1e-2), 1e-8, 0.0, 1e9, "bfloat16")
    grads = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params
    )
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)
    dtypes = {x.shape: str(x.dtype) for x in jax.tree.leaves(opt_state) if x.ndim}
    assert dtypes == {(3,): "float32", (1, 4, 6): "bfloat16", (3, 4): "bfloat16"}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
