"""An iteration of J-BOND against one worked out by hand, and many on a world that can learn."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import tiny
from vbon_jax import sharding
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.methods import jbond
from vbon_jax.methods.jbond import JBOND
from vbon_jax.models import decoder
from vbon_jax.sampling import decode
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import state
from vbon_jax.training.learner import Learner, Member, Program
from vbon_jax.training.loop import Task
from vbon_jax.training.options import Train
from vbon_jax.training.scoring import Setup

V, P, T, B = 11, 3, 4, 4
TEMPERATURE, RATE, LEARNING_RATE, JEFFREYS, BETA = 0.8, 0.25, 0.1, 0.3, 0.4
CONFIG = decoder.DecoderConfig(
    vocab_size=V, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.5
)
INIT = jax.jit(decoder.init, static_argnums=0)
OPTIMIZER = optax.sgd(LEARNING_RATE)
SETUP = Setup(CONFIG, OPTIMIZER, Train(minibatch_size=B))
OPTIONS = JBOND(jeffreys=JEFFREYS, anchor_rate=RATE, beta=BETA, estimator="smoothed")
REFERENCES = np.sort(np.random.default_rng(9).normal(size=(2, 7)).astype(np.float32), axis=1)
PROMPT_LENGTHS = (3, 1, 2, 3)


def scored(seed, rewards):
    """Made-up responses of 1 to T tokens to the same prompts, and their rewards."""
    prompts = np.random.default_rng(0).integers(0, V, size=(B, P)).astype(np.int32)
    lengths = np.random.default_rng(seed).integers(1, T + 1, size=B)
    tokens = np.random.default_rng(seed + 100).integers(0, V, size=(B, T)).astype(np.int32)
    mask = np.arange(T) < lengths[:, None]
    prompt_mask = np.arange(P) >= P - np.array(PROMPT_LENGTHS)[:, None]
    rollout = decode.Rollout(tokens, mask, np.zeros((B, T), np.float32), lengths < T)
    rows = np.array([0, 1, 1, 0], np.int32)
    return ScoredRollout(prompts, prompt_mask, rollout, np.float32(rewards), rows, TEMPERATURE)


# Row by row the policy's response is: below both of the anchor's; between them; equal to the lower
# one; above both. The anchor's best is the first, the second, the first (a tie), the second.
BATCHES = (
    scored(1, [0.1, 2.0, 1.0, 9.0]),
    scored(2, [0.9, 1.0, 1.0, 0.2]),
    scored(3, [0.3, 3.0, 1.0, 0.5]),
)
WINNERS = (1, 2, 1, 2)
LOWEST = (True, False, False, False)


def log_probs(params):
    """log p of each response, [batch][row], from rows padded on the other side than ours."""
    rows = [(batch, row) for batch in BATCHES for row in range(B)]
    tokens, chosen = np.zeros((len(rows), P + T), np.int32), np.zeros((len(rows), P + T), bool)
    for i, (batch, row) in enumerate(rows):
        prompt = batch.prompt_BxP[row][batch.prompt_mask_BxP[row]]
        response = batch.rollout.tokens_BxT[row][batch.rollout.mask_BxT[row]]
        end = len(prompt) + len(response)
        tokens[i, :end] = np.concatenate([prompt, response])
        chosen[i, len(prompt) : end] = True
    logits = decoder.logits(params, CONFIG, decoder.hidden(params, CONFIG, tokens, tokens >= 0))
    log_p = jax.nn.log_softmax(logits[:, :-1] / TEMPERATURE)
    next_log_p = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(chosen[:, 1:], next_log_p, 0.0).sum(axis=1).reshape(len(BATCHES), B)


@pytest.fixture(scope="module")
def models():
    return {name: INIT(CONFIG, jax.random.key(i))
            for i, name in enumerate(("decoder", "anchor", "reference"))}  # fmt: skip


def fresh(policy, anchor):
    """A state of copies: the update donates it."""
    one = state.create({"decoder": jax.tree.map(jnp.array, policy)}, OPTIMIZER, jax.random.key(3))
    return one._replace(params=one.params | {"anchor": jax.tree.map(jnp.array, anchor)})


def update(policy, anchor, reference, n=4.0):
    return jbond.update(
        fresh(policy, anchor), {"decoder": reference}, BATCHES,
        bon_references.references(REFERENCES, "smoothed"), jnp.float32(n), jnp.float32(1),
        setup=SETUP, options=OPTIONS,
    )  # fmt: skip


def test_a_step_by_hand(models):
    """Gradient, anchor and metrics of one step on four responses."""
    policy, anchor, reference = models["decoder"], models["anchor"], models["reference"]
    mine = BATCHES[0]
    read = jax.jit(log_probs)
    log_policy, log_anchor = read(policy)[0], read(anchor)[0]
    returns = [
        -math.log(16) * LOWEST[row] - (1 + BETA) * float(log_policy[row] - log_anchor[row])
        for row in range(B)
    ]
    advantages = [r - (sum(returns) - r) / (B - 1) for r in returns]

    def loss(params):
        table = log_probs(params)
        forward = -sum(table[winner, row] for row, winner in enumerate(WINNERS)) / B
        backward = -sum(a * table[0, row] for row, a in enumerate(advantages)) / B
        return JEFFREYS * forward + (1 - JEFFREYS) * backward

    value, grads = jax.jit(jax.value_and_grad(loss))(policy)
    new, metrics = update(policy, anchor, reference)
    wanted = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, policy, grads)
    for got, want in zip(jax.tree.leaves(new.params["decoder"]), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(got, want, atol=2e-6)
    moved = jax.tree.map(lambda a, p: (1 - RATE) * a + RATE * p, anchor, wanted)
    for got, want in zip(jax.tree.leaves(new.params["anchor"]), jax.tree.leaves(moved)):
        np.testing.assert_allclose(got, want, atol=2e-6)

    # Of the second and third row (of prompt 1): how many references are below 2.0 and 1.0.
    log_ratios = [
        math.log(4) + 3 * math.log((np.sum(REFERENCES[row] < r) + 1) / 8)
        for row, r in zip(mine.row_B, mine.reward_B)
    ]
    for name, want in {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "reward": 12.1 / 4,
        "anchor_reward": (3.1 + 4.8) / 8,
        "jbond_reward": -math.log(16) / 4,
        "kl_anchor": np.mean(log_policy - log_anchor),
        "response_length": mine.rollout.mask_BxT.sum() / B,
        "eos_rate": mine.rollout.finished_B.mean(),
    }.items():
        np.testing.assert_allclose(metrics[name], want, rtol=1e-4, err_msg=name)
    # log pi_ref is small here, but not nothing: formula (1) is a little off its limit.
    np.testing.assert_allclose(
        metrics["kl_bon"], float(metrics["kl_ref"]) - np.mean(log_ratios), atol=0.02
    )
    assert float(metrics["kl_ref"]) > 0.1
    assert int(new.step) == 1


def test_n_is_reported_on_and_changes_nothing_else(models):
    """J-BOND has no n of its own."""
    policy, anchor, reference = models["decoder"], models["anchor"], models["reference"]
    size = jbond.update._cache_size()
    (a, with_2), (b, with_64) = (update(policy, anchor, reference, n=n) for n in (2.0, 64.0))
    assert jbond.update._cache_size() <= size + 1
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert {k for k in with_2 if with_2[k] != with_64[k]} == {"kl_bon"}


def token_reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
    """The share of small ids, made injective by the sum."""
    tokens, mask = jax.device_get((response_BxT, response_mask_BxT))
    small = np.sum((tokens < V // 2) & mask, axis=1)
    return (small + 1e-4 * np.sum(tokens * mask, axis=1)).astype(np.float32)


def test_the_reward_rises_over_iterations_and_the_first_is_at_the_reference(models):
    """Through the real iteration: one response of the policy and two of the anchor."""
    mesh = sharding.make_mesh()
    optimizer = state.adamw(optax.constant_schedule(1e-2), 1e-5, 0.0, 1.0)
    prompts = [Prompt(i, f"p{i}", (i + 1,)) for i in range(4)]
    rewards = np.sort(np.random.default_rng(1).uniform(0, T, (4, 32)).astype(np.float32), axis=1)
    table = bon_references.references(rewards, "harmonic")
    start = sharding.place({"decoder": models["reference"]}, mesh)["decoder"]
    sampler = tiny.sampler(
        CONFIG, start, mesh, temperature=1.0, max_new_tokens=T, end_ids=(), pad_id=0
    )
    task = Task(prompts, table, token_reward, sampler)
    own = partial(
        jbond.update, setup=Setup(CONFIG, optimizer, Train(minibatch_size=64)),
        options=JBOND(jeffreys=0.5, anchor_rate=0.1, beta=0.0, estimator="harmonic"),
    )  # fmt: skip
    program = Program(own, jbond.SOURCES, 256, lambda step: 1e-2)
    learner = Learner(task, program, Member(4.0, 0.1, 0, 32))

    one = state.create({"decoder": jax.tree.map(jnp.array, models["reference"])}, optimizer,
                       jax.random.key(0))  # fmt: skip
    now = one._replace(params=one.params | {"anchor": jax.tree.map(jnp.array, models["reference"])})
    now = sharding.place(now, mesh)
    written = []
    for i in range(12):
        now, values = jbond.iteration(learner, now, i)
        written.append(values)
    first, last = written[0], written[-1]
    assert first["kl_ref"] == 0 and abs(first["kl_anchor"]) < 1e-5  # all three are one model
    # Below both of two others: one time in three.
    assert first["jbond_reward"] == pytest.approx(-math.log(16) / 3, abs=0.25)
    assert abs(first["reward"] - first["anchor_reward"]) < 0.2
    assert last["reward"] > first["reward"] + 0.5
    assert first["anchor_reward"] + 0.2 < last["anchor_reward"] < last["reward"]  # it follows
    assert last["kl_ref"] > last["kl_anchor"] > 0
    assert all(np.isfinite(v) for values in written for v in values.values())
    # The optimizer's moments are the policy's alone.
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(now.opt_state)]
    assert any("decoder" in path for path in paths)
    assert not any("anchor" in path for path in paths)
