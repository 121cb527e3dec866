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
