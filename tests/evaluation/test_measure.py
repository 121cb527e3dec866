import itertools
import time

import jax
import numpy as np
import pytest

from vbon_jax.bon import jackknife, references, theory
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import InputError
from vbon_jax.evaluation import exact, measure
from vbon_jax.models import decoder
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling import decode
from vbon_jax.sampling.requests import Prompts, Request
from vbon_jax.sampling.responses import Batch, Response, Sampling
from vbon_jax.sampling.sampler import Sampler

T = 3
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def small():
    """Policy and reference of a closed world: 4 letters, responses of 3."""
    config = decoder.DecoderConfig(
        vocab_size=4, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.8
    )
    init = jax.jit(decoder.init, static_argnums=0)
    return tuple(LanguageModel(config, init(config, jax.random.key(i)), None) for i in (1, 2))


STRINGS = np.array(list(itertools.product(range(4), repeat=T)), np.int32)


def twin_log_probs(model):
    """log p(string | prompt [1]) of every string, float64, from one forward pass a string."""
    tokens = np.concatenate([np.full((len(STRINGS), 1), 1, np.int32), STRINGS], axis=1)
    params, config = model.params, model.config
    hidden = decoder.hidden(params, config, tokens, np.ones_like(tokens, bool))
    logits = np.asarray(decoder.logits(params, config, hidden), np.float64)[:, :-1] / TEMPERATURE
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, STRINGS[..., None], axis=-1)[..., 0].sum(axis=1)


@pytest.fixture(scope="module")
def drawn(small, mesh):
    """20,000 responses of the policy, with their KL measurements."""
    policy, reference = small
    sampler = Sampler(policy, mesh, Sampling(TEMPERATURE, T, (), 0))
    requests = [Request(0, i, (1,)) for i in range(20_000)]
    batch = sampler.draw(jax.random.key(0), 0, requests)
    return jax.device_get((batch.rollout, measure.sequence_kls(policy, reference, batch)))


def test_both_kl_estimators_have_the_exact_mean(small, drawn):
    _, measured = drawn
    log_p, log_ref = (twin_log_probs(model) for model in small)
    exact = np.sum(np.exp(log_p) * (log_p - log_ref))
    errors = {}
    for name in ("kl", "kl_k1"):
        values = measured[name].astype(np.float64)
        errors[name] = values.std() / np.sqrt(len(values))
        assert values.mean() == pytest.approx(exact, abs=4 * errors[name])
    assert errors["kl"] < 0.7 * errors["kl_k1"]  # what the full distribution is for


def test_log_ref_is_the_references_log_prob(small, drawn):
    _, reference = small
    rollout, measured = drawn
    index = rollout.tokens_BxT @ np.array([16, 4, 1])
    np.testing.assert_allclose(measured["log_ref"], twin_log_probs(reference)[index], atol=1e-4)


def test_sampled_frequencies_follow_the_model(small, drawn):
    policy, _ = small
    index = drawn[0].tokens_BxT @ np.array([16, 4, 1])
    found = np.bincount(index, minlength=64) / len(index)
    p = np.exp(twin_log_probs(policy))
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p / len(index)) + 1e-3)


@pytest.mark.parametrize("by_order", [False, True])
def test_exact_equals_brute_force(small, by_order):
    """Best-of-2 by going through all pairs of strings; among ties a coin, or the order, decides."""
    policy, reference = small
    rng = np.random.default_rng(0)
    rewards = rng.permutation(64).astype(np.float64)
    order = None
    if by_order:
        rewards, order = np.floor(rewards / 8), rng.integers(0, 2**32, 64, dtype=np.uint32)
    world = exact.World([(1,)], STRINGS, rewards[None], order, TEMPERATURE)
    found = exact.figures(policy, reference, world, 2.0)
    p, ref = (np.exp(twin_log_probs(x)) for x in (policy, reference))
    p, ref = p / p.sum(), ref / ref.sum()
    bon = np.zeros(64)
    for i, j in itertools.product(range(64), repeat=2):
        key_i, key_j = ((rewards[x], order[x] if by_order else 0) for x in (i, j))
        bon[i if key_i >= key_j else j] += ref[i] * ref[j]
    beats = (rewards[:, None] > rewards) + 0.5 * (rewards[:, None] == rewards)

    def kl(a, b):
        return np.sum(a * np.log(a / b))

    kept = np.minimum(p, bon / 2)
    expected = {
        "corrected_kl_bon": kl(kept / kept.sum(), bon), "corrected_proposals": 1 / kept.sum(),
        "kl_bon": kl(p, bon), "kl_ref": kl(p, ref), "bon_kl": kl(bon, ref),
        "reference_kl_bon": kl(ref, bon), "win_rate": p @ beats @ ref,
        "bon_win_rate": bon @ beats @ ref,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-5), name


def test_exact_breaks_ties_at_random_without_an_order(small):
    """Of two groups of strings, best-of-n keeps the reference's proportions inside each."""
    policy, reference = small
    rewards = (STRINGS[:, 0] == STRINGS[:, -1]).astype(np.float64)
    n = 5.0
    world = exact.World([(1,)], STRINGS, rewards[None], None, TEMPERATURE)
    found = exact.figures(policy, reference, world, n)
    ref = np.exp(twin_log_probs(reference))
    right = np.sum(ref * rewards)
    won = 1 - (1 - right) ** n
    kl = won * np.log(won / right) + (1 - won) * np.log((1 - won) / (1 - right))
    assert found["bon_kl"] == pytest.approx(kl, abs=1e-5)
    assert found["bon_win_rate"] == pytest.approx(
        won * (1 - right) + 0.5 * (won * right + (1 - won) * (1 - right)), abs=1e-5
    )


def samples(rewards, log_prob=-20.0, evaluator=None):
    """Reference samples of each prompt: 2 tokens in those of even number, 1 in the others."""
    return [
        PromptSamples(
            f"p{p}", ("x",) * len(row), tuple(map(float, row)), p, (1,),
            tuple((1, 2) if i % 2 == 0 else (3,) for i in range(len(row))),
            (log_prob,) * len(row), tuple(i % 2 == 0 for i in range(len(row))),
            None if evaluator is None else tuple(map(float, evaluator[p])),
        )
        for p, row in enumerate(rewards)
    ]  # fmt: skip


def yardstick(opponents, n, estimator="interval", order=None, evaluator=None):
    table = references.references(opponents, estimator, order)
    return measure.Yardstick(table, evaluator, float(n), estimator, 1.0)


def test_row_of_best_of_n_finds_no_distance_to_itself(rng):
    """True best-of-n on continuous rewards: win rate n/(n+1), KL the bound, estimated KL 0."""
    n, prompts, m = 4, 64, 400
    held_against = yardstick(rng.normal(size=(prompts, m)), n)
    pool = measure.of_reference(samples(rng.normal(size=(prompts, m))), None)
    row = measure.bon_row(n, pool, held_against, (1.0, 2.0))
    assert row["win_rate"] == pytest.approx(float(theory.win_rate(n)), abs=0.01)
    assert row["kl_ref"] == pytest.approx(float(theory.kl_upper_bound(n)), abs=1e-3)
    assert row["kl_beirami"] == row["kl_ref"]
    assert row["kl_bound"] == pytest.approx(float(theory.kl_upper_bound(n)), abs=1e-6)
    assert row["kl_direct"] == pytest.approx(float(theory.kl_upper_bound(n)), abs=0.03)
    assert row["kl_bon"] == pytest.approx(0, abs=0.03)
    assert row["kl_ref_k1"] is None and row["kl_ref_k1_ci95"] is None
    assert row["kl_excess"] is row["kl_lost"] is row["kl_lost_by_quantile"] is None
    low, high = row["kl_direct_ci95"]
    assert low < row["kl_direct"] < high
    assert (row["policy"], row["n"], row["temperature"]) == ("bon", 4.0, 1.0)
    assert (row["responses_per_second"], row["tokens_per_second"]) == (1.0, 2.0)
    row = measure.row("reference", 1.0, pool, held_against, (1.0, 2.0))
    assert row["win_rate"] == pytest.approx(0.5, abs=0.02)
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - np.log(n), abs=0.15)


def test_best_of_another_n_is_measured_by_its_own_ratio(rng):
    """Off the yardstick's n, kl_direct is still about itself; of kl_bon there is none."""
    held_against = yardstick(rng.normal(size=(64, 400)), 4)
    pool = measure.of_reference(samples(rng.normal(size=(64, 400))), None)
    row = measure.bon_row(16, pool, held_against)
    assert row["kl_bon"] is None and row["kl_bon_ci95"] is None
    assert row["kl_direct"] == pytest.approx(float(theory.kl_upper_bound(16)), abs=0.06)
    assert row["win_rate"] == pytest.approx(16 / 17, abs=0.01)
    assert row["responses_per_second"] is None
    one = measure.bon_row(1, pool, held_against)
    assert one["kl_direct"] == one["kl_bound"] == 0
    assert one["reward"] == pytest.approx(pool.rewards.mean(), abs=1e-6)
    assert one["eos_rate"] == pytest.approx(0.5) and one["length"] == pytest.approx(1.5)


def test_best_of_n_of_a_verifier(rng):
    """Rewards 0 and 1, ties at random: reward, win rate and KL of two groups, in closed form."""
    n, right = 4, 0.25
    draw = (rng.random(size=(2, 128, 400)) < right).astype(np.float32)
    pool = measure.of_reference(samples(draw[0]), None)
    won = 1 - (1 - right) ** n
    for estimator in ("interval", "harmonic"):
        row = measure.bon_row(n, pool, yardstick(draw[1], n, estimator))
        assert row["reward"] == pytest.approx(won, abs=0.01)
        wins = won * (1 - right) + 0.5 * (won * right + (1 - won) * (1 - right))
        assert row["win_rate"] == pytest.approx(wins, abs=0.01)
        kl = won * np.log(won / right) + (1 - won) * np.log((1 - won) / (1 - right))
        assert row["kl_direct"] == pytest.approx(kl, abs=0.02), estimator


def test_best_of_n_of_a_verifier_by_order(rng):
    """A total order makes the rewards of a verifier as good as continuous: KL is the bound."""
    n, shape = 4, (128, 400)
    draw = (rng.random(size=(2, *shape)) < 0.25).astype(np.float32)
    order = rng.integers(0, 2**32, size=(2, *shape), dtype=np.uint32)
    pool = measure.of_reference(samples(draw[0]), order[0])
    row = measure.bon_row(n, pool, yardstick(draw[1], n, "harmonic", order[1]))
    bound = float(theory.kl_upper_bound(n))
    assert row["kl_direct"] == pytest.approx(bound, abs=0.03)
    assert row["kl_ref"] == pytest.approx(bound, abs=1e-3)
    assert row["reward"] == pytest.approx(1 - 0.75**n, abs=0.01)
    # Of the reference, the first few alone.
    few = measure.of_reference(samples(draw[0]), order[0], 3)
    assert few.rewards.shape == few.order.shape == few.length.shape == (128, 3)


def test_row_of_a_policy_by_hand():
    """Means over prompts of means over responses, and an evaluator beside the reward."""

    def response(prompt, i, reward, tokens, finished, **extra):
        return Response(Request(prompt, i, (1,)), tokens, "x", -3.0, finished, reward, extra)

    rows = [
        [
            response(0, 0, 2.0, (1, 2), True, kl=1.0, kl_k1=1.5, log_ref=-3.0, evaluator=5.0),
            response(0, 1, 0.5, (1,), False, kl=2.0, kl_k1=0.5, log_ref=-2.0, evaluator=7.0),
        ],
        [
            response(1, 0, 1.0, (1, 2, 3), True, kl=0.0, kl_k1=0.0, log_ref=-9.0, evaluator=0.0),
            response(1, 1, 4.0, (1, 2), True, kl=3.0, kl_k1=4.0, log_ref=-4.0, evaluator=1.0),
        ],
    ]
    opponents, theirs = np.float32([[0, 1, 2], [5, 3, 1]]), np.float32([[4, 6, 8], [0, 1, 2]])
    held_against = yardstick(opponents, 2, evaluator=theirs)
    row = measure.row("vbon", 2.0, measure.of_policy(rows, None), held_against)
    half = 1.96 * np.sqrt(2) * (2.5 - 1.25) / 2 / np.sqrt(2)
    assert row["reward"] == 1.875
    np.testing.assert_allclose(row["reward_ci95"], [1.875 - half, 1.875 + half])
    # (2 1/2 of 3, 1 of 3) and (1/2 of 3, 2 of 3); by the evaluator (1, 2) and (1/2, 1 1/2) of 3.
    assert row["win_rate"] == pytest.approx((2.5 + 1 + 0.5 + 2) / 12)
    assert row["evaluator_reward"] == 3.25
    assert row["evaluator_win_rate"] == pytest.approx((1 + 2 + 0.5 + 1.5) / 12)
    assert row["kl_ref"] == 1.5 and row["kl_ref_k1"] == 1.5
    # Below, and equal to, each of the 3 opponents: the estimate with each of them left out.
    ratios = jackknife.log_ratio([2, 1, 0, 2], [1, 0, 1, 0], 3, 2)
    noise = np.array([0.5, -1.5, 0.0, 1.0])  # of kl_k1 about kl
    least = ratios - noise * np.sum((ratios - ratios.mean()) * noise) / np.sum(noise**2)
    assert row["kl_bon"] == pytest.approx(np.mean([1, 2, 0, 3] - least), abs=1e-6)
    assert row["kl_bon"] == pytest.approx(row["kl_excess"] + row["kl_lost"])
    assert row["kl_excess"] == pytest.approx(1.5 - np.log(2) + 0.5, abs=1e-6)
    # The spans are (2, 4), (1, 2), (0, 2), (2, 3) quarters.
    assert [x["policy"] for x in row["kl_lost_by_quantile"]] == pytest.approx(
        [0.5, 0.25 * (0.5 + 1), 0.25 * 0.3, 0.25 * 0.2]
    )
    assert row["eos_rate"] == 0.75 and row["length"] == 2.0
    assert row["responses_per_second"] is None
    alone = measure.row("vbon", 2.0, measure.of_policy(rows, None), yardstick(opponents, 2))
    assert alone["evaluator_reward"] is None and alone["evaluator_win_rate"] is None
    assert alone["reward"] == 1.875


def test_samples_that_are_none_of_ours_are_refused():
    bare = [PromptSamples("p", ("x",), (1.0,))] * 2
    with pytest.raises(InputError, match=r"no 'log_probs'.*sample anew"):
        measure.of_reference(bare, None)


def test_throughput_counts_what_is_delivered():
    """Best-of-n draws and scores n batches for each it delivers; a policy delivers each."""
    picks = []

    def draw():
        time.sleep(0.02)
        mask = np.array([[True, True], [True, False]])
        rollout = decode.Rollout(mask.astype(int), mask, mask * 1.0, mask[:, 0])
        return Batch((), Prompts(None, None), rollout, 1.0)

    alone, tokens = measure.throughput(draw, None, 1)
    assert tokens == pytest.approx(1.5 * alone)
    assert alone <= 2 / 0.02
    of_four, _ = measure.throughput(draw, lambda batch: picks.append(1) or time.sleep(0.02), 4)
    assert len(picks) == 1 + measure.REPEATS
    assert of_four <= 2 / 0.04 / 4
