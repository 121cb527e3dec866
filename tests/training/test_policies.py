"""Which weights of a state are its policy: the last, their average, the best."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vbon_jax import sharding
from vbon_jax.training import policies, state


def fresh(value, **more):
    params = {"decoder": {"wte": jnp.full((8, 4), value)}}
    first = state.create(params, optax.sgd(1.0), jax.random.key(0))
    return first._replace(params=params | more)


def adding(own, amount):
    """An update that adds to the weights and must not be given the average."""
    assert own.params.keys() == {"decoder"}
    decoder = jax.tree.map(lambda x: x + amount, own.params["decoder"])
    return own._replace(step=own.step + 1, params={"decoder": decoder}), {"loss": amount}


def test_the_average_forgets_half_of_it_in_a_half_life():
    update = policies.averaged(adding, 2.0)
    now = fresh(0.0, average={"wte": jnp.zeros((8, 4))})
    weights, average, rate = 0.0, 0.0, 1 - 0.5**0.5
    for amount in (1.0, -3.0, 0.5):
        now, metrics = update(now, jnp.float32(amount))
        weights += amount
        average += rate * (weights - average)
        np.testing.assert_allclose(now.params["decoder"]["wte"], weights)
        np.testing.assert_allclose(policies.policy(now.params)["wte"], average, rtol=1e-6)
        assert float(metrics["loss"]) == amount
    for _ in range(2):  # as many steps as the half-life, the weights at rest
        now, _ = update(now, jnp.float32(0.0))
    np.testing.assert_allclose(
        now.params["average"]["wte"], weights + (average - weights) / 2, rtol=1e-5
    )


def test_the_policy_is_the_best_the_average_or_the_last():
    last, average, best = ({"wte": x} for x in "lab")
    assert policies.policy({"decoder": last, "value": 1}) is last
    assert policies.policy({"decoder": last, "average": average}) is average
    found = {"decoder": best, "kl": 0.0, "looks": 0}
    assert policies.policy({"decoder": last, "best": found}) is best


def looks(kls, patience):
    """States after each look at weights that are 1, 2, 3, ..."""
    best, found = policies.unjudged({"wte": jnp.zeros((8, 4))}), []
    look = jax.jit(policies.judged, static_argnums=2)
    for i, kl in enumerate(kls):
        best = look(fresh(i + 1.0, best=best), jnp.float32(kl), patience).params["best"]
        found.append((float(best["decoder"]["wte"][0, 0]), float(best["kl"]), int(best["looks"])))
    return found


def test_the_best_is_the_one_of_the_least_kl():
    found = looks([3.0, 2.0, 2.5, np.nan, 1.0, 1.0], patience=3)
    np.testing.assert_allclose(
        found, [(1, 3, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2), (5, 1, 0), (5, 1, 1)]
    )


def test_what_has_ended_stays_as_it_is():
    """A member of a population whose own run would have ended."""
    assert looks([3.0, 4.0, 5.0, 1.0], patience=2)[-1] == (1.0, 3.0, 3)


@pytest.mark.parametrize("name", ["average", "best"])
def test_on_a_mesh_they_lie_as_the_weights_do_and_one_program_serves(name):
    mesh = sharding.make_mesh(1, 2, 2)
    tree = {"wte": jnp.zeros((8, 4)), "ln_f": {"scale": jnp.zeros(4)}}
    own = policies.unjudged(tree) if name == "best" else jax.tree.map(jnp.copy, tree)
    with jax.set_mesh(mesh):
        now = state.TrainState(jnp.int32(0), {"decoder": tree, name: own}, {}, jax.random.key(0))
        now = sharding.place(now, mesh)
        wanted = jax.tree.map(lambda x: x.sharding, now)
        copied = wanted.params["best"]["decoder"] if name == "best" else wanted.params[name]
        assert copied == wanted.params["decoder"]
        if name == "average":
            step = policies.averaged(adding, 2.0)
        else:
            look = jax.jit(policies.judged, static_argnums=2)
            step = lambda now, kl: (look(now, kl, 3), {})  # noqa: E731
        for i in range(3):
            now, _ = step(now, jnp.float32(1.0 - i))
            assert jax.tree.map(lambda x: x.sharding, now) == wanted
