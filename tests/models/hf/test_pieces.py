import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from vbon_jax import sharding
from vbon_jax.models.hf import pieces, tensor_files

ARRAY = np.random.default_rng(0).normal(size=(3, 12, 4)).astype(np.float32)  # [L, N, D]
WHOLE = ARRAY[1]


def rows_of(array):
    """(start, stop) -> those rows, and the list of the numbers of rows that were asked for."""
    asked = []

    def rows(start, stop):
        assert 0 <= start < stop <= len(array)
        asked.append(stop - start)
        return array[start:stop]

    return rows, asked


def places():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    yield None
    yield SingleDeviceSharding(jax.devices()[3])
    for spec in (P("tensor", "fsdp"), P("fsdp"), P(None, ("fsdp",)), P()):
        yield NamedSharding(mesh, spec)


@pytest.mark.parametrize("piece", [1, 96, 2**20])  # a row, some rows (the last overlap), all
def test_an_array_is_filled_on_its_devices(monkeypatch, piece):
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    for where in places():
        rows, asked = rows_of(WHOLE)
        got = pieces.fill(pieces.zeros(WHOLE.shape, "float32", where), where, None, rows)
        np.testing.assert_array_equal(got, WHOLE)
        shards = 1 if where is None else len(WHOLE) // where.shard_shape(WHOLE.shape)[0]
        assert max(asked) == min(max(1, piece // (16 * shards)), len(WHOLE) // shards)
        if where is not None:
            assert got.sharding == where


def test_a_layer_is_filled_and_the_others_stay(monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 5 * 8)  # five rows of bfloat16
    for where in (None, NamedSharding(sharding.make_mesh(fsdp=4, tensor=2), P(None, "fsdp"))):
        leaf = pieces.zeros(ARRAY.shape, "bfloat16", where)
        for layer in (2, 0):
            leaf = pieces.fill(leaf, where, layer, rows_of(ARRAY[layer])[0])
        expected = jax.numpy.asarray(ARRAY).at[1].set(0).astype("bfloat16")
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, expected)


def test_layers_that_are_sharded_are_refused():
    where = NamedSharding(sharding.make_mesh(fsdp=3, tensor=2), P("fsdp"))
    leaf = pieces.zeros(ARRAY.shape, "float32", where)
    with pytest.raises(ValueError, match="for layers: their axis must not be sharded"):
        pieces.fill(leaf, where, 0, rows_of(ARRAY[0])[0])


def test_what_is_fetched():
    placed = jax.device_put(ARRAY, NamedSharding(sharding.make_mesh(fsdp=4), P(None, "fsdp")))
    for leaf in (ARRAY, placed):
        np.testing.assert_array_equal(pieces.fetch(leaf, None), ARRAY)
        np.testing.assert_array_equal(pieces.fetch(leaf, 2), ARRAY[2])
