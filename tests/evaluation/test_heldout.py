"""Best-of-n read off a pool of reference samples, against theory; and what a split hands out."""

import dataclasses

import numpy as np
import pytest

from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.bon import theory
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.evaluation import heldout, measure
from vbon_jax.sampling.responses import Response, Sampling
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training.references import response_orders

PROMPTS, M, EACH = 60, 300, 5
N = 8


def held_out(rng, draw, log_ref, estimator="interval", by_order=False, evaluator=False):
    """A split whose opponents and pool are drawn by ``draw(shape)``."""
    shape = (PROMPTS, M)

    def orders():
        return rng.integers(0, 2**32, size=shape, dtype=np.uint32) if by_order else None

    table = bon_references.references(draw(shape), estimator, orders())
    rewards = draw(shape).astype(np.float32).astype(np.float64)
    noise = rng.normal(size=shape)
    pool = measure.Responses(
        rewards, orders(), rewards + noise if evaluator else None, np.full(shape, float(log_ref)),
        (rewards > 0).astype(float), 10.0 + rewards, np.zeros(shape), np.zeros(shape),
    )  # fmt: skip
    other = np.sort(rng.normal(size=shape) * np.sqrt(2), axis=1).astype(np.float32)
    yardstick = measure.Yardstick(table, other if evaluator else None, float(N), estimator, 0.5)
    samples = [
        PromptSamples(
            f"p{p}", tuple(f"r{i}" for i in range(M)), tuple(rewards[p]), p, (1,),
            response_tokens=tuple((i,) for i in range(M)), log_probs=(float(log_ref),) * M,
            finished=(True,) * M,
        )
        for p in range(PROMPTS)
    ]  # fmt: skip
    models = heldout.Models(Sampler(None, None, Sampling(0.5, 3, (), 0)), None)
    protocol = heldout.Protocol(float(N), estimator, m=M, each=EACH, seed=4)
    prompts = [Prompt(p, f"p{p}", (1,)) for p in range(PROMPTS)]
    return heldout.HeldOut(models, protocol, "test", prompts, yardstick, samples, pool, yardstick)


@pytest.fixture(scope="module")
def continuous():
    rng = np.random.default_rng(1)
    return held_out(rng, lambda shape: rng.normal(size=shape), -20.0, evaluator=True)


@pytest.mark.parametrize("n", [1, 2, N])
def test_best_of_n_of_a_continuous_reward_is_what_theory_says(continuous, n):
    row = continuous.bon(n)
    bound = np.log(n) - (n - 1) / n
    assert row["policy"] == "bon" and row["n"] == n and row["temperature"] == 0.5
    assert row["win_rate"] == pytest.approx(n / (n + 1), abs=0.01)
    assert row["kl_bound"] == pytest.approx(bound, abs=1e-6)
    assert row["kl_beirami"] == row["kl_ref"]
    assert row["kl_beirami"] <= row["kl_bound"] + 1e-6
    assert row["kl_beirami"] == pytest.approx(bound, abs=1e-4)  # no response has a large mass
    assert row["kl_direct"] == pytest.approx(bound, abs=0.03)
    low, high = row["kl_direct_ci95"]
    assert low <= row["kl_direct"] <= high
    assert row["kl_ref_k1"] is None and row["kl_ref_k1_ci95"] is None
    # The mean of the largest of n standard normals, and what else the winners are.
    assert row["reward"] == pytest.approx({1: 0, 2: 0.5642, 8: 1.4236}[n], abs=0.04)
    assert row["length"] == pytest.approx(10 + row["reward"], abs=1e-9)
    assert row["eos_rate"] == pytest.approx(1 - 0.5**n, abs=0.02)
    # The evaluator sees the reward through noise of its own.
    assert row["evaluator_reward"] == pytest.approx(row["reward"], abs=0.1)
    assert (0.49 if n == 1 else 0.55) < row["evaluator_win_rate"] <= row["win_rate"] + 0.02


def test_the_distance_to_itself_is_measured_at_the_yardsticks_n_alone(continuous):
    assert continuous.bon(2)["kl_bon"] is None
    row = continuous.bon(N)
    assert row["kl_bon"] == pytest.approx(row["kl_beirami"] - row["kl_direct"], abs=1e-9)
    assert abs(row["kl_bon"]) < 0.03


def beirami(e, n):
    """The estimate of KL(bon || ref) from a winner of mass e, as the paper writes it."""
    none = (1 - e) ** n
    spread = np.log(n) + (n - 1) * np.log(1 - e) - (n - 1) / n
    return none * spread + (1 - none) * np.log((1 - none) / e)


def test_a_response_of_large_mass_has_less_kl_than_the_bound():
    """pi_ref = 0.2 for each response: Beirami's estimate by hand, and a smaller direct one."""
    rng = np.random.default_rng(2)
    held = held_out(rng, lambda shape: rng.integers(0, 5, size=shape), np.log(0.2))
    row = held.bon(N)
    n = N
    want = beirami(0.2, n)
    # Five levels of about a fifth each: g is the share of the level among the opponents.
    assert row["kl_beirami"] == pytest.approx(want, abs=0.03)
    assert row["kl_beirami"] < row["kl_bound"] - 0.05
    up = np.arange(1, 6) / 5
    p = up**n - (up - 0.2) ** n
    assert row["kl_direct"] == pytest.approx(np.sum(p * np.log(p / 0.2)), abs=0.03)
    beaten = (up - 0.2) + 0.1  # ties count half
    assert row["win_rate"] == pytest.approx(p @ beaten, abs=0.01)


PASS = 0.3


def zero_one(estimator="interval", by_order=False):
    rng = np.random.default_rng(3)
    return held_out(rng, lambda s: (rng.random(s) < PASS).astype(float), -30.0, estimator, by_order)


@pytest.mark.parametrize("estimator", ["interval", "smoothed"])
def test_ties_at_random_make_two_classes_of_a_verifier(estimator):
    """Best-of-n of a 0/1 reward passes with 1 - (1 - p)^n, and within a class is the reference."""
    q = 1 - PASS
    for n in (2, N):
        row = zero_one(estimator).bon(n)
        exact = (1 - q**n) * np.log((1 - q**n) / PASS) + q**n * (n - 1) * np.log(q)
        assert row["reward"] == pytest.approx(1 - q**n, abs=0.01)
        assert row["win_rate"] == pytest.approx(
            (1 - q**n) * (q + PASS / 2) + q**n * q / 2, abs=0.01
        )
        assert row["kl_direct"] == pytest.approx(exact, abs=0.02)
        # An estimate made for many small masses: with two classes it is near for large n only.
        estimate = (1 - q**n) * beirami(PASS, n) + q**n * beirami(q, n)
        assert row["kl_beirami"] == pytest.approx(estimate, abs=0.02)
        assert row["kl_beirami"] < row["kl_bound"]
    assert row["kl_beirami"] == pytest.approx(exact, abs=0.06)


def test_ties_by_order_cost_what_a_reward_without_ties_does():
    """App. C of the paper: the order tells all responses apart, so the KL is the bound; but it
    says nothing about quality, so the win rate is as with ties at random."""
    random, ordered = (zero_one(by_order=by_order).bon(N) for by_order in (False, True))
    bound = float(theory.kl_upper_bound(float(N)))
    assert ordered["kl_beirami"] == pytest.approx(bound, abs=1e-4)
    assert ordered["kl_direct"] == pytest.approx(bound, abs=0.03)
    assert random["kl_direct"] < bound - 0.2
    assert ordered["win_rate"] == pytest.approx(random["win_rate"], abs=0.01)


def test_the_reference_is_no_better_than_itself(continuous):
    row = continuous.reference()
    assert row["policy"] == "reference" and row["n"] == 1.0
    assert row["kl_ref"] == 0 and row["kl_ref_k1"] == 0
    assert row["win_rate"] == pytest.approx(0.5, abs=0.04)
    # KL(ref || bon) = n - 1 - log n, of which the tail is cut off at m opponents.
    assert row["kl_bon"] == pytest.approx(N - 1 - np.log(N), abs=0.7)
    own = [x.rewards[:EACH] for x in continuous.pool_samples]
    assert row["reward"] == pytest.approx(np.mean(own))  # as many as a policy gives


def test_winners_are_drawn_as_best_of_n_weighs_them(continuous):
    winners = continuous.winners(N)
    assert [len(group) for group in winners] == [EACH] * PROMPTS
    for group, samples in zip(winners, continuous.pool_samples):
        for text, reward in group:
            assert samples.rewards[int(text.removeprefix("r"))] == reward
    mean = np.mean([reward for group in winners for _, reward in group])
    assert mean == pytest.approx(continuous.bon(N)["reward"], abs=0.12)
    assert continuous.winners(N) == winners  # the same each time


def test_lines_of_a_samples_file(continuous):
    texts = {"bon": [[(f"{p} {i}", float(i)) for i in range(2)] for p in range(PROMPTS)]}
    lines = heldout.sample_lines(continuous, texts)
    assert len(lines) == 2 * PROMPTS
    assert lines[3] == {
        "policy": "bon", "temperature": 0.5, "prompt_id": 1, "prompt": "p1", "response": "1 1",
        "reward": 1.0,
    }  # fmt: skip


def test_places_in_the_order_are_those_of_the_tokens_alone():
    got = response_orders([(3, 1), (4,), (3, 1, 2), (3, 1)], 5).reshape(2, 2)
    tokens = np.array([[3, 1, 0], [4, 0, 0], [3, 1, 2], [3, 1, 0]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(got.ravel(), lf.response_order(tokens, mask))
    assert got.shape == (2, 2) and got.dtype == np.uint32
    assert got[0, 0] == got[1, 1] and len(set(got.ravel().tolist())) == 3


@pytest.mark.parametrize("ties", ["random", "order"])
def test_a_policy_is_held_against_opponents_and_pool(ties, monkeypatch):
    """The reference and best-of-n, which the pool is of, against the opponents alone."""

    def orders(samples, m, sampler):  # without a tokenizer
        return response_orders([i for x in samples for i in x.response_tokens], 3).reshape(-1, m)

    monkeypatch.setattr(heldout, "orders", orders)
    rng = np.random.default_rng(5)
    prompts = [Prompt(p, f"p{p}", (1,)) for p in range(2)]

    def draw(role, sampler, key):
        return [
            PromptSamples(
                p.text, ("x",) * 6, tuple(rng.integers(0, 4, size=6).astype(float)), p.id, (1,),
                response_tokens=tuple((i, len(role)) for i in range(6)), log_probs=(-9.0,) * 6,
                finished=(True,) * 6, evaluator_rewards=tuple(rng.normal(size=6)),
            )
            for p in prompts
        ]  # fmt: skip

    drawn = {}
    sampler = Sampler(None, None, Sampling(0.5, 3, (), 0))
    models = heldout.Models(sampler, None, evaluator=object())
    held = heldout.open_split(
        models, prompts, "test", 0.5, heldout.Protocol(2.0, ties=ties, m=6, each=3),
        lambda role, *rest: drawn.setdefault(role, draw(role, *rest)),
    )  # fmt: skip
    both = [drawn["opponents"], drawn["pool"]]
    for yardstick, roles in ((held.yardstick, both[:1]), (held.all_samples, both)):
        assert yardstick.m == 6 * len(roles)
        rewards = np.sort(np.concatenate([[x.rewards for x in r] for r in roles], axis=1), axis=1)
        np.testing.assert_array_equal(yardstick.references.rewards_PxM, rewards)
        theirs = np.concatenate([[x.evaluator_rewards for x in r] for r in roles], axis=1)
        np.testing.assert_allclose(yardstick.evaluator_PxM, np.sort(theirs, axis=1), rtol=1e-6)
        order = yardstick.references.order_PxM
        assert (order is None) == (ties == "random")
        if order is not None:
            ids = [ids for r in roles for x in r[:1] for ids in x.response_tokens]
            assert set(np.asarray(order)[0]) == set(response_orders(ids, 3))


class Fake:
    """Stands for a policy: responses whose rewards are 1, one prompt after the other."""

    settings = Sampling(0.5, 3, (), 0)

    def at(self, **changed):
        return self

    def responses(self, key, prompts, requests, size, reward, also):
        extra = {"kl": 0.5, "kl_k1": 0.5, "log_ref": -3.0}
        yield [Response(r, (1,), "x", -2.0, True, 1.0, extra) for r in requests]


def test_a_policys_row_goes_by_all_samples(rng):
    held = held_out(rng, lambda shape: rng.normal(size=shape) + 9, -20.0)  # all above
    assert held.policy("vbon", 8.0, Fake(), "")[0]["win_rate"] == 0
    below = held_out(rng, lambda shape: rng.normal(size=shape) - 9, -20.0).yardstick
    row, drawn = dataclasses.replace(held, all_samples=below).policy("vbon", 8.0, Fake(), "")
    assert row["win_rate"] == 1 and [len(group) for group in drawn] == [EACH] * PROMPTS
    assert row["kl_lost"] == pytest.approx(np.log(N) - (N - 1) / N - np.log(N), abs=0.02)
