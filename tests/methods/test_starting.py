"""A start from the stored samples: what is trained for it, and what then begins with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import methods
from vbon_jax.errors import InputError
from vbon_jax.methods import bon_sft, starting
from vbon_jax.methods.learning import Job, Training
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Train

CONFIG = DecoderConfig(vocab_size=6, positions=8, layers=1, width=8, heads=2, mlp_width=16)
EVERY = [m for m in methods.METHODS if m.online]


def job(method, start, **options):
    options = method.options(n=4.0, ties="order", estimator="harmonic", **options)
    return Job(method, options, Training(Train(start=start, average_half_life=2.0)), CONFIG, 30)


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.options.__name__)
def test_every_online_method_can_start_from_maximum_likelihood(method):
    assert starting.job(job(method, "reference")) is None
    online = job(method, "weighted")
    found = starting.job(online)
    assert found.method is bon_sft.METHOD
    assert found.options == bon_sft.BoNSFT(n=4.0, ties="order", estimator="harmonic")
    assert (found.training, found.prompts) == (online.training, online.prompts)
    assert found.held_out == 3


REPLAYED = [m for m in EVERY if m.learns.objective(m.options())]


@pytest.mark.parametrize("method", REPLAYED, ids=lambda m: m.options.__name__)
def test_a_method_that_has_a_sequence_reward_can_start_by_its_own_update(method):
    online = job(method, "replay")
    train = dataclasses.replace(
        online.training.train, batch_size=24, minibatch_size=16, warmup=9, replay=2, group=2
    )
    keys = dataclasses.replace(online.training.offline, pairs=5, epochs=2)
    online = dataclasses.replace(
        online, training=dataclasses.replace(online.training, train=train, offline=keys)
    )
    found = starting.job(online)
    assert (found.method, found.options, found.from_store) == (method, online.options, True)
    assert found.held_out == 3 and online.held_out == 0
    assert found.iterations == 2 * 27 * 5 // 24
    own, program = found.training.train, found.program()
    assert (own.warmup, own.replay, own.minibatch_size) == (9, 0, 8)
    assert program.from_store == 27 and program.replay == 0
    assert found.likelihood.method is bon_sft.METHOD and found.likelihood.held_out == 3


def test_a_method_that_learns_from_its_anchor_cannot_start_so():
    (other,) = [m for m in EVERY if m not in REPLAYED]
    with pytest.raises(InputError, match=r"train\.start=replay: bond learns from responses of its"):
        job(other, "replay")


def test_offline_methods_start_as_the_reference():
    dpo = next(m for m in methods.METHODS if m.name == "dpo")
    assert starting.job(job(dpo, "weighted")) is None


@pytest.mark.parametrize(
    ("n", "whole"), [(8.0, 8), (2.4, 2), (1.0, 1), (1.2, 1), (64.0, 16), (15.6, 16)]
)
def test_the_start_of_any_n_is_that_of_the_nearest_whole_one_of_the_samples(n, whole):
    found = starting.member(Member(n, 0.3, 5, 16))
    assert found == Member(float(whole), 0.3, 5, 16)


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.options.__name__)
def test_a_first_state_begins_with_the_policy_in_all_its_copies(method, members):
    make = job(method, "weighted").make_state()
    base = {"wte": jnp.ones((6, 8)), "blocks": {"kernel": jnp.ones((1, 8, 8))}}
    fresh = make(base, None, jax.random.key(0))
    own = jax.tree.map(lambda x: x + 1, base)
    if members:
        fresh, own = (
            jax.tree.map(lambda x: jnp.stack([x] * members), tree) for tree in (fresh, own)
        )
    wanted, old = jax.device_get(own), fresh.params
    kept = {k: v for k, v in jax.device_get(old).items() if k == "value"}
    found = starting.begun(fresh, own)
    assert found.params.keys() == old.keys()
    copies = [name for name in ("decoder", "average", "anchor") if name in found.params]
    assert len(copies) == 2 + method.learns.anchor
    for name in copies:
        jax.tree.map(np.testing.assert_array_equal, found.params[name], wanted)
        assert all(x.is_deleted() for x in jax.tree.leaves(old[name]))
    leaves = [x for name in copies for x in jax.tree.leaves(found.params[name])]
    assert len({id(x) for x in leaves}) == len(leaves)  # each may be donated
    jax.tree.map(np.testing.assert_array_equal, {k: found.params[k] for k in kept}, kept)
