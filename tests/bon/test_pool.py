"""Best-of-n from a pool, against all subsets of n listed one by one."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from vbon_jax.bon import pool

POOLS = np.array(  # no ties, a pair, 0/1, all equal
    [[3, 1, 4, 9, 2, 6], [1, 2, 2, 0, 5, 4], [0, 1, 1, 0, 1, 0], [7, 7, 7, 7, 7, 7]], np.float32
)
ORDER = np.array([[5, 5, 5, 5, 5, 5], [9, 3, 8, 0, 1, 2], [2, 7, 9, 8, 7, 1], [3, 1, 4, 1, 5, 9]])


def brute_force(rewards, n, keys=None):
    """P(column is best) and P(best, worst) over all subsets, ties shared (or the larger key's)."""
    best, pairs = np.zeros(6), np.zeros((6, 6))
    subsets = list(itertools.combinations(range(6), n))
    for subset in subsets:
        score = [(rewards[c], 0 if keys is None else keys[c]) for c in subset]
        tops = [c for c, s in zip(subset, score) if s == max(score)]
        for top in tops:
            best[top] += 1 / len(tops) / len(subsets)
        lows = [c for c, s in zip(subset, score) if s == min(score)]
        both = [(top, low) for top in tops for low in lows if top != low]
        for pair in both:
            pairs[pair] += 1 / len(both) / len(subsets)
    return best, pairs


def test_order_weights_golden():
    # C(1,1), C(2,1), C(3,1) of C(4,2) = 6.
    np.testing.assert_allclose(pool.order_weights(4, 2), [0, 1 / 6, 2 / 6, 3 / 6], rtol=1e-14)
    np.testing.assert_allclose(pool.order_weights(4, 1), np.full(4, 1 / 4), rtol=1e-14)
    np.testing.assert_array_equal(pool.order_weights(4, 4), [0, 0, 0, 1])
    np.testing.assert_array_equal(pool.order_weights(1, 1), [1])


@pytest.mark.parametrize("n", [1, 2, 7, 100, 2500, 9999, 10_000])
def test_order_weights_equal_whole_numbers_at_ten_thousand(n):
    got = pool.order_weights(10_000, n)
    total = math.comb(10_000, n)
    for i in {1, n - 1, n, n + 1, (n + 10_000) // 2, 9_990, 10_000} & set(range(1, 10_001)):
        want = float(Fraction(math.comb(i - 1, n - 1), total))
        np.testing.assert_allclose(got[i - 1], want, rtol=1e-11, atol=1e-300)
    assert abs(got.sum() - 1) < 1e-12 and (np.diff(got) >= 0).all()


@pytest.mark.parametrize("bad", [0, 5, 1.5, -1, None, float("nan"), "2"])
def test_bad_n_is_refused(bad):
    rng = np.random.default_rng(0)
    for call in (
        lambda: pool.order_weights(4, bad),
        lambda: pool.winner_weights(POOLS[:, :4], bad),
        lambda: pool.sample_winners(rng, POOLS[:, :4], bad, 1),
        lambda: pool.sample_best_and_worst(rng, POOLS[:, :4], bad, 1),
    ):
        with pytest.raises(ValueError, match=rf"to m=4, .*got n={bad!r}"):
            call()
    with pytest.raises(ValueError, match=r"from 2 to m=4.*got n=1"):
        pool.sample_best_and_worst(rng, POOLS[:, :4], 1, 1)


@pytest.mark.parametrize("n", range(1, 7))
def test_winner_weights_count_all_subsets(n):
    got, ordered = pool.winner_weights(POOLS, n), pool.winner_weights(POOLS, n, ORDER)
    assert got.dtype == np.float64
    for row in range(len(POOLS)):
        np.testing.assert_allclose(got[row], brute_force(POOLS[row], n)[0], atol=1e-14)
        want = brute_force(POOLS[row], n, ORDER[row])[0]
        np.testing.assert_allclose(ordered[row], want, atol=1e-14)


def test_whole_floats_are_whole_numbers():
    np.testing.assert_array_equal(pool.winner_weights(POOLS, 3.0), pool.winner_weights(POOLS, 3))


def test_a_large_pool_of_one_tie_group_is_uniform():
    np.testing.assert_allclose(
        pool.winner_weights(np.zeros((1, 5000)), 600), np.full((1, 5000), 1 / 5000), rtol=1e-12
    )


def test_best_mean_is_the_mean_of_the_winners():
    weights = pool.winner_weights(POOLS, 3)
    want = [np.mean([max(s) for s in itertools.combinations(row, 3)]) for row in POOLS]
    np.testing.assert_allclose(pool.best_mean(POOLS, weights), want, rtol=1e-7)
    # What can never win may have any value.
    got = pool.best_mean([[-np.inf, 1.0, 2.0]], pool.winner_weights([[0.0, 1.0, 2.0]], 2))
    np.testing.assert_allclose(got, [(1 + 2 * 2) / 3])
    with pytest.raises(ValueError, match=r"got shapes \(4, 6\) and \(4,\)"):
        pool.best_mean(POOLS, weights[:, 0])


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("order", [None, ORDER])
def test_sampled_winners_come_as_often_as_their_weights(n, order):
    count = 20_000
    drawn = pool.sample_winners(np.random.default_rng(n), POOLS, n, count, order)
    assert drawn.shape == (4, count) and drawn.dtype == np.int64
    rates = (drawn[..., None] == np.arange(6)).mean(axis=1)
    weights = pool.winner_weights(POOLS, n, order)
    noise = np.sqrt(weights * (1 - weights) / count)
    assert (abs(rates - weights) <= 4.5 * noise + 1e-12).all()


@pytest.mark.parametrize("n", [2, 3, 6])
def test_sampled_best_and_worst_come_as_often_as_all_subsets_say(n):
    count = 20_000
    best, worst = pool.sample_best_and_worst(np.random.default_rng(n), POOLS, n, count)
    assert best.shape == worst.shape == (4, count) and (best != worst).all()
    for row in range(len(POOLS)):
        rates = np.zeros((6, 6))
        np.add.at(rates, (best[row], worst[row]), 1 / count)
        want = brute_force(POOLS[row], n)[1]
        assert (abs(rates - want) <= 4.5 * np.sqrt(want * (1 - want) / count) + 1e-9).all()


def test_draws_are_reproducible_and_may_be_none():
    for call in (
        lambda seed, count: pool.sample_winners(np.random.default_rng(seed), POOLS, 2, count),
        lambda seed, count: pool.sample_best_and_worst(
            np.random.default_rng(seed), POOLS, 2, count
        )[0],
    ):
        np.testing.assert_array_equal(call(0, 50), call(0, 50))
        assert (call(0, 50) != call(1, 50)).any()
        assert call(0, 0).shape == (4, 0)


def test_bad_pools_are_refused():
    with pytest.raises(ValueError, match=r"at least one sample in it, got shape \(3,\)"):
        pool.winner_weights(np.zeros(3), 1)
    with pytest.raises(ValueError, match=r"got shape \(2, 0\)"):
        pool.sample_winners(np.random.default_rng(0), np.zeros((2, 0)), 1, 1)
    with pytest.raises(ValueError, match="rewards_PxM holds 1 NaN among 2 rewards"):
        pool.sample_best_and_worst(np.random.default_rng(0), [[0.0, np.nan]], 2, 1)
    with pytest.raises(ValueError, match=r"order_PxM .* shape \(4, 6\), got shape \(4, 5\)"):
        pool.winner_weights(POOLS, 2, ORDER[:, :5])


def slow_quantiles(rewards, keys):
    """Shares of the pool below each sample, and up to its ties, one comparison at a time."""
    mine = list(zip(rewards, keys, strict=True))
    low = [sum(other < own for other in mine) / len(mine) for own in mine]
    return low, [sum(other <= own for other in mine) / len(mine) for own in mine]


@pytest.mark.parametrize("order", [None, ORDER], ids=["random", "order"])
def test_quantiles_equal_a_slow_count(order):
    low, high = pool.quantiles(POOLS, order)
    assert low.dtype == high.dtype == np.float64
    for row in range(len(POOLS)):
        keys = np.zeros(POOLS.shape[1]) if order is None else order[row]
        want = slow_quantiles(POOLS[row].tolist(), keys.tolist())
        np.testing.assert_allclose((low[row], high[row]), want, rtol=1e-14)
    assert ((high - low) * POOLS.shape[1] > 1.5).any() or order is not None  # there are ties


def test_quantiles_give_the_odds_of_the_best_of_draws_with_replacement():
    """Of 16 pairs, 12 have a 3.0 as their best, 3 the 2.0 and 1 the 1.0."""
    low, high = pool.quantiles([[3.0, 1.0, 3.0, 2.0]])
    ratio = (high**2 - low**2) / (high - low)
    np.testing.assert_allclose(ratio / 4, np.array([[6, 1, 6, 3]]) / 16)


@pytest.mark.parametrize("count", [1, 7, 16])
def test_resampling_gives_each_its_share_rounded_up_or_down(rng, count):
    weights = pool.winner_weights(rng.integers(0, 4, size=(5, 9)), 3)  # with ties
    draws = 4000
    found = pool.resample(rng, np.repeat(weights, draws, axis=0), count)
    assert found.shape == (5 * draws, count) and (np.diff(found, axis=1) >= 0).all()
    times = (found[:, :, None] == np.arange(9)).sum(axis=1).reshape(5, draws, 9)
    shares = count * weights
    assert (times >= np.floor(shares - 1e-9)[:, None]).all()
    assert (times <= np.ceil(shares + 1e-9)[:, None]).all()
    # Of a number that is one of two neighbours the variance is at most 1/4.
    np.testing.assert_allclose(times.mean(axis=1), shares, atol=5 * np.sqrt(0.25 / draws))


def test_resampling_takes_none_of_no_weight():
    weights = np.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for seed in range(20):
        found = pool.resample(np.random.default_rng(seed), weights, 6)
        assert found.tolist() == [[1, 1, 1, 3, 3, 3]]


@pytest.mark.parametrize("order", [None, ORDER])
def test_place_means_give_best_of_n_for_every_n(rng, order):
    values = rng.normal(size=POOLS.shape)
    got = pool.place_means(values, POOLS, order) @ pool.all_order_weights(6).T
    for n in range(1, 7):
        want = pool.best_mean(values, pool.winner_weights(POOLS, n, order))
        np.testing.assert_allclose(got[:, n - 1], want, atol=1e-14)
    # The last row is all tied: each place has the mean; with an order, its own sample's value.
    if order is None:
        np.testing.assert_allclose(pool.place_means(values, POOLS)[3], values[3].mean())
    with pytest.raises(ValueError, match=r"one value a sample, shape \(4, 6\), got shape \(4, 5\)"):
        pool.place_means(values[:, :5], POOLS, order)


def test_best_of_poisson_is_its_mixture_of_best_of_n():
    rate, m = 1.5, 20
    want = np.zeros(m)
    for k in range(m):  # n = 1 + k
        want += math.exp(-rate) * rate**k / math.factorial(k) * pool.order_weights(m, k + 1)
    got = pool.poisson_order_weights(m, rate)
    np.testing.assert_allclose(got, want, atol=2e-13)
    assert got.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(pool.poisson_order_weights(5, 0.0), np.full(5, 1 / 5))


def test_best_of_poisson_needs_a_pool_that_is_large_enough():
    beyond = 1 - sum(math.exp(-8) * 8**k / math.factorial(k) for k in range(20))
    assert pool.poisson_tail(20, 8.0) == pytest.approx(beyond, rel=1e-9)
    with pytest.raises(ValueError, match=r"rate=8 draws more than the pool's m=20 .* 0.00025"):
        pool.poisson_order_weights(20, 8.0)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"rate must be finite and >= 0, .* got rate={bad!r}"):
            pool.poisson_order_weights(20, bad)
