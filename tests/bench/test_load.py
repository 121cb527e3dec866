"""Loading measured at a small size: what is measured is there, and memory stays bounded."""

import functools
import sys

import jax
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.bench import load as bench_load
from vbon_jax.models import decoder, hf
from vbon_jax.models.config import DecoderConfig

# 12 layers of 12.6 MB, 156 MB in all. Smaller and the bound below could not fail: the code that XLA
# makes while it loads takes up to 80 MB, whatever the size.
CONFIG = DecoderConfig(vocab_size=2048, positions=64, layers=12, width=512, heads=8, mlp_width=2048)
LARGEST = 4 * 512 * 2048
SLACK = 120 * 10**6
KEYS = {"arrays_bytes", "largest_bytes", "beyond_bytes", "ratio", "seconds"}


@functools.cache
def shapes():
    tree = jax.eval_shape(functools.partial(decoder.init, CONFIG), jax.random.key(0))
    return jax.tree_util.tree_leaves_with_path(tree)


def arrays_bytes(mesh):
    """Of all parameters on all devices of a mesh, copies counted each."""
    total = 0
    for path, leaf in shapes():
        spec = sharding.spec_for("decoder/" + sharding.path_of(path), leaf.shape, mesh)
        local = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)
        total += 4 * int(np.prod(local)) * mesh.size
    return total


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    bench_load.random_checkpoint(directory, CONFIG, shard_bytes=20 * 10**6)
    assert len(list(directory.glob("*.safetensors"))) > 5
    return directory


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_beyond_the_arrays_is_bounded(checkpoint, devices):
    """A loader that reads all files first, or makes the arrays twice, is out by 156 MB."""
    got = bench_load.measure(checkpoint, devices=devices, fsdp=devices)
    assert got.keys() == KEYS
    assert got["arrays_bytes"] == arrays_bytes(sharding.make_mesh(fsdp=devices))
    assert got["largest_bytes"] == LARGEST
    assert got["ratio"] == got["beyond_bytes"] / LARGEST
    assert 0 < got["seconds"] < 60
    assert got["beyond_bytes"] < 2 * LARGEST + SLACK, got


def test_a_process_that_fails_is_an_error(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="the measuring process failed: no such thing"):
        bench_load.measure(tmp_path)


def test_a_random_checkpoint_loads(tmp_path):
    config = DecoderConfig(
        vocab_size=50, positions=64, layers=2, width=64, heads=2, mlp_width=64,
        initializer_range=0.3,
    )  # fmt: skip
    bench_load.random_checkpoint(tmp_path, config, dtype="bfloat16", shard_bytes=10**4)
    read, params = hf.load_decoder(tmp_path, dtype="bfloat16")
    assert read == config
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    assert all(0.2 < leaf.std() < 0.4 for leaf in leaves)
    up = np.asarray(params["blocks"]["mlp"]["up"]["kernel"], np.float32)
    assert abs(np.corrcoef(up[0].ravel(), up[1].ravel())[0, 1]) < 0.1  # not the same layer twice


def test_every_figure_has_a_row(monkeypatch):
    row = {
        "arrays_bytes": 2e9, "largest_bytes": 100e6, "beyond_bytes": 150e6, "ratio": 1.5,
        "seconds": 3.21,
    }  # fmt: skip
    monkeypatch.setattr(bench_load, "random_checkpoint", lambda directory: None)
    monkeypatch.setattr(bench_load, "measure", lambda directory, **how: row | how)
    asked = dict(bench_load.results())
    assert asked["float32, fsdp 4, tensor 2"] == row | {"devices": 8, "fsdp": 4, "tensor": 2}
    beyond, seconds = bench_load.rows("float32", row)
    assert (beyond.value, beyond.unit, beyond.ratio) == (150.0, "MB", 1.5)
    assert (seconds.what, seconds.value, seconds.unit) == ("float32: 2000 MB", 3.21, "s")
