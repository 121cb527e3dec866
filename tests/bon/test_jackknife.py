import re

import numpy as np
import pytest
from scipy.stats import betabinom, binom

from vbon_jax.bon import jackknife, log_f


def twin(references, reward, n):
    """The jackknife as it is defined: the estimate, and it again without each reference."""

    def estimate(kept):
        below, equal = np.sum(kept < reward), np.sum(kept == reward)
        return float(log_f.log_ratio_interval(below, equal, len(kept), n))

    m = len(references)
    without = [estimate(np.delete(references, i)) for i in range(m)]
    return m * estimate(references) - (m - 1) * np.mean(without)


@pytest.mark.parametrize("n", [1, 2.5, 8])
def test_it_leaves_out_one_reference_at_a_time(rng, n):
    references = rng.integers(0, 6, size=12).astype(float)
    rewards = np.array([-1, 0, 2, 2.5, 5, 6])
    below = (references[:, None] < rewards).sum(axis=0)
    equal = (references[:, None] == rewards).sum(axis=0)
    got = jackknife.log_ratio(below, equal, 12, n)
    np.testing.assert_allclose(got, [twin(references, r, n) for r in rewards], atol=2e-4)


def test_all_ranks_are_finite():
    below, equal = np.indices((41, 41))
    fits = below + equal <= 40
    with np.errstate(all="raise"):
        got = jackknife.log_ratio(below[fits], equal[fits], 40, 8)
    assert np.isfinite(got).all()


MIXTURES = {  # weight and a of densities a F^(a - 1)
    "best-of-8 itself": [(1, 8)],
    "98% of it, 2% the reference": [(0.98, 8), (0.02, 1)],
    "the reference": [(1, 1)],
}


def bias(mixture, m, estimate_K, n=8):
    """Of KL(policy || bon): k of a response with density a F^(a - 1) is beta-binomial."""
    k = np.arange(m + 1)
    return sum(
        w * (np.log(n) - (n - 1) / a - betabinom(m, a, 1).pmf(k) @ estimate_K) for w, a in mixture
    )


def test_the_table_of_the_docstring_is_what_summing_over_ranks_gives():
    rows = re.findall(r"^\| (.*?) *\| (\d+) +\|(.*)\|$", jackknife.__doc__, re.MULTILINE)
    assert len(rows) == 9
    for i, (name, m, cells) in enumerate(rows):
        name, m = name or rows[i - i % 3][0], int(m)
        k = np.arange(m + 1)
        estimates = [
            log_f.log_ratio_interval(k, 0 * k, m, 8),
            np.log(8) + 7 * np.asarray(log_f.log_f(k, m, "smoothed"), float),
            np.log(8) + 7 * np.asarray(log_f.log_f(k, m, "harmonic"), float),
            jackknife.log_ratio(k, 0 * k, m, 8),
        ]
        for cell, estimate in zip(cells.split("|"), estimates, strict=True):
            digits = len(cell.split(".")[1].strip())
            found = bias(MIXTURES[name], m, np.asarray(estimate, float))
            assert float(cell) == pytest.approx(found, abs=0.6 * 10**-digits), (name, m)


def test_no_bias_to_speak_of_with_ties():
    """A verifier that passes 0.3 of the responses, n = 8: by summing over how many of m pass."""
    n, m, right = 8, 100, 0.3
    won = 1 - (1 - right) ** n
    passed = np.arange(m + 1)
    weight = binom(m, right).pmf(passed)
    of_pass = weight @ jackknife.log_ratio(m - passed, passed, m, n)
    of_fail = weight @ jackknife.log_ratio(0 * passed, m - passed, m, n)
    assert of_pass == pytest.approx(np.log(won / right), abs=3e-4)
    assert of_fail == pytest.approx(np.log((1 - won) / (1 - right)), abs=3e-4)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="m must be at least 2"):
        jackknife.log_ratio(0, 0, 1, 8)
    with pytest.raises(ValueError, match="n must be finite"):
        jackknife.log_ratio(0, 0, 5, 0.5)
