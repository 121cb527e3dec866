"""Times of log F and KS tests at a small size: both sides agree, and every number is shown."""

import numpy as np
import pytest

from vbon_jax.bench import log_f as bench
from vbon_jax.bon import ks
from vbon_jax.bon import log_f as lf


def test_times_are_measured_and_shown():
    results = bench.log_f_times(prompts=6, m=20, lookups=12) | bench.ks_times(6, 10, 16)
    assert list(results) == [
        "log F tables, 6 x 20, from lists",
        "log F tables, 6 x 20, from a matrix",
        "12 look-ups of log F",
        "6 KS tests, 10 against 16",
    ]
    for row in results.values():
        assert row["loop_s"] > 0 and row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["loop_s"] / row["ours_s"])
    shown = {row.what: (row.value, row.ratio) for row in bench.rows(results)}
    assert shown == {what: (row["ours_s"], row["ratio"]) for what, row in results.items()}


def test_a_disagreement_is_an_error(monkeypatch):
    right = lf.log_f
    monkeypatch.setattr(lf, "log_f", lambda k, m, estimator: right(k, m + 1, estimator))
    with pytest.raises(AssertionError):
        bench.log_f_times(prompts=2, m=20, lookups=4)
    monkeypatch.setattr(ks, "ks_test", lambda a, b: (np.zeros(len(a)), np.ones(len(a))))
    with pytest.raises(AssertionError):
        bench.ks_times(2, 10, 16)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="lookups must be a multiple of prompts, got lookups=5"):
        bench.log_f_times(prompts=3, m=4, lookups=5)
    with pytest.raises(ValueError, match="m must be >= 1, got m=0"):
        bench.log_f_times(prompts=3, m=0, lookups=3)
    with pytest.raises(ValueError, match="got prompts=0"):
        bench.ks_times(prompts=0)
