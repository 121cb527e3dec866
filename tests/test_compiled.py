"""What the compiled programs of each mesh send between devices."""

import dataclasses
import itertools
import platform
import re
import sys
from functools import partial

import jax
import jax.export
import pytest
from jax.experimental import topologies

from tests import programs
from vbon_jax import compiled, sharding
from vbon_jax.errors import InputError
from vbon_jax.sampling.logits import BLOCK
from vbon_jax.stages import topology

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "2x2x2": (2, 2, 2)}
SIZES = programs.Bytes()


def test_the_forms_that_collectives_are_written_in():
    text = """HloModule jit_f

%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/while/body/block/dot"}
  %again = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%beside
}

%beside (p: f32[8]) -> f32[8,4] {
  %ag.1 = f32[8,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.3 (p: f32[16]) -> f32[2] {
  %ar = f32[16]{0} all-reduce(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %v = (s32[], f32[8]) while(%t), condition=%other, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %p = bf16[6]{0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %q = bf16[3]{0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %q.1 = bf16[3]{0} collective-permute(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %one = f32[99]{0} all-reduce(%x), channel_id=9, replica_groups={{0},{1}}, to_apply=%add
  %f = f32[2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %r = (f32[4]{0}, pred[3]{0}) all-reduce(%x, %y), channel_id=5, replica_groups={{0,1}}, to_apply=%add
}
"""  # noqa: E501
    everything = compiled.collectives(text)
    found = {(c.kind, c.shapes, c.devices, c.loops, c.times): c for c in everything}
    f32 = lambda *shape: ("f32", shape)  # noqa: E731
    assert set(found) == {
        ("all-gather", (f32(8, 4),), 4, 1, 8),  # 5 trips and 3, written once more by a fusion
        ("reduce-scatter", (f32(2),), 8, 0, 1),
        ("all-gather", (f32(16),), 8, 0, 1),
        ("collective-permute", (("bf16", (6,)),), 1, 0, 1),
        ("collective-permute", (("bf16", (3,)),), 1, 0, 1),  # two of the same channel
        ("all-reduce", (f32(4), ("pred", (3,))), 2, 0, 1),
    }
    assert len(everything) == len(found) + 1
    sizes = {
        c.kind: (c.size, c.moved)
        for c in found.values()
        if c.shapes not in ((f32(16),), (("bf16", (3,)),))
    }
    assert sizes == {
        "all-gather": (128, 96), "reduce-scatter": (64, 56), "collective-permute": (12, 12),
        "all-reduce": (19, 19),
    }  # fmt: skip
    assert next(iter(found.values())).path == "jit(f)/while/body/block/dot"


@pytest.fixture(scope="module")
def v5e():
    """The devices of a TPU slice that is not here: libtpu compiles for it all the same."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("there is no libtpu for this machine")
    return topology.devices("v5e:2x4")


@pytest.fixture(scope="module", params=itertools.product(("cpu", "tpu"), MESHES), ids="-".join)
def mesh(request):
    kind, name = request.param
    devices = request.getfixturevalue("v5e") if kind == "tpu" else jax.devices("cpu")
    return name, sharding.make_mesh(*MESHES[name], devices=devices)


def collectives(of, mesh):
    return compiled.collectives(programs.lowered(of, mesh).compile().as_text())


def test_an_update_sends_weights_and_their_gradients_not_activations(mesh):
    """Arrays of a layer are in loops, twice as deep as those of the ends of the model."""
    name, mesh = mesh
    found = collectives(programs.update_of, mesh)
    assert SIZES.residual > 2 * (SIZES.layer + SIZES.embedding)  # it would be seen
    # Shuffled rows may come from any device: a minibatch's tokens, and hidden states of the
    # reference for the penalty, are sent about once a step, by any mesh.
    found = [c for c in found if not c.path.endswith("closed_call/gather")]
    if name in ("data", "fsdp"):
        weights = SIZES.layer if name == "fsdp" else SIZES.layer * SIZES.config.layers
        assert all(c.size <= weights + 1.1 * 2 * SIZES.embedding for c in found)
        gathered = [c for c in found if c.kind == "all-gather"]
        in_layers = sum(c.size * c.times for c in gathered if "squeeze" in c.path)
        # Of policy and reference to score, of the policy forward and backward.
        expected = 4 * SIZES.config.layers * SIZES.matrices if name == "fsdp" else 0
        assert expected / 2 <= in_layers <= expected  # a TPU's products are of bfloat16
        assert sum(c.size * c.times for c in gathered) <= expected + 5 * SIZES.embedding
    else:  # sums of partial products of a layer's rows, three of them at once
        rows = SIZES.residual * (1 if name == "tensor" else 1 / 4)
        assert all(c.size <= max(3 * rows, SIZES.layer + SIZES.embedding) for c in found)
        assert "all-gather" not in {c.kind for c in found if "/block/" in c.path}


@pytest.mark.parametrize("name", ["data", "2x4"])
def test_gradients_are_sent_once_a_step_however_many_microbatches(name):
    """Along data; with a tied embedding once, not for each of its uses."""
    mesh = sharding.make_mesh(*{**MESHES, "2x4": (2, 4, 1)}[name], devices=jax.devices("cpu"))
    program = partial(programs.update_of, accumulate=2)
    summed = [c for c in collectives(program, mesh) if c.path.endswith("shard_map/psum")]
    whole = SIZES.layer * SIZES.config.layers + SIZES.embedding
    held = whole if name == "data" else whole / 4  # a device sends what it holds of them
    sent = sum(c.size * c.times for c in summed if c.devices == mesh.shape["data"])
    assert held <= sent <= 1.3 * held
    assert not [c for c in summed if c.loops > 1]  # that of gradient steps


def test_a_decoding_step_sends_neither_logits_nor_weights(mesh):
    name, mesh = mesh
    found = collectives(programs.rollout_of, mesh)
    largest = max(c.size for c in found if c.loops)
    inside = 4 * programs.ROWS * BLOCK  # the masses of a row's own block of the vocabulary
    assert SIZES.logits > 4 * SIZES.step and SIZES.logits > inside
    assert largest <= {"data": 8, "fsdp": 8}.get(name, max(SIZES.step, inside) + 4 * programs.ROWS)
    assert all(c.size <= SIZES.residual for c in found)


def test_rows_that_take_responses_in_turns_send_nothing_along_data_and_fsdp(mesh):
    """Each device has slots of its own, which those along ``tensor`` alone compute together."""
    name, mesh = mesh
    sent = [c for c in collectives(programs.slots_of, mesh) if c.loops]
    if name in ("data", "fsdp"):
        assert not sent
    else:
        inside = 4 * programs.ROWS * BLOCK
        assert 4 < max(c.size for c in sent) <= max(SIZES.step, inside) + 4 * programs.ROWS
        shared = [c for c in sent if c.devices > mesh.shape["tensor"]]
        assert all(c.size <= 4 for c in shared)  # whether any of them goes on


def test_of_several_slices_data_alone_goes_from_one_to_another(v5e):
    del v5e  # what libtpu is told of its machine
    two = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x4", num_slices=2
    ).devices
    mesh = sharding.make_mesh(2, 4, 2, devices=two)
    assert mesh.axis_names == sharding.AXES and mesh.devices.shape == (2, 4, 2)
    slices = [{d.slice_index for d in half.flat} for half in mesh.devices]
    assert slices == [{0}, {1}]
    assert sharding.make_mesh(-1, 2, 2, devices=two).shape["data"] == 4
    with pytest.raises(InputError, match=r"mesh\.data may go from one to another: make it a mult"):
        sharding.make_mesh(1, 8, 2, devices=two)


@pytest.mark.parametrize("of", [programs.update_of, programs.rollout_of])
def test_programs_are_lowered_for_gpus_that_are_not_here(of):
    """XLA compiles for a GPU only where there is one; all that JAX itself does is done anywhere."""
    config = dataclasses.replace(programs.CONFIG, compute_dtype="bfloat16")
    mesh = sharding.make_mesh(*MESHES["2x2x2"], devices=jax.devices("cpu"))
    step, args = of(mesh, config)
    with jax.set_mesh(mesh):
        exported = jax.export.export(step, platforms=["cuda"])(*args)
    assert exported.platforms == ("cuda",) and exported.nr_devices == 8
    text = exported.mlir_module()
    products = re.findall(r"stablehlo.dot_general.*: \(tensor<[^>]*x(\w+)>, tensor<", text)
    assert products.count("bf16") > len(products) / 2
    for axis in ("fsdp", "tensor"):
        assert re.search(rf"sdy.sharding_constraint.*{axis}", text)
