"""What a plan tells of a run, against the arrays that the run really has."""

import gc
import shutil
from functools import partial

import jax
import pytest

from tests.stages import plans
from tests.stages.plans import CLASSIFIER, POLICY, config
from vbon_jax import sharding
from vbon_jax.data import prompts as prompt_files
from vbon_jax.errors import InputError
from vbon_jax.methods import learning
from vbon_jax.models import hf
from vbon_jax.models.hf import CheckpointError
from vbon_jax.stages import STAGES, base, loading, shapes
from vbon_jax.stages import need as needs
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training.learner import Program


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return plans.make_models(tmp_path_factory.mktemp("plan"))


def need(root, *flags, mesh=(1, 1, 1), folder="nowhere"):
    c = config(root, *flags)
    return needs.need(c, sharding.make_mesh(*mesh), Workdir(root / folder, c, STAGES))


def held_by_first(tree):
    """Bytes of a tree on the first device, from the arrays' own shards."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first]
    return sum(shard.data.nbytes for shard in shards)


def held(root, monkeypatch, *flags, mesh=(1, 1, 1)):
    """Of a plan what is held; nothing is compiled."""
    with monkeypatch.context() as patch:
        patch.setattr(needs, "_new_bytes", lambda *_: 0)
        return need(root, *flags, mesh=mesh).held


@pytest.mark.parametrize(
    ("flags", "mesh"),
    [
        ((), (1, 1, 1)),
        (("train.num_layers_unfrozen=1", "memory.optimizer_dtype=bfloat16"), (1, 1, 1)),
        (("lora.rank=4", "memory.frozen_dtype=bfloat16"), (1, 1, 1)),
        (("train.value_network=reward", "memory.param_dtype=bfloat16"), (1, 1, 1)),
        ((), (1, 8, 1)),
        (("train.num_layers_unfrozen=1", "memory.frozen_dtype=bfloat16"), (1, 4, 2)),
        (("method.name=dpo", "offline.responses=4", "offline.pairs=2"), (2, 2, 1)),
        (("method.name=bond", "bond.form=jeffreys", "lora.rank=2"), (1, 2, 1)),
        (("method.name=bon_sft", "method.n=4", "offline.pairs=4"), (1, 2, 2)),
        (("train.average_half_life=5", "lora.rank=2"), (1, 2, 1)),
    ],
)  # fmt: skip
def test_what_is_held_is_what_the_arrays_are(root, tmp_path, monkeypatch, flags, mesh):
    flags = (*CLASSIFIER, *flags)
    found = held(root, monkeypatch, *flags, mesh=mesh)
    s = config(root, *flags)
    run = base.Run(s, Workdir(tmp_path, s, STAGES), sharding.make_mesh(*mesh))
    for stage in ("sft", "reward", "sample"):
        base.perform(run, STAGES[stage], again=False)
    with jax.set_mesh(run.mesh):
        task, samples = loading.task(run, s.method.estimator)
        job = loading.job(run, task.sampler.model.config, len(task.prompts))
        first, _ = learning.single(job, task, loading.member(s), samples)
        _, reward, _ = hf.load_classifier(
            root / "reward", place=partial(sharding.sharding_of, run.mesh),
            dtype=s.memory.frozen_dtype,
        )  # fmt: skip
        assert found["reference"] == held_by_first(task.reference)
        assert found["reward"] == held_by_first(reward)
        assert found["trained"] == held_by_first(first.params)
        assert found["optimizer"] == held_by_first(first.opt_state)
        table = sharding.place(task.references, run.mesh)
        assert found["reference rewards"] == held_by_first(table)
        if not job.method.online:
            pool = learning._pool(job, task, samples)[0]
            assert found["pool of samples"] == held_by_first(pool)
        else:
            assert "pool of samples" not in found


def test_what_a_head_says_is_held_beside_the_rewards(root, monkeypatch):
    s = config(root)
    plain, headed = (
        held(root, monkeypatch, *flags)["reference rewards"]
        for flags in ((), ("samples.amortised=True",))
    )
    pool, edges = plain // 4 - 1, 65  # beside the rewards there is m
    prompts = pool // s.samples.m
    assert prompts > 1 and headed - plain == 4 * (pool + edges + prompts * edges + 1)


def test_a_start_is_a_phase_of_training(root, monkeypatch):
    """Its state, its samples and its steps, less what the method's own state takes after it."""
    with monkeypatch.context() as patch:
        patch.setattr(needs, "_new_bytes", lambda *_: 0)
        few = need(root, "train.start=weighted")
        assert "start" not in need(root).phases
    sft = held(root, monkeypatch, "method.name=bon_sft", "method.n=4")
    vbon = held(root, monkeypatch)
    pool = sft["pool of samples"]
    more = sft["trained"] + sft["optimizer"] - vbon["trained"] - vbon["optimizer"]
    logits = few.phases["start"] - pool - more
    assert 0 <= logits <= 4 * 2 * 16 * 24 * POLICY.vocab_size + 64  # as of 32 rows of logits
    assert few.held == vbon
    # The best so far stands beside the weights, and the average does.
    weights = vbon["trained"]
    assert held(root, monkeypatch, "train.average_half_life=5")["trained"] > 1.9 * weights


def update(root, monkeypatch, *flags):
    """Bytes of the phase "update"; nothing else is looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(needs, "_rollout_bytes", lambda *_: (0, 0))
        return need(root, *flags).phases["update"]


def test_what_makes_an_update_smaller(root, monkeypatch):
    usual = update(root, monkeypatch)
    for flag in ("memory.accumulate=4", "memory.chunk=32", "memory.remat=full"):
        assert update(root, monkeypatch, flag) < 0.97 * usual, flag


def test_the_state_is_updated_in_place(root, monkeypatch):
    """One response of one token: gradients and their like, but no second state."""
    small = ["train.batch_size=1", "train.minibatch_size=1", "sampling.max_new_tokens=1"]
    found = update(root, monkeypatch, *small)
    state = held(root, monkeypatch, *small)
    assert found < state["trained"] + state["optimizer"]


def test_smaller_batches_make_smaller_rollouts(root, monkeypatch):
    """Twice as many rows in stage sample as in training."""
    monkeypatch.setattr(learning.Job, "program", _no_update)
    usual = need(root, "samples.path=")
    less = need(root, "samples.path=", "train.batch_size=16", "sampling.batch_size=32")
    assert less.phases["rollout"] < usual.phases["rollout"]
    assert less.sample < usual.sample
    assert usual.cache < usual.phases["rollout"] < usual.sample - usual.held["reference"]
    assert usual.peak == max(usual.sample, usual.train)
    slots = 32 * (8 + 24)  # a prompt's columns are a power of two up to 8
    a_slot = 2 * POLICY.layers * POLICY.width * 4 + 1 + 4  # keys and values, mask, position
    fewer = need(root, "memory.rollout_rows=4")
    assert fewer.cache < usual.cache / 2
    assert usual.cache == slots * a_slot + 2 * 4  # an index for prompts and one for responses


def test_an_update_reads_the_rows_and_candidates_that_training_gives_it(root, monkeypatch):
    """The program is traced with them; 32 responses of 24 tokens, as many stored samples."""
    monkeypatch.setattr(needs, "_new_bytes", lambda *_: 0)
    usual = need(root, "samples.path=").phases["update"]
    with_stored = need(root, "samples.path=", "train.replay=1").phases["update"]
    a_row = (8 + 24) * (4 + 1) + 24 * 4 + 1 + 4 + 4  # tokens, masks; log-probs, ended, reward, row
    assert with_stored - usual == 32 * a_row
    prefixes = need(root, "samples.path=", "train.value_network=prefix").phases["update"]
    ahead = need(root, "samples.path=", "train.value_network=prefix", "train.lookahead=5").phases[
        "update"
    ]
    assert ahead - prefixes == 32 * 24 * 5 * (4 + 4 + 1 + 4)  # id, log-prob, end and reward


def _no_update(job):
    """An online method that does nothing with what it gets."""
    size, rows = job.training.train.batch_size, job.training.memory.rollout_rows
    return Program(lambda state, *_: (state, {}), ("decoder",), size, lambda step: 0.0, rows=rows)


def test_prompts_are_counted_where_they_can_be(root, tmp_path):
    s = config(root)
    run = base.Run(s, Workdir(root / "made", s, STAGES), sharding.make_mesh())
    for stage in ("sft", "reward", "sample"):
        base.perform(run, STAGES[stage], again=False)
    longest = max(len(p.tokens) for p in prompt_files.read_jsonl(run.workdir.prompts("train")))
    assert 4 < longest < 8
    nowhere = Workdir(tmp_path, s, STAGES)
    assert shapes._prompts(s, run.workdir) == (64, longest)  # those the run has made
    assert shapes._prompts(s, nowhere) == (64, longest)  # of the samples
    assert shapes._prompts(config(root, "samples.path="), nowhere) == (64, longest)  # of the file
    chat = config(root, "samples.path=", "prompts.format=chat", "prompts.longest=16")
    assert shapes._prompts(chat, nowhere) == (64, 16)
    prefixes = config(root, "samples.path=", "prompts.path=", "prompts.max_tokens=5")
    assert shapes._prompts(prefixes, nowhere) == (prefixes.prompts.train, 5)


def test_a_config_alone_is_enough_of_a_model(root, tmp_path, monkeypatch):
    """Neither weights nor a tokenizer, as long as no text has to be counted."""
    shutil.copy(root / "policy" / "config.json", tmp_path)
    bare = (f"reference.path={tmp_path}", "samples.path=", "prompts.path=", "prompts.max_tokens=7")
    assert held(root, monkeypatch, *bare)["reference"] == held(root, monkeypatch)["reference"]
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        held(root, monkeypatch, f"reference.path={tmp_path}")


def test_phases_of_every_method(root):
    jeffreys = need(root, "method.name=bond", "bond.form=jeffreys", *CLASSIFIER)
    assert jeffreys.phases.keys() == {"score by reward", "rollout", "update"}
    offline = need(root, "method.name=bon_sft", "method.n=2", "lora.rank=2", *CLASSIFIER)
    assert offline.phases.keys() == {"log pi_ref", "gradient steps"} and offline.cache == 0
    assert all(size > 0 for found in (jeffreys, offline) for size in found.phases.values())
    none = need(root, "method.name=bon")
    assert none.phases == {} and none.held.keys() == {"reference"} and none.peak == none.sample


def test_on_the_host_a_checkpoint_waits_and_products_take_more(root, monkeypatch):
    monkeypatch.setattr(needs, "_new_bytes", lambda *_: 0)
    host, device = (need(root, f"memory.device_gib={x}", "memory.chunk=32") for x in (0, 1))
    assert "checkpoint" not in device.phases
    assert 0 <= host.phases["checkpoint"] - device.held["trained"] - device.held["optimizer"] < 20
    assert host.phases["update"] - device.phases["update"] == 4 * 32 * POLICY.vocab_size


def test_nothing_is_allocated_or_written(root):
    gc.collect()
    before = len(jax.live_arrays())
    need(root, "method.name=dpo", "offline.responses=4", "offline.pairs=2", *CLASSIFIER)
    need(root, "lora.rank=2", *CLASSIFIER)
    gc.collect()
    assert len(jax.live_arrays()) == before
    assert not (root / "nowhere").exists()


def test_a_missing_reward_is_an_error_too(root):
    with pytest.raises((InputError, CheckpointError), match="/no/such"):
        need(root, "reward.function=", "reward.path=/no/such")
