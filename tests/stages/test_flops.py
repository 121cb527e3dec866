"""The formulas of operations, against those that the run's own programs are traced to."""

import math

import pytest
from jax.extend.core import jaxprs_in_params

from tests.stages import plans
from tests.stages.plans import CLASSIFIER
from vbon_jax import sharding
from vbon_jax.stages import STAGES
from vbon_jax.stages import need as needs
from vbon_jax.stages.workdir import Workdir


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return plans.make_models(tmp_path_factory.mktemp("flops"))


def operations(jaxpr, trips):
    """Of the matrix products of a program, those in loops as often as they run.

    A loop without a length, over tokens or epochs, is taken to run ``trips`` times.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            left, summed = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"][0][0]
            total += 2 * math.prod((*eqn.outvars[0].aval.shape, *(left[i] for i in summed)))
        times = {"scan": eqn.params.get("length"), "while": trips}.get(eqn.primitive.name, 1)
        total += times * sum(operations(x, trips) for x in jaxprs_in_params(eqn.params))
    return total


FLAGS = ("samples.path=", "prompts.path=", "prompts.max_tokens=8", "memory.chunk=128")


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (("memory.remat=none",), 0),
        (("memory.remat=none", "train.penalty=full", "train.ppo_epochs=3"), 0),
        (("memory.remat=dots", "memory.accumulate=2"), 0),
        # What no gradient reads is not computed again: the last product of a block.
        (("memory.remat=full",), 0.025),
        (("memory.remat=full", "train.group=4", "sampling.max_new_tokens=16"), 0.025),
        (("memory.remat=none", "train.num_layers_unfrozen=1"), 0),
        (("memory.remat=none", "lora.rank=1", "lora.targets=('v',)"), 0),
        (("memory.remat=none", "train.value_network=reward", *CLASSIFIER), 0),
    ],
)  # fmt: skip
def test_operations_are_those_of_the_programs(root, monkeypatch, flags, again):
    c = plans.config(root, *FLAGS, *flags)
    traced = {}

    def keep(world, program, phase):
        traced[phase] = program
        return 0

    monkeypatch.setattr(needs, "_new_bytes", keep)
    found = needs.need(c, sharding.make_mesh(), Workdir(root / "nowhere", c, STAGES)).flops
    for phase, trips in (("rollout", c.sampling.max_new_tokens), ("update", c.train.ppo_epochs)):
        counted = operations(traced[phase].jaxpr.jaxpr, trips)
        told = sum(size for name, size in found.items() if name.startswith(phase))
        most = again if phase == "update" else 0
        assert 0.995 * counted < told <= (1 + most) * counted


def test_devices_share_the_work(root, monkeypatch):
    monkeypatch.setattr(needs, "_new_bytes", lambda *_: 0)
    c = plans.config(root, *FLAGS)
    one, many = (
        needs.need(c, sharding.make_mesh(*x), Workdir(root / "nowhere", c, STAGES)).flops
        for x in ((1, 1, 1), (2, 2, 2))
    )
    assert one.keys() == many.keys() == {
        "stage sample, all of it", "rollout, prompts", "rollout, responses", "update, score",
        "update, gradient steps",
    }  # fmt: skip
    assert all(one[name] == pytest.approx(8 * many[name]) for name in one)
