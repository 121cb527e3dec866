"""A vBoN iteration measured at a small size: phases add up, and operations are counted right."""

import dataclasses

import jax
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.bench import ppo as bench
from vbon_jax.methods import vbon
from vbon_jax.models import decoder
from vbon_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(vocab_size=40, positions=16, layers=2, width=16, heads=2, mlp_width=24)
WORK = bench.Work(rows=8, prompt=4, new=3, epochs=2, minibatch=4)
ROW = {"seconds": 2.0, "operations": 3e12, "rate": 1.5e12}


@pytest.fixture(scope="module")
def measured():
    """The times of an iteration, what it was compiled for, and how many programs updates took."""
    setups, before = [], vbon.update._cache_size()
    real = bench._phase_seconds

    def phase_seconds(given, setup, repeats):
        setups.append(setup)
        return real(given, setup, repeats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_phase_seconds", phase_seconds)
        found = bench.iteration_times(CONFIG, WORK, unfrozen=1, penalty="full", repeats=1)
    return found, setups[0], vbon.update._cache_size() - before


def test_phases_add_up(measured):
    found, setup, programs = measured
    assert programs == 1  # a second one would count as time
    assert setup.config == dataclasses.replace(CONFIG, remat="none")
    assert setup.train.num_layers_unfrozen == 1 and setup.full_penalty
    assert tuple(found) == bench.PHASES
    parts = [found[phase] for phase in ("rollout", "score", "epochs")]
    for key in ("seconds", "operations"):
        assert found["iteration"][key] == pytest.approx(sum(part[key] for part in parts))
    assert found["rollout"]["seconds"] > 0 and found["score"]["seconds"] > 0
    assert all(row["rate"] == row["operations"] / row["seconds"] for row in found.values())
    counted = bench.operations(CONFIG, WORK, 1, "full")
    assert {phase: found[phase]["operations"] for phase in counted} == counted


def test_experience_is_what_the_update_computes_first(measured):
    _, setup, _ = measured
    given = bench.arguments(setup, WORK, "float32")
    rest = (given.table, given.n, given.beta)
    with jax.set_mesh(given.sampler.mesh):
        batch = given.scored(given.draw(given.state.params["decoder"]))
        exp, metrics = bench.experience(
            given.state.params, given.reference, batch, *rest, setup=setup
        )
        _, all_metrics = vbon.update(given.state, given.reference, (batch,), *rest, setup=setup)
    assert exp.tokens_BxS.shape == (8, 7) and exp.response_mask_BxT.shape == (8, 3)
    assert np.all(exp.response_mask_BxT)  # no response ends early
    assert metrics.keys() < all_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, all_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def kernels(config):
    """Multiplications per token of the products of all blocks, and of the output projection."""
    shapes = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes["blocks"])
    blocks = sum(x.size for path, x in leaves if sharding.path_of(path).endswith("kernel"))
    return blocks, config.width * config.vocab_size


def test_operations_of_a_model_that_is_all_trained():
    """Forward and backward are three products each, of a model whose MLP is gated."""
    config = dataclasses.replace(CONFIG, gated=True, kv_heads=1, head_width=4)
    blocks, head = kernels(config)
    forward = 2 * 8 * 7 * blocks + 2 * 8 * 3 * head
    assert bench.operations(config, WORK, -1, "sampled") == {
        "rollout": forward,
        "score": 2 * forward,
        "epochs": 2 * 3 * forward,
    }


def test_operations_above_a_frozen_trunk():
    """Its block runs in the rollout alone."""
    blocks, head = kernels(CONFIG)
    block, tokens, drawn = blocks // 2, 8 * 7, 8 * 3
    sampled, full = (bench.operations(CONFIG, WORK, 1, x) for x in ("sampled", "full"))
    assert sampled["score"] == 2 * tokens * 2 * block + 2 * drawn * 2 * head
    assert sampled["epochs"] == 2 * (2 * tokens * 3 * block + 2 * drawn * 2 * head)
    assert full["epochs"] - sampled["epochs"] == 2 * 2 * drawn * head  # the reference's logits
    assert full["rollout"] == sampled["rollout"]


def test_a_prompt_is_counted_once_for_its_group():
    blocks, head = kernels(CONFIG)
    work = dataclasses.replace(WORK, group=4)
    found = bench.operations(CONFIG, work, -1, "sampled")
    assert found["rollout"] == 2 * (8 * 3 + 2 * 4) * blocks + 2 * 8 * 3 * head
    assert found["epochs"] == 2 * 3 * found["rollout"] and found["score"] == 2 * found["rollout"]


def test_the_responses_to_a_prompt_stand_beside_each_other(measured):
    _, setup, _ = measured
    given = bench.arguments(setup, dataclasses.replace(WORK, group=4), "float32")
    assert [(r.prompt_id, r.sample) for r in given.requests] == [
        (p, s) for p in range(2) for s in range(4)
    ]
    assert given.row_B.tolist() == [0] * 4 + [1] * 4 and given.table.rewards_PxM.shape[0] == 2
    assert len({r.tokens for r in given.requests}) == 2


def test_every_phase_has_a_row():
    (row,) = bench.rows({"score": ROW}, "2 blocks", peak=3e12)
    assert (row.what, row.value, row.unit, row.ratio) == ("2 blocks: score", 2.0, "s", 0.5)
