"""The loop that every method goes through: order of prompts, batches, checkpoints, signals."""

import json
import os
import signal
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import decoder
from vbon_jax.progress import Stopped
from vbon_jax.sampling import sampler as engine
from vbon_jax.training import loop
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.loop import LoopPlan, World
from vbon_jax.training.metrics import MetricsWriter

PROMPTS = [Prompt(10 * i, f"p{i}", (i + 1,)) for i in range(5)]


def identities(batch_size, step, seed=3, prompts=PROMPTS):
    requests = loop.batch_requests(prompts, batch_size, step, seed)
    assert len(requests) == batch_size
    return [(r.prompt_id, r.sample) for r in requests]


def test_batches_are_one_endless_sequence_of_whole_passes():
    """Whatever the batch size: 15 positions are 3 passes, each over all prompts once."""
    sequence = [pair for step in range(5) for pair in identities(3, step)]
    assert sequence == identities(15, 0) == [p for i in range(15) for p in identities(1, i)]
    for epoch in range(3):
        own = sequence[5 * epoch : 5 * epoch + 5]
        assert sorted(own) == [(p.id, epoch) for p in PROMPTS]
    assert sequence[:5] != sequence[5:10]  # shuffled anew (as 119 of 120 times)
    assert len(set(sequence)) == 15  # a prompt met twice is drawn twice differently


def test_another_seed_has_another_order_and_tokens_follow_the_prompt():
    assert identities(5, 0, seed=3) != identities(5, 0, seed=4)
    for r in loop.batch_requests(PROMPTS, 7, 2, 0):
        assert r.tokens == next(p.tokens for p in PROMPTS if p.id == r.prompt_id)


def test_one_prompt_is_drawn_again_and_again():
    assert identities(4, 2, prompts=PROMPTS[:1]) == [(0, 8), (0, 9), (0, 10), (0, 11)]


@pytest.fixture(scope="module")
def world(mesh):
    """A decoder of no skill, and a reward that tells each response from the others."""
    config = decoder.DecoderConfig(
        vocab_size=9, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.5
    )
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))

    def reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
        return np.sum(np.asarray(response_BxT) * 10.0 ** np.arange(3), axis=1)

    sampling = engine.Sampling(temperature=1.0, max_new_tokens=3, eos_id=0, pad_id=0)
    table = bon_references.references(np.zeros((5, 2), np.float32), "smoothed")
    return World(PROMPTS, table, reward, str, sampling, mesh, {"decoder": params}, config)


def test_a_scored_batch_keeps_rows_prompts_and_rewards_together(world):
    requests = loop.batch_requests(PROMPTS, 8, 1, 0)
    batch, seconds = loop.scored_batch(
        world, world.reference["decoder"], jax.random.key(1), 1, requests
    )
    ids = np.array([r.prompt_id for r in requests])
    np.testing.assert_array_equal(batch.row_B * 10, ids)
    np.testing.assert_array_equal(batch.prompt_BxP[:, -1], ids // 10 + 1)
    np.testing.assert_array_equal(
        batch.reward_B, world.reward(None, None, None, batch.rollout.tokens_BxT, None)
    )
    assert seconds["tokens"] == int(batch.rollout.mask_BxT.sum())
    # A response is a function of its identity: the same one, alone among others, comes out again.
    other, _ = loop.scored_batch(
        world, world.reference["decoder"], jax.random.key(1), 1, [requests[5]] * 8
    )
    np.testing.assert_array_equal(other.rollout.tokens_BxT[2], batch.rollout.tokens_BxT[5])


def test_a_nan_reward_names_prompt_and_response(world):
    requests = loop.batch_requests(PROMPTS, 8, 0, 0)
    bad = world._replace(reward=lambda *a: np.where(np.arange(8) == 6, np.nan, 0.0))
    text = next(p.text for p in PROMPTS if p.id == requests[6].prompt_id)
    with pytest.raises(InputError, match=rf"1 of 8 responses is NaN.*prompt='{text}' response='\["):
        loop.scored_batch(bad, world.reference["decoder"], jax.random.key(1), 0, requests)


def test_every_source_draws_samples_of_its_own(world, monkeypatch):
    """Three responses to each prompt of an iteration, no two with the same identity."""
    drawn = []

    def scored_batch(world, params, key, step, requests):
        drawn.append((params, [(r.prompt_id, r.sample) for r in requests]))
        return len(drawn), {"seconds_rollout": 1.0, "seconds_reward": 2.0, "tokens": 5.0}

    def update(state, batches):
        assert batches == (1, 2, 3)
        return state, {"reward": jnp.float32(1.5), "kl_ref": jnp.float32(0.25)}

    monkeypatch.setattr(loop, "scored_batch", scored_batch)
    state = SimpleNamespace(params={"decoder": {"wte": "policy"}, "anchor": {"wte": "anchor"}})
    step = loop.online(
        world, update, ("decoder", "anchor", "anchor"), 10, 3, jax.random.key(0), lambda i: i / 4
    )
    _, values, note = step(state, 3)
    assert [params["wte"] for params, _ in drawn] == ["policy", "anchor", "anchor"]
    prompts = [[prompt for prompt, _ in requests] for _, requests in drawn]
    assert prompts[0] == prompts[1] == prompts[2] == [p for p, _ in identities(10, 3)]
    counts = Counter(pair for _, requests in drawn for pair in requests)
    assert len(counts) == 30
    assert values["seconds_rollout"] == 3.0 and values["seconds_reward"] == 6.0
    assert values["learning_rate"] == 0.75 and values["tokens_per_second"] > 0
    assert "tokens" not in values
    assert note == "reward 1.500  KL to ref 0.250 nats"
    assert loop.note({"reward": [1.0, 2.0], "kl_ref": [0, 1], "kl_bon": [3, 4]}) == (
        "reward 1.500  KL to ref 0.500  to BoN 3.500 nats"
    )


def test_what_the_reward_counts_is_written_with_the_iteration(world):
    """Of all sources' responses, and once: what is taken is gone."""

    class Counting:
        seen = 0

        def __call__(self, prompts, *rows):
            assert all(isinstance(p, Prompt) for p in prompts)
            self.seen += len(prompts)
            return np.zeros(len(prompts), np.float32)

        def take_counts(self):
            seen, self.seen = self.seen, 0
            return {"responses": float(seen), "reward_truncated": seen / 100}

    own = world._replace(reward=Counting())
    state = SimpleNamespace(params=world.reference)
    metrics = {"reward": jnp.float32(0), "kl_ref": jnp.float32(0)}
    step = loop.online(
        own, lambda s, batches: (s, metrics), ("decoder", "decoder"), 8, 3, jax.random.key(0), float
    )
    for _ in range(2):
        _, values, _ = step(state, 3)
        assert values["reward_truncated"] == 0.16 and "responses" not in values


@pytest.fixture
def files(tmp_path):
    """Makes the files of a run of the loop that goes on after ``start``."""
    opened = []

    def make(start=0):
        opened[:] = [Checkpointer(tmp_path / "c", 5), MetricsWriter(tmp_path, start)]
        return opened

    make.path = tmp_path
    yield make
    for x in opened:
        x.close()


def adding(sign=None, at=None, **bad):
    """A step that adds step + 1 to a number, and may send a signal or write something else."""

    def one(state, step):
        values = {"loss": float(step), "grad_norm": 1.0, "kl_ref": [0.5, 1.5]}
        if step == at:
            values |= bad
            if sign is not None:
                os.kill(os.getpid(), sign)
        return {"x": state["x"] + step + 1}, values, "note"

    return one


def start():
    return {"x": jnp.zeros(2)}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_come_when_planned_and_at_the_end(files):
    checkpointer, writer = files()
    end = loop.run(start(), 0, adding(), LoopPlan("t", 7, 3), checkpointer, writer, {"a": 1})
    np.testing.assert_array_equal(end["x"], [28, 28])
    assert sorted(int(p.name) for p in checkpointer.directory.iterdir()) == [3, 6, 7]
    state, metadata = checkpointer.restore(start())
    np.testing.assert_array_equal(state["x"], end["x"])
    assert metadata == {"a": 1, "step": 7}
    assert [x["step"] for x in lines(files.path)] == [1, 2, 3, 4, 5, 6, 7]
    assert lines(files.path)[4]["kl_ref"] == [0.5, 1.5]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_rest_follows_from_there(files, signum):
    checkpointer, writer = files()
    plan = LoopPlan("t", 6, 100)
    with pytest.raises(Stopped, match=r"after iteration 3 of 6 is saved.*goes on") as stopped:
        loop.run(start(), 0, adding(signum, at=2), plan, checkpointer, writer, {})
    assert stopped.value.signum == signum
    assert checkpointer.latest_step == 3
    checkpointer.close()
    writer.close()
    checkpointer, writer = files(3)
    state, _ = checkpointer.restore(start())
    end = loop.run(state, 3, adding(), plan, checkpointer, writer, {})
    np.testing.assert_array_equal(end["x"], [21, 21])
    assert [x["step"] for x in lines(files.path)] == [1, 2, 3, 4, 5, 6]


def test_the_last_step_is_done_even_if_a_signal_comes_with_it(files):
    checkpointer, writer = files()
    with pytest.raises(Stopped, match="after iteration 2 of 2"):
        loop.run(start(), 0, adding(signal.SIGTERM, at=1), LoopPlan("t", 2, 9), checkpointer,
                 writer, {})  # fmt: skip
    state, _ = checkpointer.restore(start())
    again = loop.run(state, 2, adding(), LoopPlan("t", 2, 9), checkpointer, writer, {})
    np.testing.assert_array_equal(again["x"], [3, 3])


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"grad_norm": float("inf")}, "grad_norm is inf"),
        ({"loss": [1.0, float("nan")], "grad_norm": [1.0, 1.0]}, "loss is nan"),  # none refused it
        (
            {"loss": [float("nan")] * 2, "grad_norm": [1.0, 1.0], "refused": [1.0, 1.0]},
            "loss is nan",
        ),
    ],
)
def test_what_is_not_finite_stops_and_names_the_last_good_checkpoint(files, bad, name):
    checkpointer, writer = files()
    with pytest.raises(InputError, match=rf"{name} at iteration 4; .*c/2: lower the learning"):
        loop.run(start(), 0, adding(at=3, **bad), LoopPlan("t", 6, 2), checkpointer, writer, {})
    assert checkpointer.latest_step == 2


def test_a_refused_member_stops_nobody(files):
    checkpointer, writer = files()
    values = {"loss": [float("nan"), 1.0], "grad_norm": [1.0, 2.0], "refused": [1.0, 0.0]}
    end = loop.run(
        start(), 0, adding(at=1, **values), LoopPlan("t", 3, 9), checkpointer, writer, {}
    )
    np.testing.assert_array_equal(end["x"], [6, 6])
    assert np.isnan(lines(files.path)[1]["loss"][0])
