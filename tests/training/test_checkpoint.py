import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.errors import InputError
from vbon_jax.training.checkpoint import Checkpointer


def tree(value, mesh):
    return sharding.place(
        {"decoder": {"wpe": np.full((8, 4), value, np.float32)}, "key": jax.random.key(3)}, mesh
    )


@pytest.fixture
def checkpointer(tmp_path):
    c = Checkpointer(tmp_path / "c", keep=2)
    yield c
    c.close()


def test_nothing_to_restore(checkpointer, mesh):
    assert checkpointer.latest_step is None
    assert checkpointer.restore(tree(0.0, mesh)) is None


def test_round_trip_onto_another_mesh(checkpointer, mesh):
    checkpointer.save(3, tree(1.5, mesh), {"step": 3, "config": {"a": 1}})
    checkpointer.wait()
    many = sharding.make_mesh(fsdp=4)
    state, metadata = checkpointer.restore(tree(0.0, many))
    np.testing.assert_array_equal(state["decoder"]["wpe"], 1.5)
    assert {s.data.shape for s in state["decoder"]["wpe"].addressable_shards} == {(8, 1)}
    assert (
        jax.random.key_data(state["key"]).tolist()
        == jax.random.key_data(jax.random.key(3)).tolist()
    )
    assert metadata == {"step": 3, "config": {"a": 1}}


def test_the_state_may_be_donated_at_once(checkpointer, mesh):
    state = {"x": sharding.place(np.zeros((1000, 1000), np.float32), mesh)}
    spoil = jax.jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)
    for step in range(3):
        checkpointer.save(step, state, {})
        state = spoil(state)
    restored, _ = checkpointer.restore(state)
    np.testing.assert_array_equal(restored["x"], 2.0)


def test_the_last_k_are_kept(checkpointer, mesh):
    for step in range(5):
        checkpointer.save(step, tree(float(step), mesh), {})
    checkpointer.wait()
    assert sorted(int(p) for p in os.listdir(checkpointer.directory) if p.isdigit()) == [3, 4]


def test_a_half_written_checkpoint_is_passed_over(tmp_path, mesh):
    first = Checkpointer(tmp_path / "c", keep=2)
    first.save(1, tree(1.0, mesh), {})
    first.close()
    torn = tmp_path / "c" / "2.orbax-checkpoint-tmp-123"
    (torn / "state").mkdir(parents=True)
    again = Checkpointer(tmp_path / "c", keep=2)
    assert again.latest_step == 1
    np.testing.assert_array_equal(again.restore(tree(0.0, mesh))[0]["decoder"]["wpe"], 1.0)
    again.close()


def test_another_shape_is_refused_by_name(checkpointer, mesh):
    checkpointer.save(1, tree(1.0, mesh), {})
    checkpointer.wait()
    other = {"decoder": {"wpe": jnp.zeros((3, 4))}, "other": jnp.zeros(2)}
    with pytest.raises(InputError, match="cannot be read as this run's state"):
        checkpointer.restore(sharding.place(other, mesh))


def test_a_full_disk_is_told_in_one_error(tmp_path, mesh):
    """A file-size limit stands in for the full disk; the process has it only for this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    c = Checkpointer(tmp_path / "c", keep=2)
    c.save(1, tree(1.0, mesh), {})
    c.wait()
    noise = np.random.default_rng(0).normal(size=(1 << 18,)).astype(np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(InputError, match=r"could not be written.*GiB free.*last good one is 1"):
            c.save(2, {"x": sharding.place(noise, mesh)}, {})
            c.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert Checkpointer(tmp_path / "c", keep=2).latest_step == 1
