import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.errors import InputError
from vbon_jax.training import seals
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
        with pytest.raises(
            InputError, match=r"could not be written.* MiB needed, .* free.*last good one is 1"
        ):
            c.save(2, {"x": sharding.place(noise, mesh)}, {})
            c.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert Checkpointer(tmp_path / "c", keep=2).latest_step == 1


# --- Damage -----------------------------------------------------------------------------------


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "commit_success.txt")


def two_saved(folder, mesh):
    c = Checkpointer(folder, keep=2)
    for step in (1, 2):
        c.save(step, tree(float(step), mesh), {"step": step})
    c.close()


def after_damage(folder, mesh):
    """The value and the step of what is restored; (None, None) where it begins anew."""
    c = Checkpointer(folder, keep=2)
    try:
        found = c.restore(tree(0.0, mesh))
        if found is None:
            return None, None
        assert found[1] in ({"step": c.latest_step}, {})  # {}: as of an old version
        return set(np.asarray(found[0]["decoder"]["wpe"]).ravel().tolist()), c.latest_step
    finally:
        c.close()


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "binary": lambda data: bytes(range(256)),
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"3",
    "null": lambda data: b"null",
    "an object": lambda data: b"{}",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh):
    folder = tmp_path_factory.mktemp("saved") / "c"
    two_saved(folder, mesh)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_broken_file_of_a_checkpoint_is_passed_over_or_harmless(
    saved, tmp_path, mesh, damage, capfd
):
    """Never a traceback, never another value than was saved under the step."""
    names = [p.relative_to(saved / "2") for p in files_of(saved / "2")]
    for i, name in enumerate(names):
        folder = tmp_path / str(i) / "c"
        shutil.copytree(saved, folder)
        path = folder / "2" / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        value, step = after_damage(folder, mesh)
        assert (value, step) in (({2.0}, 2), ({1.0}, 1)), name
        told = capfd.readouterr().err
        assert ("2 is damaged" in told and "going on from checkpoint 1" in told) == (step == 1)
        assert (folder.with_name("c.damaged") / "2").exists() == (step == 1)


def test_flipped_bits_are_seen_or_harmless(saved, tmp_path, mesh, rng):
    seen = 0
    names = [p.relative_to(saved / "2") for p in files_of(saved / "2")]
    for i in range(30):
        folder = tmp_path / str(i) / "c"
        shutil.copytree(saved, folder)
        flip(folder / "2" / names[i % len(names)], rng)
        value, step = after_damage(folder, mesh)
        assert (value, step) in (({2.0}, 2), ({1.0}, 1)), names[i % len(names)]
        seen += step == 1
    assert seen > 10


def test_arrays_that_are_not_those_saved_are_seen(saved, tmp_path, mesh, monkeypatch):
    """As a flipped bit that decodes: the arrays of one step under the metadata of the other."""
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    assert after_damage(folder, mesh) == ({1.0}, 1)


def test_a_checkpoint_under_another_step_is_seen(saved, tmp_path, mesh):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    (folder / "2").rename(folder / "3")
    assert after_damage(folder, mesh) == ({1.0}, 1)


def test_all_damaged_begins_anew_and_saves_again(saved, tmp_path, mesh, capfd):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    for step in ("1", "2"):
        (folder / step / "metadata" / "metadata").write_bytes(b"")
    assert after_damage(folder, mesh) == (None, None)
    assert "beginning anew" in capfd.readouterr().err
    two_saved(folder, mesh)
    assert after_damage(folder, mesh) == ({2.0}, 2)


def test_a_checkpoint_without_fingerprints_is_taken_with_a_line(tmp_path, mesh, monkeypatch, capfd):
    monkeypatch.setattr(seals, "sealed", lambda step, state, given: given)
    two_saved(tmp_path / "c", mesh)
    monkeypatch.undo()
    assert after_damage(tmp_path / "c", mesh) == ({2.0}, 2)
    assert "has no fingerprints: taken unchecked" in capfd.readouterr().err
    assert seals.newest(tmp_path / "c") is None


def test_what_the_newest_holds_is_known_without_reading_it(saved, tmp_path, mesh):
    folder = tmp_path / "c"
    two_saved(folder, mesh)
    known = seals.newest(folder)
    assert known is not None and known == seals.newest(saved)  # of equal arrays
    shutil.rmtree(folder / "2")
    assert seals.newest(folder) not in (None, known)
    assert seals.newest(tmp_path / "nothing") is None


def test_removing_a_checkpoint_of_another_shape_goes_on_from_the_one_before(tmp_path, mesh):
    """The remedy of the message, as it says."""
    folder = tmp_path / "c"
    c = Checkpointer(folder, keep=2)
    c.save(1, tree(1.0, mesh), {"step": 1})
    c.save(2, {"x": sharding.place(np.zeros(3, np.float32), mesh)}, {"step": 2})
    c.close()
    with pytest.raises(InputError, match=r"of another shape.*remove it to go on") as error:
        after_damage(folder, mesh)
    shutil.rmtree(folder / "2")
    assert str(folder / "2") in str(error.value)
    assert after_damage(folder, mesh) == ({1.0}, 1)


def test_a_process_that_was_lost_is_no_full_disk(tmp_path, monkeypatch):
    """The sums of a state's bits are of all processes: their error is no error of the disk."""
    lost = ValueError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer")

    def sealed(*_):
        raise lost

    monkeypatch.setattr("vbon_jax.training.seals.sealed", sealed)
    checkpointer = Checkpointer(tmp_path / "run", 1)
    with pytest.raises(InputError, match="could not be written"):  # in a run of one process
        checkpointer.save(1, {"x": jnp.ones(2)}, {})
    monkeypatch.setattr("vbon_jax.exits._on_abort", object())
    with pytest.raises(ValueError, match="Gloo") as error:
        checkpointer.save(1, {"x": jnp.ones(2)}, {})
    assert error.value is lost
    checkpointer.close()
