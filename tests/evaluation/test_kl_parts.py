"""KL to best-of-n in worlds where it is known: F of a response has a density given beforehand."""

import numpy as np
import pytest
from scipy.integrate import quad

from vbon_jax.bon import jackknife, quantiles
from vbon_jax.evaluation import compare, kl_parts

N = 8


class Policy:
    """F of its responses has the density (1 - far) a F^(a - 1) + far."""

    def __init__(self, a: float, far: float):
        self.a, self.far = a, far
        self.kl = quad(lambda f: self.density(f) * np.log(self.density(f)), 0, 1)[0]
        gain = np.log(N) - (N - 1) * ((1 - far) / a + far)  # E[log N + (N - 1) log F]
        self.kl_bon, self.lost = self.kl - gain, np.log(N) - (N - 1) / N - gain

    def density(self, f):
        return (1 - self.far) * self.a * f ** (self.a - 1) + self.far

    def measured(self, rng, prompts, each, m):
        """``parts`` of a draw of responses, their measured KLs, and m opponents a prompt."""
        f = rng.random((prompts, each)) ** (1 / self.a)
        f = np.where(rng.random(f.shape) < self.far, rng.random(f.shape), f)
        opponents = np.sort(rng.random((prompts, m)), axis=1)
        at = np.arange(prompts)[:, None]  # one search for all prompts: each has its own unit
        below = np.searchsorted((opponents + at).ravel(), f + at) - at * m
        kl = self.kl + rng.normal(size=f.shape) * 0.5
        kl_k1 = np.log(self.density(f)) + rng.normal(size=f.shape) * 0.3
        spans = below / (m + 1), (below + 1) / (m + 1)
        ratio = jackknife.log_ratio(below, 0 * below, m, N)
        bon = quantiles.best_of_n(opponents, N, kl_parts.EDGES)
        return kl_parts.parts(kl, kl_k1, ratio, spans, bon)


NEAR = Policy(7.0, 0.02)


def test_intervals_cover_what_they_estimate():
    """A policy with 2% of its responses anywhere, where log ratios reach -29 nats: 200 draws."""
    rng = np.random.default_rng(0)
    rows = [NEAR.measured(rng, 128, 16, 64) for _ in range(200)]
    true = {"kl_bon": NEAR.kl_bon, "kl_lost": NEAR.lost, "kl_excess": NEAR.kl_bon - NEAR.lost}
    for name, value in true.items():
        covered = [row[f"{name}_ci95"][0] <= value <= row[f"{name}_ci95"][1] for row in rows]
        assert np.mean(covered) >= 0.9, name
        means = np.array([row[name] for row in rows])
        assert means.mean() == pytest.approx(value, abs=4 * means.std() / np.sqrt(200)), name
    halves = [(row["kl_bon_ci95"][1] - row["kl_bon_ci95"][0]) / 2 for row in rows]
    assert np.mean(halves) == pytest.approx(
        1.96 * np.std([row["kl_bon"] for row in rows]), rel=0.15
    )


def test_best_of_n_loses_nothing():
    row = Policy(float(N), 0.0).measured(np.random.default_rng(1), 512, 32, 160)
    for name in ("kl_bon", "kl_excess", "kl_lost"):
        low, high = row[f"{name}_ci95"]
        assert low - 0.01 < 0 < high + 0.01 and high - low < 0.1, name
    for part in row["kl_lost_by_quantile"]:
        assert part["policy"] == pytest.approx(part["bon"], abs=0.02)
        assert part["lost"] == pytest.approx(0, abs=0.03)


def test_the_parts_add_up(rng):
    row = NEAR.measured(rng, 20, 4, 32)
    assert row["kl_bon"] == pytest.approx(row["kl_excess"] + row["kl_lost"], abs=1e-12)
    parts = row["kl_lost_by_quantile"]
    assert row["kl_lost"] == pytest.approx(sum(x["lost"] for x in parts), abs=1e-12)
    assert [(x["from"], x["to"]) for x in parts] == [(0, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 1)]
    for of in ("policy", "bon"):
        assert sum(x[of] for x in parts) == pytest.approx(1)


def test_where_the_log_ratio_is_lost():
    """Of the 2% that are anywhere, half lie below the median and lose most of it."""
    row = NEAR.measured(np.random.default_rng(2), 512, 64, 128)
    for part in row["kl_lost_by_quantile"]:
        low, high = part["from"], part["to"]
        share = quad(NEAR.density, low, high)[0]
        assert part["policy"] == pytest.approx(share, abs=0.01)
        assert part["bon"] == pytest.approx(high**N - low**N)

        def lost(f):
            return (N * f ** (N - 1) - NEAR.density(f)) * np.log(N * f ** (N - 1)) if f else 0.0

        want = quad(lost, low, high)[0]
        half = (part["lost_ci95"][1] - part["lost_ci95"][0]) / 2
        assert part["lost"] == pytest.approx(want, abs=2.5 * half + 0.003)


def test_noise_is_taken_out_of_a_sum_and_of_its_parts_alike(rng):
    noise = rng.normal(size=(50, 8))
    parts = rng.normal(size=(50, 8, 3)) + noise[..., None] * np.array([2.0, -1.0, 0.0])
    whole = parts.sum(axis=2)
    got = kl_parts.without_noise(whole, noise)
    np.testing.assert_allclose(kl_parts.without_noise(parts, noise).sum(axis=2), got, atol=1e-12)
    assert got.std() < whole.std()
    assert abs(np.mean(got * noise) - got.mean() * noise.mean()) < 0.05
    assert kl_parts.without_noise(whole, 0 * noise) is whole


def test_the_control_variate_narrows_the_interval():
    """The plain mean of KL(policy || ref) - log ratio has the noise of the log ratio in it."""
    rng = np.random.default_rng(3)
    f = rng.random((256, 16)) ** (1 / 7)
    exact = np.log(7) - 6 / 7
    ratio = np.log(N) + (N - 1) * np.log(f)
    kl, kl_k1 = np.full(f.shape, exact), np.log(7) + 6 * np.log(f)
    bon = quantiles.best_of_n(rng.random((256, 64)), N, kl_parts.EDGES)
    row = kl_parts.parts(kl, kl_k1, ratio, (f * 0.99, f * 0.99 + 0.01), bon)
    plain = compare.over_prompts(kl - ratio)
    assert row["kl_bon_ci95"][1] - row["kl_bon_ci95"][0] < 0.3 * (plain.high - plain.low)
    assert row["kl_bon"] == pytest.approx(exact - np.log(N) + (N - 1) / 7, abs=0.003)
