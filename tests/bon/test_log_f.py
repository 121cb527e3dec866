"""Ranks, the estimators of log F, and the interval estimator of the ratio."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from vbon_jax.bon import enumeration
from vbon_jax.bon import log_f as log_f_module
from vbon_jax.bon.distribution import log_bon_ratio, sequence_reward
from vbon_jax.bon.log_f import (
    LOG_F_ESTIMATORS,
    TIES,
    log_f,
    log_mass,
    log_ratio,
    log_ratio_interval,
    ordered_ranks,
    reference_ranks,
    response_order,
)

# What an estimate from ranks alone is; `exponential` has a file of tests of its own.
RANK_ESTIMATORS = (*LOG_F_ESTIMATORS, "interval")


def tied_rewards(seed, shape):
    """Few distinct values, all exact in float32, so that ties are common."""
    return np.random.default_rng(seed).integers(-12, 13, shape).astype(np.float32) / 4


def test_reference_ranks_golden():
    references = [[0.0, 1.0, 1.0, 2.0], [-5.0, -5.0, -5.0, -5.0]]
    rewards = [[1.0, -1.0, 9.0], [-5.0, -5.5, -4.0]]
    below, equal = reference_ranks(references, rewards)
    np.testing.assert_array_equal(below, [[1, 0, 4], [0, 0, 4]])
    np.testing.assert_array_equal(equal, [[2, 0, 0], [4, 0, 0]])
    assert below.dtype == equal.dtype == jnp.int32


def test_reference_ranks_count_what_a_loop_counts():
    references, rewards = np.sort(tied_rewards(0, (5, 33)), axis=1), tied_rewards(1, (5, 7))
    below, equal = reference_ranks(references, rewards)
    np.testing.assert_array_equal(below, (references[:, None] < rewards[..., None]).sum(-1))
    np.testing.assert_array_equal(equal, (references[:, None] == rewards[..., None]).sum(-1))
    # One ranking of one prompt is the same alone.
    alone = reference_ranks(references[2:3], rewards[2:3, 4:5])
    assert (int(alone[0][0, 0]), int(alone[1][0, 0])) == (int(below[2, 4]), int(equal[2, 4]))


def test_signed_zeros_and_infinities_have_their_rank():
    below, equal = reference_ranks([[-np.inf, -0.0, 0.0, np.inf]], [[0.0, -0.0, np.inf, -np.inf]])
    np.testing.assert_array_equal(below, [[1, 1, 3, 0]])
    np.testing.assert_array_equal(equal, [[2, 2, 1, 1]])


def test_short_rows_may_be_padded_with_infinity():
    below, equal = reference_ranks([[1.0, 2.0, np.inf, np.inf]], [[2.0, 3.0, 0.0]])
    np.testing.assert_array_equal(below, [[1, 2, 0]])
    np.testing.assert_array_equal(equal, [[1, 0, 0]])


def test_the_size_of_the_paper_is_one_jitted_call():
    references = np.sort(np.random.default_rng(0).normal(size=(5000, 600)).astype(np.float32), 1)
    rewards = np.random.default_rng(1).normal(size=(5000, 2)).astype(np.float32)
    before = log_f_module._reference_ranks._cache_size()
    below, equal = reference_ranks(references, rewards)
    again, _ = reference_ranks(references, rewards + 1)
    assert log_f_module._reference_ranks._cache_size() == before + 1
    np.testing.assert_array_equal(below, (references[:, None] < rewards[..., None]).sum(-1))
    assert (np.asarray(again) >= np.asarray(below)).all() and not np.asarray(equal).any()


def test_nan_rewards_are_counted():
    good = np.zeros((2, 3), np.float32)
    bad = np.float32([[0, np.nan, 1], [np.nan, 0, np.nan]])
    with pytest.raises(ValueError, match=r"^rewards_PxB holds 3 NaN among 6 rewards"):
        reference_ranks(good, bad)
    with pytest.raises(ValueError, match=r"^sorted_rewards_PxM holds 3 NaN among 6 rewards"):
        reference_ranks(jnp.asarray(bad), good)


def test_unsorted_references_are_refused_by_row():
    references = np.float32([[0, 1, 1], [0, 1, 2], [0, 2, 1]])
    with pytest.raises(ValueError, match="1 of 3 rows are not, the first of them row 2"):
        reference_ranks(references, np.zeros((3, 1)))


@pytest.mark.parametrize(
    "shapes", [((2, 0), (2, 1)), ((2, 3), (3, 1)), ((3,), (3, 1)), ((2, 3), (2,))]
)
def test_bad_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"m=0|got shapes"):
        reference_ranks(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_under_tracing_values_are_not_checked():
    references, rewards = np.float32([[0, 1, 2]]), np.float32([[np.nan, 1.5]])
    below, _ = jax.jit(reference_ranks)(references, rewards)
    assert below[0, 1] == 2


# Ties ------------------------------------------------------------------------------------------


def test_ordered_ranks_golden():
    # Keys above 2^31 are large, not negative.
    references, order = [[1.0, 1.0, 0.0, 1.0, 2.0]], np.uint32([[7, 2**31, 2**32 - 1, 7, 0]])
    below, equal = ordered_ranks(
        references, order, [[1.0, 1.0, 1.0, 0.0]], np.uint32([[7, 2**32 - 1, 6, 3]])
    )
    np.testing.assert_array_equal(below, [[1, 4, 1, 0]])
    np.testing.assert_array_equal(equal, [[2, 0, 0, 0]])
    assert below.dtype == equal.dtype == jnp.int32


def test_ordered_ranks_are_places_in_the_lexicographic_order():
    rng = np.random.default_rng(3)
    references, rewards = tied_rewards(4, (3, 40)), tied_rewards(5, (3, 9))
    order, keys = rng.integers(0, 4, (3, 40)), rng.integers(0, 4, (3, 9))
    below, equal = jax.jit(ordered_ranks)(
        references, order.astype(np.uint32), rewards, keys.astype(np.uint32)
    )
    # 4 keys: reward + key / 8 has the same order, and all of it is exact in float32.
    want = reference_ranks(np.sort(references + order / 32, axis=1), rewards + keys / 32)
    np.testing.assert_array_equal(below, want[0])
    np.testing.assert_array_equal(equal, want[1])
    # With one key for all, order says nothing.
    one, other = np.zeros((3, 40), np.uint32), np.zeros((3, 9), np.uint32)
    for got, plain in zip(
        ordered_ranks(references, one, rewards, other),
        reference_ranks(np.sort(references, axis=1), rewards),
    ):
        np.testing.assert_array_equal(got, plain)


def test_ordered_ranks_refuse_what_they_cannot_rank():
    rewards, order = np.zeros((2, 3)), np.zeros((2, 3), np.uint32)
    with pytest.raises(ValueError, match=r"order_PxM must be uint32 .* got dtype int64"):
        ordered_ranks(rewards, order.astype(np.int64), rewards, order)
    with pytest.raises(ValueError, match=r"order_PxB must .* shape \(2, 3\), got shape \(2, 1\)"):
        ordered_ranks(rewards, order, rewards, order[:, :1])
    with pytest.raises(ValueError, match="reward_PxB holds 6 NaN"):
        ordered_ranks(rewards, order, rewards * np.nan, order)
    with pytest.raises(ValueError, match="rewards_PxM has m=0"):
        ordered_ranks(rewards[:, :0], order[:, :0], rewards, order)
    with pytest.raises(ValueError, match="one row a prompt, got shapes"):
        ordered_ranks(rewards[:1], order[:1], rewards, order)


def twin_order(tokens):
    """`response_order` of one list of token ids in Python's own integers."""
    word = 2**32 - 1

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B & word
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & word
        return x ^ (x >> 16)

    total = 0
    for place, token in enumerate(tokens, start=1):
        total += mix((mix(token + 0x9E3779B9 & word) + mix(place)) & word)
    return mix(total & word)


def test_response_order_is_the_hash_that_it_was():
    # Written to files nowhere, but two processes and two versions must agree on who wins a tie.
    tokens = np.array([[5, 0, 50256], [5, 0, 7], [9, 9, 9]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    want = [twin_order([5, 0, 50256]), twin_order([5, 0]), twin_order([])]
    got = response_order(tokens, mask)
    assert got.dtype == jnp.uint32 and got.tolist() == want
    assert jax.jit(response_order)(jnp.asarray(tokens), mask.astype(bool)).tolist() == want


def test_response_order_does_not_see_padding():
    tokens = np.array([[3, 1, 4, 0, 0, 0], [3, 1, 4, 9, 9, 2], [8, 8, 3, 1, 4, 8]])
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
    keys = np.asarray(response_order(tokens, mask))
    assert len(set(keys)) == 1
    assert keys[0] == response_order(tokens[:1, :3], mask[:1, :3])[0]
    # A token more, and the same tokens in another order, are other responses.
    assert response_order(tokens[:1], [[1, 1, 1, 1, 0, 0]])[0] != keys[0]
    assert response_order([[1, 3, 4]], np.ones((1, 3)))[0] != keys[0]


def test_response_order_is_well_mixed():
    strings = np.stack(np.meshgrid(*[np.arange(6)] * 5, indexing="ij"), -1).reshape(-1, 5)
    keys = np.asarray(response_order(strings, np.ones(strings.shape, bool)))
    assert len(set(keys)) == 6**5
    # Each bit is set half the time; 5 standard deviations.
    bits = (keys[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert (abs(bits.mean(axis=0) - 0.5) < 2.5 / math.sqrt(6**5)).all()
    # So does a change of one token, whichever, flip each bit.
    for place in range(5):
        changed = strings.copy()
        changed[:, place] = (changed[:, place] + 1) % 6
        flipped = keys ^ np.asarray(response_order(changed, np.ones(strings.shape, bool)))
        rates = ((flipped[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
        assert (abs(rates - 0.5) < 0.05).all()


def test_response_order_refuses_other_shapes_and_floats():
    with pytest.raises(ValueError, match=r"got shapes \(1, 3\) and \(1, 2\)"):
        response_order([[1, 2, 3]], [[1, 1]])
    with pytest.raises(ValueError, match="integer token ids, got dtype float32"):
        response_order([[1.0, 2.0]], [[1, 1]])


def test_log_mass_golden():
    got = log_mass("random", [0, 2, 2], 8, np.float32([-3, -3, -0.5]))
    np.testing.assert_allclose(got, [-3, math.log(2 / 8), -0.5], rtol=1e-6)
    got = jax.jit(log_mass, static_argnums=0)("order", jnp.array([0, 8]), 8, -3.0)
    np.testing.assert_array_equal(got, [-3, -3])
    assert got.dtype == jnp.float32
    with pytest.raises(ValueError, match="ties must be one of random, order, got ties='fixed'"):
        log_mass("fixed", 0, 8, -3.0)
    with pytest.raises(ValueError, match="got m=0"):
        log_mass("order", 0, 0, -3.0)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("levels", [2, 3])
def test_with_ties_every_estimate_tends_to_the_exact_ratio(ties, levels):
    # Enough samples that each string and each level comes as often as it should.
    m, rng = 1_000_000, np.random.default_rng(levels)
    ref_S = 0.4 / 50 + 0.6 * rng.dirichlet(np.ones(50))
    log_ref_S, rewards_S = np.log(ref_S), rng.integers(0, levels, 50).astype(np.float64)
    if ties == "order":
        tokens = rng.integers(0, 100, (50, 4))
        order_S = np.asarray(response_order(tokens, np.ones((50, 4))))
        place_S = np.empty(50)
        place_S[np.lexsort((order_S, rewards_S))] = np.arange(50)
        # The ranks that `ordered_ranks` counts are those of the places.
        below, _ = ordered_ranks(rewards_S[None], order_S[None], rewards_S[None], order_S[None])
        np.testing.assert_array_equal(below[0], place_S)
        rewards_S = place_S
    log_f_S, log_mass_S = enumeration.log_f_and_mass(log_ref_S, rewards_S)
    k, e = np.rint(m * np.exp(log_f_S)).astype(int), np.rint(m * np.exp(log_mass_S)).astype(int)
    log_g = log_mass(ties, e, m, log_ref_S)
    np.testing.assert_allclose(log_g, log_mass_S, atol=1e-3)
    for n in (1.5, 8.0):
        exact_S = enumeration.log_bon(log_ref_S, rewards_S, n) - log_ref_S
        for estimator in RANK_ESTIMATORS:
            got = log_ratio(estimator, k, e, m, n, log_g)
            np.testing.assert_allclose(got, exact_S, atol=2e-3, err_msg=estimator)
        given = np.float32(log_f_S)
        got = log_ratio("exponential", k, e, m, n, log_g, given)
        np.testing.assert_allclose(got, exact_S, atol=1e-3)


# Estimators of log F ---------------------------------------------------------------------------

GOLDEN = {  # k = 0, 1, 3 of m = 3
    "smoothed": [math.log(1 / 4), math.log(2 / 4), 0.0],
    "strict": [-math.inf, math.log(1 / 3), 0.0],
    "harmonic": [-(1 + 1 / 2 + 1 / 3), -(1 / 2 + 1 / 3), 0.0],
}


@pytest.mark.parametrize("estimator", GOLDEN)
def test_log_f_golden(estimator):
    got = log_f([0, 1, 3], 3, estimator)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, GOLDEN[estimator], rtol=1e-6)
    traced = jax.jit(jax.vmap(lambda k, m: log_f(k, m, estimator)))(
        np.int32([0, 1, 3]), np.int32([3, 3, 3])
    )
    np.testing.assert_allclose(traced, GOLDEN[estimator], rtol=1e-6)


@pytest.mark.parametrize("m", [1, 10, 600, 100_000])
@pytest.mark.parametrize("estimator", GOLDEN)
def test_log_f_equals_mpmath(estimator, m):
    k = np.unique(np.concatenate([np.arange(min(m, 12) + 1), np.linspace(0, m, 9, dtype=int)]))
    k = np.unique(np.append(k, m - 1))
    exact = {
        "smoothed": lambda k: mpmath.log(mpmath.mpf(k + 1) / (m + 1)),
        "strict": lambda k: mpmath.log(mpmath.mpf(k) / m) if k else -mpmath.inf,
        "harmonic": lambda k: mpmath.harmonic(k) - mpmath.harmonic(m),
    }[estimator]
    want = np.array([float(exact(int(i))) for i in k])
    got = np.asarray(log_f(k, m, estimator))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-9)
    assert (got <= 0).all() and (np.diff(got) > 0).all() and got[-1] == 0


@pytest.mark.parametrize("true_f", [0.02, 0.4, 0.95])
def test_harmonic_is_the_taylor_series_of_log_f_on_average(true_f):
    m = 40
    k = np.arange(m + 1)
    chance = [math.comb(m, i) * true_f**i * (1 - true_f) ** (m - i) for i in k]
    mean = np.sum(chance * np.asarray(log_f(k, m, "harmonic"), np.float64))
    j = np.arange(1, m + 1)
    np.testing.assert_allclose(mean, -np.sum((1 - true_f) ** j / j), rtol=1e-5)


def test_bad_estimator_and_m_are_named():
    with pytest.raises(ValueError, match="smoothed, strict, harmonic, got estimator='laplace'"):
        log_f(1, 2, "laplace")
    with pytest.raises(ValueError, match="got estimator='interval'"):
        log_f(1, 2, "interval")
    with pytest.raises(ValueError, match="got estimator='laplace'"):
        log_ratio("laplace", 1, 0, 2, 8.0, -3.0)
    with pytest.raises(ValueError, match="needs log_mass"):
        log_ratio("harmonic", 1, 0, 2, 8.0)
    with pytest.raises(ValueError, match="'exponential' needs log_f, got log_f=None"):
        log_ratio("exponential", 1, 0, 2, 8.0, -3.0)
    for call in (
        lambda m: log_f(0, m, "smoothed"),
        lambda m: log_ratio_interval(0, 0, m, 2.0),
        lambda m: log_f(0, np.array([5, m]), "harmonic"),
    ):
        with pytest.raises(ValueError, match=r"m must be >= 1 .*got m=0"):
            call(0)
    with pytest.raises(ValueError, match=r"got n=0\.5"):
        log_ratio_interval(0, 0, 3, 0.5)


# The interval estimator ------------------------------------------------------------------------


def test_log_ratio_interval_golden():
    # m = 3, n = 2: k = 0 gives (1/16) / (1/4), k = 1 with e = 1 gives (9/16 - 1/16) / (2/4).
    got = log_ratio_interval([0, 1, 3], [0, 1, 0], 3, 2.0)
    np.testing.assert_allclose(np.exp(got), [1 / 4, 1.0, 7 / 4], rtol=1e-6)
    traced = jax.jit(log_ratio_interval)(np.int32([0, 1, 3]), np.int32([0, 1, 0]), 3, 2.0)
    np.testing.assert_allclose(np.exp(traced), [1 / 4, 1.0, 7 / 4], rtol=1e-6)


@pytest.mark.parametrize("m", [1, 600, 1_000_000])
@pytest.mark.parametrize("n", [1.0, 1.5, 8.0, 1e6])
def test_log_ratio_interval_equals_mpmath(m, n):
    pairs = {(k, e) for k in (0, 1, m // 2, m - 1, m) for e in (0, 1, m // 3) if k + e <= m}
    k, e = np.array(sorted(pairs)).T
    got = np.asarray(log_ratio_interval(k, e, m, n))
    with mpmath.workdps(60):
        want = []
        for k_, e_ in sorted(pairs):
            upper, lower = mpmath.mpf(k_ + e_ + 1) / (m + 1), mpmath.mpf(k_) / (m + 1)
            mass = mpmath.mpf(e_ + 1) / (m + 1)
            want.append(float(mpmath.log((upper**n - lower**n) / mass)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (got <= math.log(n) + 1e-5).all()
    if n == 1:
        assert (got == 0).all()


@pytest.mark.parametrize("n", [1.0, 2.5, 8.0, 300.0])
def test_interval_is_normalised_exactly_under_the_reference(n):
    # Any of m + 1 exchangeable samples may be y; its ratio averages to 1, with ties or without.
    for samples in (
        np.arange(41.0),
        tied_rewards(5, 41),
        np.zeros(41),
        np.sign(tied_rewards(6, 41)),
    ):
        samples = np.float32(samples)
        rest = np.array([np.sort(np.delete(samples, i)) for i in range(41)])
        below, equal = reference_ranks(rest, samples[:, None])
        ratio = np.exp(np.asarray(log_ratio_interval(below, equal, 40, n), np.float64))
        np.testing.assert_allclose(ratio.mean(), 1, rtol=3e-5)


def test_log_ratio_is_the_estimator_in_formula_1():
    k, e, log_g = np.array([0, 5, 20]), np.array([0, 2, 0]), np.float32([-30, -2, -4])
    for estimator in GOLDEN:
        np.testing.assert_array_equal(
            log_ratio(estimator, k, e, 20, 8.0, log_g),
            log_bon_ratio(log_f(k, 20, estimator), log_g, 8.0),
        )
        assert np.isfinite(log_ratio(estimator, k, e, 20, 8.0, log_g)).all()
    np.testing.assert_array_equal(
        log_ratio("interval", k, e, 20, 8.0), log_ratio_interval(k, e, 20, 8.0)
    )
    given = np.float32([-3, -0.5, -0.1])
    np.testing.assert_array_equal(
        log_ratio("exponential", k, e, 20, 8.0, log_g, given), log_bon_ratio(given, log_g, 8.0)
    )


@pytest.mark.parametrize("estimator", RANK_ESTIMATORS)
def test_estimates_approach_the_exact_ratio_as_m_grows(estimator):
    # Uniform rewards: F(r) = r, and a response of no mass has log ratio log n + (n-1) log r.
    r, n, m = np.float32([0.3, 0.6, 0.9]), 4.0, 200_000
    references = np.sort(np.random.default_rng(2).random((1, m)).astype(np.float32))
    below, equal = reference_ranks(references, r[None])
    got = np.asarray(log_ratio(estimator, below, equal, m, n, -100.0))[0]
    np.testing.assert_allclose(got, np.log(n) + (n - 1) * np.log(r), atol=0.03)


@pytest.mark.parametrize("estimator", RANK_ESTIMATORS)
def test_a_strictly_increasing_transform_changes_no_bit(estimator):
    references, rewards = np.sort(tied_rewards(7, (4, 50)), axis=1), tied_rewards(8, (4, 6))

    def train_reward(transform):
        below, equal = reference_ranks(transform(references), transform(rewards))
        ratio = log_ratio(estimator, below, equal, 50, 8.0, -20.0)
        return np.asarray(sequence_reward("exact", n=8.0, log_ratio=ratio))

    plain = train_reward(lambda r: r)
    for transform in (np.exp, lambda r: 1e6 * r - 7, lambda r: r**3, np.arctan):
        assert train_reward(transform).tobytes() == plain.tobytes()
    assert train_reward(np.floor).tobytes() != plain.tobytes()
