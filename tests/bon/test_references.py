"""The one definition of best-of-n's density from reference rewards: twins, enumeration, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma

from vbon_jax.bon import enumeration
from vbon_jax.bon import log_f as lf
from vbon_jax.bon.exponential import fit
from vbon_jax.bon.references import density, references

RNG = np.random.default_rng(4)
M = 12
REWARDS = RNG.integers(0, 8, size=(3, M)).astype(np.float32)  # tied in groups of about two
ORDER = RNG.integers(0, 50, size=(3, M), dtype=np.uint32)  # with a few collisions
ROW = np.array([2, 0, 1, 1, 2, 0, 0])
REWARD = np.float32(
    [REWARDS[2, 0], 3, 0, 7, -1, 9, 4.5]
)  # of a group, below all, above all, between
KEYS = np.array([ORDER[2, 0], 20, 0, 49, 7, 3, 25], np.uint32)
LOG_REF = np.float32([-3, -1, -20, -0.5, -150, -2, -4])
ESTIMATORS = ("smoothed", "strict", "harmonic", "interval")


def counts(i, by_order, columns=slice(None)):
    """k and e of response i, counted one reference at a time."""
    below = equal = 0
    for r, o in zip(REWARDS[ROW[i], columns], ORDER[ROW[i], columns]):
        mine, other = ((REWARD[i], KEYS[i]), (r, o)) if by_order else ((REWARD[i],), (r,))
        below += other < mine
        equal += other == mine
    return below, equal


def twin(i, n, estimator, by_order):
    """(log ratio, log F or None, log g, log up to) in float64, formula (1) as it is written."""
    k, e = counts(i, by_order)
    log_ref = float(LOG_REF[i])
    log_g = log_ref if by_order or e == 0 else max(log_ref, np.log(e / M))
    up_to = np.log((k + e + 1) / (M + 1))
    if estimator == "interval":
        ratio = np.log(((k + e + 1) / (M + 1)) ** n - (k / (M + 1)) ** n) - np.log(
            (e + 1) / (M + 1)
        )
        return ratio, None, log_g, up_to
    with np.errstate(divide="ignore"):
        log_f = {
            "smoothed": np.log((k + 1) / (M + 1)),
            "strict": np.log(k / M),
            "harmonic": digamma(k + 1) - digamma(M + 1),
        }[estimator]
    g, f = np.exp(log_g), np.exp(log_f)
    f = min(f, 1 - g)  # an estimate above is noise
    if g < 1e-9:  # lost beside F: the limit
        limit = np.log(n) + (n - 1) * log_f if f > 0 else (n - 1) * log_g
        return limit, log_f, log_g, up_to
    return np.log(((f + g) ** n - f**n) / g), log_f, log_g, up_to


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_density_equals_a_twin_that_counts_one_by_one(estimator, by_order):
    table = references(REWARDS, estimator, ORDER if by_order else None)
    for n in (1.0, 2.5, 16.0):
        got = density(
            table, ROW, REWARD, KEYS if by_order else None, LOG_REF, n, estimator=estimator
        )
        want = [twin(i, n, estimator, by_order) for i in range(len(ROW))]
        ratio, log_f, log_g, up_to = zip(*want)
        np.testing.assert_allclose(got.log_ratio_B, ratio, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got.log_mass_B, log_g, rtol=1e-6)
        np.testing.assert_allclose(got.log_up_to_B, up_to, rtol=1e-5, atol=1e-6)
        if estimator == "interval":
            assert got.log_f_B is None
        else:
            np.testing.assert_allclose(got.log_f_B, log_f, rtol=1e-5, atol=1e-6)
        assert all(x is None or x.dtype == jnp.float32 for x in got)


def test_the_twin_meets_every_case():
    """Groups with and without a member among the references, by both rules."""
    random, ordered = ([counts(i, o) for i in range(len(ROW))] for o in (False, True))
    assert {k for k, _ in random} >= {0, M} and {e > 0 for _, e in random} == {True, False}
    assert max(e for _, e in random) >= 2
    assert any(e > 0 for _, e in ordered) and ordered != random


def test_references_sorts_rewards_and_their_places_together():
    table = references(REWARDS.astype(np.float64)[:, ::-1], "smoothed", ORDER[:, ::-1])
    assert table.rewards_PxM.dtype == jnp.float32 and table.order_PxM.dtype == jnp.uint32
    for row in range(3):
        pairs = sorted(zip(REWARDS[row].tolist(), ORDER[row].tolist()))
        got = list(zip(table.rewards_PxM[row].tolist(), table.order_PxM[row].tolist()))
        assert got == pairs
    assert table.fit is None and int(table.m) == M
    assert references(REWARDS, "interval").order_PxM is None


WORLD = np.float32([1, 0, 2, 1, 1, 0, 2, 3])  # rewards of 8 strings in tie groups of 3, 2, 2, 1
PLACES = np.array([5, 900, 3, 17, 2**32 - 1, 4, 8, 1], np.uint32)
P_REF = np.array([0.2, 0.1, 0.05, 0.15, 0.1, 0.2, 0.12, 0.08])


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_many_samples_the_density_is_the_exact_one(estimator, by_order):
    drawn = np.random.default_rng(0).choice(8, size=(1, 200_000), p=P_REF)
    order = PLACES[drawn] if by_order else None
    table = references(WORLD[drawn], estimator, order)
    n = 5.0
    got = density(
        table, np.zeros(8, int), WORLD, PLACES if by_order else None, np.log(P_REF), n,
        estimator=estimator,
    )  # fmt: skip
    ranked = np.argsort(np.lexsort((PLACES, WORLD))) if by_order else WORLD
    want = enumeration.log_bon(np.log(P_REF), ranked, n) - np.log(P_REF)
    bottom = ranked == ranked.min()
    np.testing.assert_allclose(got.log_ratio_B[~bottom], want[~bottom], atol=0.03)
    # At F = 0 log F is only estimated as low as m lets it be; g does the rest.
    np.testing.assert_allclose(got.log_ratio_B[bottom], want[bottom], atol=0.03)
    log_f, log_g = enumeration.log_f_and_mass(np.log(P_REF), ranked)
    np.testing.assert_allclose(got.log_up_to_B, np.logaddexp(log_f, log_g), atol=0.01)
    assert (np.ptp(want[WORLD == 1]) > 0.1) == by_order  # the two rules differ


def padded(table, wide):
    pad = ((0, 0), (0, wide))
    return table._replace(
        rewards_PxM=jnp.pad(table.rewards_PxM, pad, constant_values=jnp.inf),
        order_PxM=None if table.order_PxM is None else jnp.pad(table.order_PxM, pad),
    )


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "exponential"])
def test_padding_with_inf_changes_nothing(estimator, by_order):
    """Also for a reward of +inf, which is above every reference but equal to the padding."""
    table = references(REWARDS, estimator, ORDER if by_order else None)
    reward = REWARD.copy()
    if estimator != "exponential":  # whose curve tends to 0 there
        reward[5] = np.inf
    args = ROW, reward, KEYS if by_order else None, LOG_REF, 8.0
    want = density(table, *args, estimator=estimator)
    got = density(padded(table, 5), *args, estimator=estimator)
    for name, a, b in zip(want._fields, want, got):
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)
    finite = np.asarray(want.log_ratio_B)
    assert np.isfinite(finite).all() and finite.max() <= np.log(8) + 1e-6


def test_members_of_a_vmap_may_have_tables_and_n_of_their_own():
    tables = [references(REWARDS[:, :m], "harmonic") for m in (5, M)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), padded(tables[0], M - 5), tables[1])
    ns = jnp.float32([2, 30])

    def one(table, n):
        return density(table, ROW, REWARD, None, LOG_REF, n, estimator="harmonic").log_ratio_B

    got = jax.jit(jax.vmap(one))(stacked, ns)
    for own, table, n in zip(got, tables, (2.0, 30.0)):
        want = density(table, ROW, REWARD, None, LOG_REF, n, estimator="harmonic").log_ratio_B
        np.testing.assert_allclose(own, want, rtol=1e-5, atol=1e-5)


def test_exponential_takes_the_curve_and_falls_back_to_smoothed():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(3, 40)).astype(np.float32)
    rewards[1] = 2.0  # nothing to fit
    table = references(rewards, "exponential")
    assert table.fit.converged_P.tolist() == [True, False, True]
    rows, reward = np.array([0, 1, 1, 1, 2]), np.float32([0.3, 1.0, 2.0, 3.0, -0.5])
    log_ref = np.full(5, -30, np.float32)
    got = density(table, rows, reward, None, log_ref, 4.0, estimator="exponential")
    curves = fit(np.sort(rewards, axis=1))
    for i in (0, 4):
        log_a, b = float(curves.log_a_P[rows[i]]), float(curves.b_P[rows[i]])
        want = -np.exp(log_a - b * reward[i])
        assert float(got.log_f_B[i]) == pytest.approx(want, rel=1e-5)
        assert abs(want - np.log((np.sum(rewards[rows[i]] < reward[i]) + 1) / 41)) < 0.3
        # g is nothing beside F: log n + (n - 1) log F.
        assert float(got.log_ratio_B[i]) == pytest.approx(np.log(4) + 3 * want, abs=1e-4)
    np.testing.assert_allclose(got.log_f_B[1:4], np.log([1 / 41, 1 / 41, 1]), atol=1e-6)


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(ValueError, match=r"estimator must be one of .* got estimator='spline'"):
        references(REWARDS, "spline")
    with pytest.raises(ValueError, match=r"rewards' shape \(3, 12\), got \(3, 11\)"):
        references(REWARDS, "smoothed", ORDER[:, 1:])
    args = ROW, REWARD, None, LOG_REF, 2.0
    with pytest.raises(ValueError, match="breaks ties by order: order_B is needed, got None"):
        density(references(REWARDS, "smoothed", ORDER), *args, estimator="smoothed")
    with pytest.raises(ValueError, match="needs a table with its fits, got fit=None"):
        density(references(REWARDS, "smoothed"), *args, estimator="exponential")
    with pytest.raises(ValueError, match="got estimator='spline'"):
        density(references(REWARDS, "smoothed"), *args, estimator="spline")
    with pytest.raises(ValueError, match="NaN"):
        density(
            references(REWARDS, "smoothed"), ROW, REWARD * np.nan, None, LOG_REF, 2.0,
            estimator="smoothed",
        )  # fmt: skip


def test_estimators_are_all_covered():
    assert set(lf.ESTIMATORS) == {*ESTIMATORS, "exponential"}


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_prompts_may_have_fewer_rewards_than_others(estimator, by_order):
    """As if each had a table of its own."""
    counts = np.array([REWARDS.shape[1] - 2 * (i % 3) for i in range(len(REWARDS))], np.int32)
    real = np.arange(REWARDS.shape[1]) < counts[:, None]
    rewards = np.where(real, REWARDS, np.inf)
    table = references(rewards, estimator, ORDER if by_order else None, counts)
    got = density(table, ROW, REWARD, KEYS if by_order else None, LOG_REF, 8.0, estimator=estimator)
    for b, row in enumerate(ROW):
        count = counts[row]
        alone = references(
            REWARDS[row : row + 1, :count], estimator,
            ORDER[row : row + 1, :count] if by_order else None,
        )  # fmt: skip
        want = density(
            alone, [0], REWARD[b : b + 1], KEYS[b : b + 1] if by_order else None,
            LOG_REF[b : b + 1], 8.0, estimator=estimator,
        )  # fmt: skip
        for name, a, of_all in zip(want._fields, want, got):
            if a is not None:
                np.testing.assert_allclose(of_all[b], a[0], rtol=1e-6, err_msg=name)


def test_the_exponential_estimator_refuses_rows_of_several_lengths():
    with pytest.raises(ValueError, match="fits rows of one length"):
        references(REWARDS, "exponential", None, np.full(len(REWARDS), 2))
