"""One policy's iteration: responses drawn, scored and handed to the method's update."""

import dataclasses
import inspect
from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.methods import jbond, vbon
from vbon_jax.models import decoder
from vbon_jax.sampling.sampler import Sampler, named_key
from vbon_jax.training import learner, loop, offline, options, ppo, scoring
from vbon_jax.training.learner import Learner, Member, Program
from vbon_jax.training.loop import Task

PROMPTS = [Prompt(10 * i, f"p{i}", (i + 1,)) for i in range(5)]
THREE = ("decoder", "anchor", "anchor")


def digits(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
    """A reward that tells each response from the others."""
    return np.sum(np.asarray(response_BxT) * 10.0 ** np.arange(3), axis=1)


@pytest.fixture(scope="module")
def task(mesh):
    """A decoder of no skill."""
    config = decoder.DecoderConfig(
        vocab_size=9, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.5
    )
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    table = bon_references.references(np.zeros((5, 2), np.float32), "smoothed")
    sampler = tiny.sampler(
        config, params, mesh, temperature=1.0, max_new_tokens=3, end_ids=(0,), pad_id=0
    )
    return Task(PROMPTS, table, digits, sampler)


def nothing(state, reference, scored, references, n, beta):
    return state, {"reward": jnp.float32(1.5), "kl_ref": jnp.float32(0.25)}


def learning(task, update=nothing, sources=("decoder",), batch_size=8, seed=0):
    program = Program(update, sources, batch_size, lambda step: step / 4)
    return Learner(task, program, Member(4.0, 0.1, seed, 2))


def state_of(task):
    return SimpleNamespace(params=task.reference)


def test_a_scored_batch_keeps_rows_prompts_and_rewards_together(task):
    own = learning(task)
    requests = loop.batch_requests(PROMPTS, 8, 1, 0)
    (batch,) = own.score(own.roll_out(state_of(task), 1), 1)
    ids = np.array([r.prompt_id for r in requests])
    np.testing.assert_array_equal(batch.row_B * 10, ids)
    np.testing.assert_array_equal(batch.prompt_BxP[:, -1], ids // 10 + 1)
    np.testing.assert_array_equal(
        batch.reward_B, digits(None, None, None, batch.rollout.tokens_BxT, None)
    )
    # A response is a function of its identity: the same one, alone among others, comes out again.
    other = task.sampler.draw(named_key(0, "rollout"), 1, [requests[5]] * 8)
    np.testing.assert_array_equal(other.rollout.tokens_BxT[2], batch.rollout.tokens_BxT[5])


def test_responses_that_take_turns_are_the_same(task):
    one = learning(task)
    program = dataclasses.replace(one.program, rows=2)
    turns = Learner(task, program, one.member)
    (whole,), (found,) = (x.score(x.roll_out(state_of(task), 1), 1) for x in (one, turns))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_nan_reward_names_prompt_and_response(task):
    requests = loop.batch_requests(PROMPTS, 8, 0, 0)
    bad = dataclasses.replace(task, reward=lambda *a: np.where(np.arange(8) == 6, np.nan, 0.0))
    text = next(p.text for p in PROMPTS if p.id == requests[6].prompt_id)
    own = learning(bad)
    drawn = own.roll_out(state_of(bad), 0)
    with pytest.raises(InputError, match=rf"gave NaN for prompt='{text}' response='\d.*1 of 8 "):
        own.score(drawn, 0)


class Clock:
    """Seconds that pass only where the test lets them."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(learner, "time", found)
    return found


def test_every_source_draws_samples_of_its_own(task, clock):
    """Three responses to each prompt of an iteration, no two with the same identity."""
    drawn, updated = [], []

    class Recording(Sampler):
        def draw(self, key, step, requests, *shape):
            clock.now += 1.0
            drawn.append((self.model.params, [(r.prompt_id, r.sample) for r in requests]))
            return super().draw(key, step, requests, *shape)

    def reward(*rows):
        clock.now += 2.0
        return digits(*rows)

    def update(state, reference, scored, references, n, beta):
        clock.now += 4.0
        updated.append(scored)
        assert float(n) == 4.0 and float(beta) == np.float32(0.1)
        assert reference["decoder"] is task.sampler.model.params
        return nothing(state, reference, scored, references, n, beta)

    policy, anchor = (dict(task.sampler.model.params) for _ in range(2))
    recording = Recording(task.sampler.model, task.sampler.mesh, task.sampler.settings)
    own = learning(
        dataclasses.replace(task, sampler=recording, reward=reward), update, THREE, 10, 3
    )
    state = SimpleNamespace(params={"decoder": policy, "anchor": anchor})
    _, values = vbon.iteration(own, state, 3)
    assert [params for params, _ in drawn] == [policy, anchor, anchor]
    assert [params is policy for params, _ in drawn] == [True, False, False]
    wanted = [r.prompt_id for r in loop.batch_requests(PROMPTS, 10, 3, 3)]
    assert [[prompt for prompt, _ in requests] for _, requests in drawn] == [wanted] * 3
    counts = Counter(pair for _, requests in drawn for pair in requests)
    assert len(counts) == 30
    ((one, two, three),) = updated  # in the order of the sources
    assert [x.reward_B.shape for x in (one, two, three)] == [(10,)] * 3
    assert not np.array_equal(two.rollout.tokens_BxT, three.rollout.tokens_BxT)
    assert values["seconds_rollout"] == 3.0 and values["seconds_reward"] == 6.0
    assert values["seconds_update"] == 4.0
    tokens = sum(int(x.rollout.mask_BxT.sum()) for x in (one, two, three))
    assert values["learning_rate"] == 0.75 and values["tokens_per_second"] == tokens / 13
    assert "tokens" not in values
    assert loop.note(values) == "reward 1.500  KL to ref 0.250 nats"
    _, values = vbon.iteration(own, state, 4)  # the clock starts anew
    assert values["seconds_rollout"] == 3.0 and values["tokens_per_second"] < tokens


def test_what_the_reward_counts_is_written_with_the_iteration(task):
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

    own = learning(
        dataclasses.replace(task, reward=Counting()), sources=("decoder", "decoder"), seed=3
    )
    for _ in range(2):
        _, values = vbon.iteration(own, state_of(task), 3)
        assert values["reward_truncated"] == 0.16 and "responses" not in values


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_a_rollout_is_scored_at_the_temperature_it_was_drawn_at(task, temperature):
    """Under one setup: whatever scores a rollout takes the temperature from the rollout."""
    config = task.sampler.model.config
    setup = scoring.Setup(config, None, options.Train(minibatch_size=8))
    found = {}

    def update(state, reference, scored, references, n, beta):
        (batch,) = scored
        scored = jax.jit(scoring.score, static_argnums=3)(state.params, reference, batch, setup)
        found["error"] = np.abs(scored.found.log_prob - batch.rollout.log_probs_BxT).max()
        found["temperature"] = batch.temperature
        return state, {}

    own = learning(
        dataclasses.replace(task, sampler=task.sampler.at(temperature=temperature)), update
    )
    head = {"kernel": np.zeros((config.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    state = SimpleNamespace(params=task.reference | {"value": {"head": head}})
    vbon.iteration(own, state, 0)
    assert found["temperature"] == temperature and found["error"] < 1e-5


def test_nothing_that_scores_a_rollout_can_be_given_another_temperature(task):
    """Neither an argument nor a setting has one; the rollout's own cannot be set."""
    for f in (vbon.update, jbond.update, scoring.score, scoring.advantages, ppo.loss, ppo.epochs,
              offline.loss, offline.steps):  # fmt: skip
        assert "temperature" not in inspect.signature(f).parameters, f
    for cls in (scoring.Setup, options.Train, options.Memory, offline.OfflineSetup, jbond.JBOND):
        assert "temperature" not in {f.name for f in dataclasses.fields(cls)}, cls
    own = learning(task)
    drawn = own.roll_out(state_of(task), 0)
    with pytest.raises(AttributeError):
        drawn[0].temperature = 2.0
    (scored,) = own.score(drawn, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored.temperature = 2.0
    assert scored.temperature == drawn[0].temperature == 1.0
    # Static, so that it is compiled in and no transformation of arrays changes it.
    halved = jax.tree.map(lambda x: x // 2, scored)
    assert halved.temperature == 1.0
    size = partial(jax.tree.map, np.shape)
    assert jax.tree.structure(size(scored)) != jax.tree.structure(
        size(dataclasses.replace(scored, temperature=0.5))
    )
