"""Files of tensors against safetensors' own reader and writer; every fault is named."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from vbon_jax.errors import InputError
from vbon_jax.models.hf import tensor_files
from vbon_jax.models.hf.tensor_files import CheckpointError, TensorToWrite

NONE = r"(?!)"  # matches no name: no buffers
ARRAYS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(
        {"m.wte": (13, 6), "m.a": (6, 18), "m.b": (18,), "m.c": (10, 6), "head": (3, 6)}.items()
    )
}


def write(directory, arrays=ARRAYS, shard_bytes=10**9, dtypes=()):
    tensors = [
        TensorToWrite(name, array.shape, dict(dtypes).get(name, "F32"), lambda array=array: array)
        for name, array in arrays.items()
    ]
    tensor_files.write(directory, tensors, shard_bytes)


def read(directory, prefix="m.", buffers=NONE):
    found = tensor_files.scan(directory, prefix, buffers)
    return {name: tensor_files.read_rows(t, 0, t.shape[0]) for name, t in found.items()}


def without_prefix(arrays):
    return {name.removeprefix("m."): array for name, array in arrays.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture
def shards(tmp_path):
    """A directory of three files, one with the tensor wte alone, and its index."""
    write(tmp_path, shard_bytes=500)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    return tmp_path, tmp_path / "model.safetensors.index.json"


# Round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_what_is_written_comes_back(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes=shard_bytes)
    assert_equal(read(tmp_path), without_prefix(ARRAYS))
    assert_equal(read(tmp_path, prefix="x."), ARRAYS)
    files = [safetensors.numpy.load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert_equal({name: array for file in files for name, array in file.items()}, ARRAYS)


def test_what_others_wrote_is_read(tmp_path):
    theirs = {
        "m.half": torch.randn(5, 3).to(torch.float16),
        "m.brain": torch.randn(4).to(torch.bfloat16),
        "m.single": torch.randn(2, 3, 4),
        "m.mask": torch.ones(1, 2, dtype=torch.uint8),
    }
    safetensors.torch.save_file(theirs, tmp_path / "model.safetensors", {"format": "pt"})
    got = read(tmp_path, buffers="mask|other")
    assert {name: array.dtype for name, array in got.items()} == {
        "half": np.float16, "brain": jnp.bfloat16, "single": np.float32,
    }  # fmt: skip
    for name, array in got.items():
        np.testing.assert_array_equal(array.astype(np.float32), theirs[f"m.{name}"].float())


@pytest.mark.parametrize(("start", "stop"), [(0, 13), (0, 1), (5, 9), (12, 13)])
def test_rows_are_read_alone(tmp_path, start, stop):
    write(tmp_path, shard_bytes=900)
    found = tensor_files.scan(tmp_path, "m.", NONE)["wte"]
    rows = tensor_files.read_rows(found, start, stop)
    np.testing.assert_array_equal(rows, ARRAYS["m.wte"][start:stop])


@pytest.mark.parametrize("piece", [1, 3 * 6 * 4, 2**20])
def test_equal_tensors(tmp_path, monkeypatch, piece):
    """Whatever the dtype, to the last number, a piece at a time."""
    wte = ARRAYS["m.wte"].astype(jnp.bfloat16).astype(np.float32)
    other = wte.copy()
    other[-1, -1] += 1
    write(tmp_path, {"a": wte, "b": wte, "c": other}, dtypes={"b": "BF16"})
    found = tensor_files.scan(tmp_path, "", NONE)
    rows, real = [], tensor_files.read_rows

    def counted(tensor, start, stop):
        rows.append(stop - start)
        return real(tensor, start, stop)

    monkeypatch.setattr(tensor_files, "PIECE", piece)
    monkeypatch.setattr(tensor_files, "read_rows", counted)
    assert tensor_files.equal(found["a"], found["b"])
    assert max(rows) == {1: 1, 72: 3}.get(piece, 13)
    assert not tensor_files.equal(found["a"], found["c"])


# Strictness


def test_faults_of_tensors_are_listed_at_once(tmp_path):
    arrays = {**ARRAYS, "m.d": np.ones((2, 3), np.float32), "m.e": np.ones(3, np.int32)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    found = tensor_files.scan(tmp_path, "m.", NONE)
    wanted = {name: array.shape for name, array in without_prefix(arrays).items()}
    wrong = {**wanted, "d": (3, 2), "x": (1,), "w": (1,)}
    del wrong["b"], wrong["head"]
    message = (
        r"/here: tensors missing: w, x; unexpected: b, head;"
        r" misshapen: d \(2, 3\), expected \(3, 2\); of a dtype other than F32, F16, BF16: e I32$"
    )
    with pytest.raises(CheckpointError, match=message):
        tensor_files.check(found, wrong, tmp_path / "here")
    del found["e"], wanted["e"]
    tensor_files.check(found, wanted, tmp_path)


def test_absent_and_broken_files_are_named(tmp_path):
    write(tmp_path)
    weights = tmp_path / "model.safetensors"
    found = tensor_files.scan(tmp_path, "m.", NONE)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        tensor_files.scan(tmp_path, "m.", NONE)
    last = max(found.values(), key=lambda t: t.offset)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ended while it was read"):
        tensor_files.read_rows(last, 0, last.shape[0])
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no "):
        tensor_files.scan(tmp_path, "m.", NONE)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"but weights\.safetensors: rename the file"):
        tensor_files.scan(tmp_path, "m.", NONE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        tensor_files.scan(tmp_path, "m.", NONE)


def test_json_that_is_none_is_named(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(CheckpointError, match=r"no file .*x\.json: give a directory"):
        tensor_files.read_json(file)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json cannot be read as JSON"):
        tensor_files.read_json(file)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"x\.json holds a list"):
        tensor_files.read_json(file)
    file.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"x\.json cannot be read as JSON"):
        tensor_files.read_json(file)


def test_a_shard_that_is_gone_is_named(shards):
    directory, _ = shards
    first = min(directory.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"not there: {first}"):
        read(directory)


def test_a_tensor_in_two_shards_is_refused(shards):
    directory, _ = shards
    last = max(directory.glob("*.safetensors"))
    both = safetensors.numpy.load_file(last) | {"m.wte": ARRAYS["m.wte"]}
    safetensors.numpy.save_file(both, last)
    with pytest.raises(CheckpointError, match=r"tensors duplicate: wte$"):
        read(directory)


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path):
    write(tmp_path, ARRAYS | {"wte": ARRAYS["m.wte"]})
    with pytest.raises(CheckpointError, match=r"tensors duplicate: wte$"):
        read(tmp_path)


def test_an_index_and_its_shards_must_agree(shards):
    directory, index = shards
    value = json.loads(index.read_text())
    file = value["weight_map"].pop("m.wte")
    value["weight_map"]["m.ghost"] = file
    index.write_text(json.dumps(value))
    message = r"missing, though the index names them: m\.ghost; unexpected, .*: m\.wte$"
    with pytest.raises(CheckpointError, match=message):
        read(directory)
    index.write_text(json.dumps({"weight_map": [file]}))
    with pytest.raises(CheckpointError, match="weight_map must map"):
        read(directory)


# Writing


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_a_crash_leaves_the_old_files_whole(tmp_path, monkeypatch, shard_bytes):
    """The disk is full at the last of the files of weights."""
    write(tmp_path, shard_bytes=shard_bytes)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    last = max(name for name in before if name.endswith(".safetensors"))
    real = os.fsync

    def full(number):
        if last in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError("disk full")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    doubled = {name: 2 * array for name, array in ARRAYS.items()}
    with pytest.raises(InputError, match="disk full"):
        write(tmp_path, doubled, shard_bytes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write(tmp_path, doubled, shard_bytes)
    assert_equal(read(tmp_path), without_prefix(doubled))
    assert {file.name for file in tmp_path.iterdir()} == before.keys()


def test_weights_are_split_and_those_of_another_split_go(tmp_path):
    def weights():
        return sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("model"))

    write(tmp_path / "new")
    assert_equal(read(tmp_path / "new"), without_prefix(ARRAYS))
    (tmp_path / "notes.safetensors").write_text("somebody's")
    write(tmp_path)
    for shard_bytes, n in ((500, 3), (900, 2)):
        write(tmp_path, shard_bytes=shard_bytes)
        assert_equal(read(tmp_path), without_prefix(ARRAYS))
        files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        assert weights() == [*files, "model.safetensors.index.json"]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(x.nbytes for x in ARRAYS.values())}
        for file in files:
            tensors = safetensors.numpy.load_file(tmp_path / file)
            assert sum(x.nbytes for x in tensors.values()) <= shard_bytes
            assert {index["weight_map"][name] for name in tensors} == {file}
    write(tmp_path)
    assert weights() == ["model.safetensors"]
    assert (tmp_path / "notes.safetensors").exists()


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path):
    write(tmp_path, shard_bytes=100)
    files = [safetensors.numpy.load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [list(file) for file in files] == [[name] for name in ARRAYS]


@pytest.mark.parametrize("piece", [1, 50, 2**20])
def test_a_file_of_two_dtypes_is_aligned(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    odd = ARRAYS | {"m.first": np.ones(3, np.float32), "m.wte": ARRAYS["m.wte"][:, ::-1]}
    order = ["m.first", *ARRAYS]
    write(tmp_path, {name: odd[name] for name in order}, dtypes={"m.first": "BF16"})
    file = tmp_path / "model.safetensors"
    with safetensors.safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert handle.offset_keys() == [*ARRAYS, "m.first"]  # behind all float32
    assert all(t.offset % 4 == 0 for t in tensor_files.scan(tmp_path, "", NONE).values())
    tensors = safetensors.torch.load_file(file)
    assert tensors["m.first"].dtype == torch.bfloat16
    assert_equal({name: tensor.float().numpy() for name, tensor in tensors.items()}, odd)


def test_json_files_are_written_together(tmp_path, monkeypatch):
    tensor_files.write_jsons(tmp_path, {"a.json": {"x": "é"}, "b.json": {"y": [1, None]}})
    assert tensor_files.read_json(tmp_path / "a.json") == {"x": "é"}
    assert tensor_files.read_json(tmp_path / "b.json") == {"y": [1, None]}
    real = os.fsync
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError("disk full")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk full"):
        tensor_files.write_jsons(tmp_path, {"a.json": {}, "b.json": {}})
    assert tensor_files.read_json(tmp_path / "a.json") == {"x": "é"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b.json"]
