"""Adapters that a gate opens as far as n asks for: one n, many in a batch, and n = 1."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.models import decoder, family, trainable
from vbon_jax.models.decoder import Adjacent

TOP = 32.0
WHAT = trainable.Trainable(rank=5, targets=("q", "out", "up", "down"))


@pytest.fixture(scope="module")
def own(params):
    """A family that is far from the reference and whose gates are any."""
    own = family.gated(trainable.start(params, WHAT, jax.random.key(1)), 16)
    leaves, treedef = jax.tree.flatten(own)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return treedef.unflatten(
        [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def hidden(params, config, own, same=None):
    rng = np.random.default_rng(3)
    prompt = np.repeat(rng.integers(0, config.vocab_size, (4, 3)), 2, axis=0)
    tokens = np.concatenate([prompt, rng.integers(0, config.vocab_size, (8, 4))], axis=1)
    mask = np.ones(tokens.shape, bool)
    mask[0:2, 0] = False
    policy = trainable.join(params, own)
    found = jax.jit(decoder.hidden, static_argnums=(1, 4))(policy, config, tokens, mask, same)
    return np.asarray(jnp.where(mask[..., None], found, 0.0))


def test_features_by_hand():
    """phi_j(t) = (tanh((t - c_j) / w) + tanh(c_j / w)) / 2 with c_j = j w, w = log(top) / 8."""
    phi = np.asarray(family.features(np.array([1.0, 4.0, 32.0]), TOP))
    w = math.log(TOP) / 8
    for n, row in zip((1.0, 4.0, 32.0), phi, strict=True):
        by_hand = [(math.tanh((math.log(n) - j * w) / w) + math.tanh(j)) / 2 for j in range(8)]
        np.testing.assert_allclose(row, by_hand, atol=1e-6)
    assert (phi[0] == 0).all() and (np.diff(phi, axis=0) > 0).all()


def test_at_first_every_policy_is_the_reference(params, config):
    own = family.gated(trainable.start(params, WHAT, jax.random.key(1)), 16)
    assert family.has_gates(own) and not family.has_gates({"blocks": {}})
    plain = np.asarray(hidden(params, config, {"blocks": {}}))
    np.testing.assert_array_equal(hidden(params, config, family.fixed(own, 7.0, TOP)), plain)
    # Each rank has one of the features: the gradient of B tells values of n apart.
    gate = own["blocks"]["attention"]["q"]["lora_gate"]
    np.testing.assert_array_equal(gate[0], np.eye(8)[:, :5])


def test_one_is_the_reference_whatever_was_learned(params, config, own):
    plain = hidden(params, config, {"blocks": {}})
    np.testing.assert_array_equal(hidden(params, config, family.fixed(own, 1.0, TOP)), plain)
    opened = family.opened(own, jnp.array([1.0, 2.0, 32.0, 1.0]), TOP)
    of_each = hidden(params, config, opened)
    np.testing.assert_allclose(of_each[[0, 1, 6, 7]], plain[[0, 1, 6, 7]], atol=1e-5)
    assert np.abs(of_each[2:6] - plain[2:6]).max() > 0.1


@pytest.mark.parametrize("same", [None, Adjacent(2, 3)])
def test_rows_of_several_n_are_those_of_each_policy(params, config, own, same):
    n_G = np.array([2.0, 9.5, 32.0, 5.0])
    together = hidden(params, config, family.opened(own, jnp.asarray(n_G), TOP), same)
    for i, n in enumerate(n_G):
        fixed = family.fixed(own, n, TOP)
        alone = hidden(params, config, fixed)
        here = slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(together[here], alone[here], atol=2e-5)
        merged = trainable.merged(trainable.join(params, fixed), config.lora_alpha)
        np.testing.assert_allclose(hidden(merged, config, {"blocks": {}}), alone, atol=2e-4)


def test_groups_of_a_tree(params, own):
    assert family.groups(params) == 1
    assert family.groups(trainable.join(params, family.fixed(own, 3.0, TOP))) == 1
    opened = family.opened(own, jnp.array([2.0, 3.0, 4.0]), TOP)
    assert family.groups(trainable.join(params, opened)) == 3
