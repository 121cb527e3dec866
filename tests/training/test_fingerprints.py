import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.training import fingerprints


def value(x):
    return fingerprints.of_tree({"x": x})["['x']"][2]


@pytest.mark.parametrize(
    "array",
    [
        np.linspace(-3, 5, 40, dtype=np.float32).reshape(5, 8),
        np.arange(40, dtype=np.int32).reshape(2, 4, 5),
        np.linspace(-3, 5, 40).astype(jnp.bfloat16),
        np.float32(3.5),
        np.arange(7) % 2 == 0,
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_every_flipped_bit_changes_it(array):
    whole = value(jnp.asarray(array))
    raw = np.atleast_1d(array).view(np.uint8).ravel()
    for i in range(len(raw)):
        for bit in range(1 if array.dtype == bool else 8):
            other = raw.copy()
            other[i] ^= 1 << bit
            moved = other.view(array.dtype).reshape(array.shape)
            assert value(jnp.asarray(moved)) != whole, (i, bit)


def test_it_is_the_sum_of_bits_times_odd_weights():
    ones = np.ones(3, np.int32)
    weights = [value(jnp.asarray(ones * (np.arange(3) == i).astype(np.int32))) for i in range(3)]
    assert all(w % 2 == 1 for w in weights) and len(set(weights)) == 3
    assert value(jnp.asarray(ones * 5)) == sum(weights) * 5 % 2**32


def test_order_counts_and_the_mesh_does_not(mesh):
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    whole = value(jnp.asarray(array))
    assert value(jnp.asarray(array[::-1])) != whole
    many = sharding.make_mesh(fsdp=4)
    placed = sharding.place({"decoder": {"wpe": array}}, many)
    assert len({s.device for s in placed["decoder"]["wpe"].addressable_shards}) > 1
    (found,) = fingerprints.of_tree(placed).values()
    assert found == ["float32", [8, 8], whole]


def test_random_keys_count_too():
    assert value(jax.random.key(1)) != value(jax.random.key(2))
    assert fingerprints.of_tree({}) == {}
