import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.bon import theory
from vbon_jax.evaluation import measure
from vbon_jax.models import decoder
from vbon_jax.responses import Response
from vbon_jax.sampling import decode, engine
from vbon_jax.sampling.engine import Request

T = 3
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def small():
    """(config, policy, reference) of a closed world: 4 letters, responses of 3."""
    config = decoder.DecoderConfig(
        vocab_size=4, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.8
    )
    init = jax.jit(decoder.init, static_argnums=0)
    return config, init(config, jax.random.key(1)), init(config, jax.random.key(2))


STRINGS = np.array(list(itertools.product(range(4), repeat=T)), np.int32)


def twin_log_probs(config, params):
    """log p(string | prompt [1]) of every string, float64, from one forward pass a string."""
    tokens = np.concatenate([np.full((len(STRINGS), 1), 1, np.int32), STRINGS], axis=1)
    hidden = decoder.hidden(params, config, tokens, np.ones_like(tokens, bool))
    logits = np.asarray(decoder.logits(params, config, hidden), np.float64)[:, :-1] / TEMPERATURE
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, STRINGS[..., None], axis=-1)[..., 0].sum(axis=1)


@pytest.fixture(scope="module")
def drawn(small, mesh):
    """20,000 responses of the policy, with their KL measurements."""
    config, policy, reference = small
    sampling = engine.Sampling(TEMPERATURE, T, None, 0)
    requests = [Request(0, i, (1,)) for i in range(20_000)]
    prompts, rollout = engine.draw(policy, config, sampling, mesh, jax.random.key(0), 0, requests)
    measured = measure.sequence_kls(
        policy, reference, prompts, rollout, jnp.float32(TEMPERATURE), config=config,
        ref_config=config,
    )  # fmt: skip
    return jax.device_get((rollout, measured))


def test_both_kl_estimators_have_the_exact_mean(small, drawn):
    config, policy, reference = small
    _, measured = drawn
    log_p, log_ref = twin_log_probs(config, policy), twin_log_probs(config, reference)
    exact = np.sum(np.exp(log_p) * (log_p - log_ref))
    errors = {}
    for name in ("kl", "kl_k1"):
        values = measured[name].astype(np.float64)
        errors[name] = values.std() / np.sqrt(len(values))
        assert values.mean() == pytest.approx(exact, abs=4 * errors[name])
    assert errors["kl"] < 0.7 * errors["kl_k1"]  # what the full distribution is for


def test_log_ref_is_the_references_log_prob(small, drawn):
    config, _, reference = small
    rollout, measured = drawn
    index = rollout.tokens_BxT @ np.array([16, 4, 1])
    np.testing.assert_allclose(
        measured["log_ref"], twin_log_probs(config, reference)[index], atol=1e-4
    )


def test_sampled_frequencies_follow_the_model(small, drawn):
    config, policy, _ = small
    index = drawn[0].tokens_BxT @ np.array([16, 4, 1])
    found = np.bincount(index, minlength=64) / len(index)
    p = np.exp(twin_log_probs(config, policy))
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p / len(index)) + 1e-3)


def test_exact_equals_brute_force(small):
    """Best-of-2 by going through all pairs of strings."""
    config, policy, reference = small
    rewards = np.random.default_rng(0).permutation(64).astype(np.float64)
    found = measure.exact(
        policy, reference, [(1,)], STRINGS, rewards[None], 2.0, TEMPERATURE, config=config,
        ref_config=config,
    )  # fmt: skip
    p, ref = (np.exp(twin_log_probs(config, x)) for x in (policy, reference))
    p, ref = p / p.sum(), ref / ref.sum()
    bon = np.zeros(64)
    for i, j in itertools.product(range(64), repeat=2):
        bon[i if rewards[i] >= rewards[j] else j] += ref[i] * ref[j]
    beats = (rewards[:, None] > rewards) + 0.5 * (rewards[:, None] == rewards)

    def kl(a, b):
        return np.sum(a * np.log(a / b))

    expected = {
        "kl_bon": kl(p, bon), "kl_ref": kl(p, ref), "bon_kl": kl(bon, ref),
        "reference_kl_bon": kl(ref, bon), "win_rate": p @ beats @ ref,
        "bon_win_rate": bon @ beats @ ref,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def responses(rewards, log_prob=-20.0):
    return [
        [Response(Request(p, i, (1,)), (1, 2), "x", log_prob, True, float(r), {})
         for i, r in enumerate(row)]
        for p, row in enumerate(rewards)
    ]  # fmt: skip


def test_row_of_best_of_n_finds_no_distance_to_itself(rng):
    """True best-of-n on continuous rewards: win rate n/(n+1), KL the bound, estimated KL 0."""
    n, prompts, m = 4, 64, 400
    yardstick = measure.Yardstick(
        np.sort(rng.normal(size=(prompts, m)).astype(np.float32), axis=1), float(n), "interval", 1.0
    )
    bon = measure.of_bon(responses(rng.normal(size=(prompts, 50 * n))), n)
    row = measure.row("bon", n, bon, yardstick, (1.0, 2.0))
    assert row["win_rate"] == pytest.approx(float(theory.win_rate(n)), abs=0.01)
    assert row["kl_ref"] == pytest.approx(float(theory.kl_upper_bound(n)), abs=1e-3)
    assert row["kl_bon"] == pytest.approx(0, abs=0.03)
    assert row["kl_ref_k1"] is None
    reference = measure.of_reference(responses(rng.normal(size=(prompts, 50))))
    row = measure.row("reference", 1.0, reference, yardstick, (1.0, 2.0))
    assert row["win_rate"] == pytest.approx(0.5, abs=0.02)
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - np.log(n), abs=0.15)


def test_throughput_counts_what_is_delivered():
    """Best-of-n draws and scores n batches for each it delivers; a policy delivers each."""
    picks = []

    def draw():
        time.sleep(0.02)
        mask = np.array([[True, True], [True, False]])
        rollout = decode.Rollout(mask.astype(int), mask, mask * 1.0, mask[:, 0])
        return engine.Batch((), engine.Prompts(None, None), rollout)

    alone, tokens = measure.throughput(draw, None, 1)
    assert tokens == pytest.approx(1.5 * alone)
    assert alone <= 2 / 0.02
    of_four, _ = measure.throughput(draw, lambda batch: picks.append(1) or time.sleep(0.02), 4)
    assert len(picks) == 1 + measure.REPEATS
    assert of_four <= 2 / 0.04 / 4
