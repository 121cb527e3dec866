import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.bon import amortised, enumeration, references
from vbon_jax.bon.amortised import Prior

RANKED = ("smoothed", "strict", "harmonic", "interval")
N = 8.0


def prior_of(pool_N, cumulative_PxE, c, edges_E=None):
    edges_E = np.arange(len(pool_N) + 1) if edges_E is None else edges_E
    return Prior(
        jnp.asarray(pool_N, jnp.float32), jnp.asarray(edges_E, jnp.int32),
        jnp.asarray(cumulative_PxE, jnp.float32), jnp.float32(c),
    )  # fmt: skip


def density(rewards_PxM, prior, reward_B, estimator, m_P=None, log_ref=-40.0):
    table = references.references(rewards_PxM, estimator, None, m_P, prior)
    row_B = np.zeros(len(reward_B), np.int32)
    log_ref_B = np.full(len(reward_B), log_ref, np.float32)
    return references.density(table, row_B, reward_B, None, log_ref_B, N, estimator=estimator)


@pytest.mark.parametrize("estimator", RANKED)
def test_a_prior_worth_no_samples_changes_nothing(estimator):
    rng = np.random.default_rng(0)
    rewards, reward_B = rng.integers(0, 9, (1, 24)) / 2, rng.integers(-1, 11, 40) / 2
    nothing = prior_of(np.arange(9.0), [np.linspace(0, 1, 10)], 0.0)
    without = density(rewards, None, reward_B, estimator)
    with_it = density(rewards, nothing, reward_B, estimator)
    for a, b in zip(without, with_it, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("estimator", RANKED)
@pytest.mark.parametrize("ties", [False, True])
def test_a_prior_that_is_right_and_worth_all_gives_the_exact_ratio(estimator, ties):
    """Every string of an enumerated world, whatever the few samples say."""
    rng = np.random.default_rng(1)
    mass_S = rng.dirichlet(np.ones(30))
    reward_S = np.sort(rng.integers(0, 6, 30) if ties else rng.normal(size=30)).astype(np.float32)
    right = prior_of(reward_S, [np.concatenate([[0], np.cumsum(mass_S)])], 1e8)
    log_f, log_mass = enumeration.log_f_and_mass(np.log(mass_S), reward_S)
    exact = enumeration.log_bon_ratio(log_f, log_mass, N)
    found = density(reward_S[None, -3:], right, reward_S, estimator).log_ratio_B
    known = np.isfinite(log_f)  # where F = 0, one sample of its own is as good as nothing
    np.testing.assert_allclose(np.asarray(found)[known], exact[known], rtol=1e-4, atol=1e-4)


def test_the_counts_are_those_of_the_posterior_of_a_dirichlet_process():
    """A twin in NumPy: (c F0 + k) / (c + m), and the interval of formula (1) around it."""
    pool = np.arange(10.0)
    cumulative = np.linspace(0, 1, 11) ** 2
    c, samples, r = 5.0, np.array([1.5, 3.0, 3.0, 7.0]), 3.0
    table = references.references(samples[None], "interval", None, None,
                                  prior_of(pool, [cumulative], c))  # fmt: skip
    below, equal, m = references.counts(table, [0], [r], None)
    np.testing.assert_allclose(below, c * 0.09 + 1, rtol=1e-6)
    np.testing.assert_allclose(equal, c * (0.16 - 0.09) + 2, rtol=1e-6)
    np.testing.assert_allclose(m, c + 4)
    low, high = (c * 0.09 + 1) / (c + 5), (c * 0.16 + 4) / (c + 5)
    ratio = np.log(high**N - low**N) - np.log(high - low)
    found = references.density(table, [0], [r], None, [-40.0], N, estimator="interval")
    np.testing.assert_allclose(found.log_ratio_B, ratio, rtol=1e-5)
    between, _, _ = references.counts(table, [0], [3.5], None)  # unseen: no mass of its own
    np.testing.assert_allclose(between, c * 0.16 + 3, rtol=1e-6)
    of_prefixes = references.prefix_counts(table, jnp.array([0]), jnp.array([[r, 3.5]]))
    np.testing.assert_allclose(of_prefixes.below, [[c * 0.09 + 1, c * 0.16 + 3]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ("smoothed", "harmonic", "interval"))
def test_a_prompt_without_samples_has_the_heads_own(estimator):
    pool = np.arange(64.0)
    prior = prior_of(pool, [np.linspace(0, 1, 65)], 50.0)
    rewards, m_P = np.full((1, 1), np.inf), np.zeros(1)
    found = density(rewards, prior, np.array([-1.0, 5.0, 32.0, 63.0, 99.0]), estimator, m_P)
    ratio = np.asarray(found.log_ratio_B)
    assert np.isfinite(ratio).all() and (np.diff(ratio[:-1]) > 0).all()
    middle = np.log(N) + (N - 1) * np.log(0.5)  # the density n F^(n-1) at the median
    assert ratio[2] == pytest.approx(middle, abs=0.3)


def test_n_may_be_traced():
    prior = prior_of(np.arange(8.0), [np.linspace(0, 1, 9)], 3.0)
    table = references.references(np.array([[2.0, 5.0]]), "interval", None, None, prior)

    @jax.jit
    def of(table, n):
        found = references.density(table, [0], [4.0], None, [-9.0], n, estimator="interval")
        return found.log_ratio_B

    at = [float(of(table, n)[0]) for n in (1.0, 2.0, 64.0)]
    assert at[0] == 0 and at[2] < at[1]


def test_only_ranks_count():
    rng = np.random.default_rng(3)
    rewards, new = rng.normal(size=(4, 50)).astype(np.float32), rng.normal(size=(4, 7))
    new = new.astype(np.float32)

    def of(f):
        pool = amortised.pooled(f(rewards))
        edges = amortised.edges(pool, 8)
        cumulative = np.sort(np.random.default_rng(4).random((4, len(edges))), axis=1)
        prior = prior_of(pool, cumulative, 2.0, edges)
        counts = amortised.bin_counts(pool, edges, f(rewards)[0])
        return edges, counts, *amortised.f0_and_mass(prior, np.arange(4), f(new))

    for a, b in zip(of(lambda x: x), of(lambda x: np.exp(x) * 3 + 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bins_divide_the_pool_evenly_and_keep_ties_together():
    even = amortised.edges(np.arange(100.0), 4)
    np.testing.assert_array_equal(even, [0, 25, 50, 75, 100])
    pool = amortised.pooled([0.0] * 700 + [1.0] * 300)
    edges = amortised.edges(pool, 64)
    np.testing.assert_array_equal(edges, [0, 700, 1000])
    np.testing.assert_array_equal(amortised.bin_counts(pool, edges, [0, 0, 1, 7, -3]), [3, 2])
    f0, mass = amortised.f0_and_mass(prior_of(pool, [[0, 0.6, 1]], 1.0, edges), [0], [[0.0, 1.0]])
    np.testing.assert_allclose(f0, [[0, 0.6]], atol=1e-6)
    np.testing.assert_allclose(mass, [[0.6, 0.4]], atol=1e-6)
    mixed = np.sort(np.concatenate([np.full(300, 0.5), np.linspace(0, 1, 701)]))
    places = amortised.edges(mixed, 10)
    low, high = np.searchsorted(mixed, 0.5, "left"), np.searchsorted(mixed, 0.5, "right")
    assert {low, high} <= set(places.tolist())
    assert not any(low < place < high for place in places)


def test_of_a_large_pool_the_quantiles_are_kept(monkeypatch):
    monkeypatch.setattr(amortised, "MOST_POOLED", 100)
    kept = amortised.pooled(np.arange(10_000.0)[::-1])
    np.testing.assert_array_equal(kept, np.arange(50.0, 10_000, 100))
    with pytest.raises(ValueError, match="finite and at least one, got 0"):
        amortised.pooled([])


@pytest.mark.parametrize("c", [4.0, 60.0])
def test_the_concentration_is_that_of_the_process_the_samples_are_of(c):
    rng = np.random.default_rng(5)
    mass_K = np.full(8, 1 / 8)
    prompts, m = 1_500, 12
    counts = np.array([rng.multinomial(m, p) for p in rng.dirichlet(c * mass_K, prompts)])
    cumulative = np.tile(np.concatenate([[0], np.cumsum(mass_K)]), (prompts, 1))
    assert amortised.concentration(cumulative, counts) == pytest.approx(c, rel=0.2)


def test_what_does_not_go_together_is_refused():
    prior = prior_of(np.arange(3.0), [np.linspace(0, 1, 4)], 2.0)
    rewards = np.arange(4.0)[None]
    with pytest.raises(ValueError, match="estimator='exponential'"):
        references.references(rewards, "exponential", None, None, prior)
    with pytest.raises(ValueError, match="and order_PxM"):
        references.references(rewards, "interval", np.zeros((1, 4), np.uint32), None, prior)
    with pytest.raises(ValueError, match="a prompt without a reward"):
        references.references(rewards, "interval", None, np.zeros(1))
