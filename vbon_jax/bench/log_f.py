"""Seconds of the log F preprocessing, against loops over prompts, measured in one process.

The loops do what the paper's code does, a prompt and a look-up at a time, in NumPy and SciPy. Both
sides get the same numbers and must give the same results, or AssertionError is raised.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.bench.machine import Row
from vbon_jax.bon import ks
from vbon_jax.bon import log_f as lf

_REPEATS = 5


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median wall time over repeats, and the result; called once before, untimed, to compile."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {name}={size}")


def log_f_times(
    prompts: int = 5000, m: int = 600, lookups: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Times building the tables of log F and looking rewards up in them, `smoothed` estimator.

    Tables: from rewards as a JSON file gives them, lists of floats, the loop sorts each prompt's
    list and takes the logarithm of its CDF, into a dictionary by prompt; vbon_jax makes one float32
    matrix with sorted rows, on the device. "from a matrix" starts vbon_jax from the matrix, which
    is what it has where samples were just scored; the loop is the same. Look-ups: the loop searches
    one table at a time; vbon_jax calls `reference_ranks` and `log_f` once, their checks of the
    values included.

    Args:
      prompts: number of prompts.
      m: reference rewards per prompt.
      lookups: number of rewards to look up, a multiple of ``prompts``: equally many per prompt, in
        shuffled order.
      seed: seed of the random rewards.

    Returns:
      {what: {"loop_s": seconds, "ours_s": seconds, "ratio": loop_s / ours_s}}, medians.

    Raises:
      ValueError: if a size is below 1, or ``lookups`` is not a multiple of ``prompts``.
      AssertionError: if the results of the two sides differ.
    """
    _check_sizes(prompts=prompts, m=m, lookups=lookups)
    if lookups % prompts:
        raise ValueError(
            f"lookups must be a multiple of prompts, got lookups={lookups}, prompts={prompts}"
        )
    rng = np.random.default_rng(seed)
    rewards_PxM = rng.normal(size=(prompts, m)).astype(np.float32)
    rewards_PxB = rng.normal(size=(prompts, lookups // prompts)).astype(np.float32)
    names = [f"prompt {i}" for i in range(prompts)]
    queries = [(names[i], j, float(r)) for (i, j), r in np.ndenumerate(rewards_PxB)]
    rng.shuffle(queries)
    of_tables, tables, sorted_PxM = _table_times(names, rewards_PxM)

    def look_up_loop() -> list[float]:
        found = []
        for name, _, reward in queries:
            sorted_rewards, log_cdf = tables[name]
            found.append(log_cdf[np.searchsorted(sorted_rewards, reward)])
        return found

    def look_up_ours() -> jax.Array:
        below_PxB, _ = lf.reference_ranks(sorted_PxM, rewards_PxB)
        return lf.log_f(below_PxB, m, "smoothed")

    loop_s, found = _seconds(look_up_loop)
    ours_s, log_f_PxB = _seconds(look_up_ours)
    row = {name: i for i, name in enumerate(names)}
    ours = np.asarray(log_f_PxB)[[row[name] for name, _, _ in queries], [j for _, j, _ in queries]]
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-6)
    return of_tables | {f"{lookups} look-ups of log F": _row(loop_s, ours_s)}


def _table_times(
    names: Sequence[str], rewards_PxM: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[np.ndarray, np.ndarray]], jax.Array]:
    """Times building the tables; also the tables of the loop, by prompt, and of vbon_jax."""
    lists = rewards_PxM.tolist()

    def build_loop() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        tables = {}
        for name, rewards in zip(names, lists, strict=True):
            cdf = np.cumsum(np.ones(len(rewards) + 1)) / (len(rewards) + 1)
            tables[name] = np.sort(np.array(rewards)), np.log(cdf)
        return tables

    def build_ours(rewards: Any) -> jax.Array:
        return jnp.asarray(np.sort(np.asarray(rewards, np.float32), axis=1))

    loop_s, tables = _seconds(build_loop)
    lists_s, sorted_PxM = _seconds(lambda: build_ours(lists))
    matrix_s, again_PxM = _seconds(lambda: build_ours(rewards_PxM))
    np.testing.assert_array_equal(np.stack([tables[name][0] for name in names]), sorted_PxM)
    np.testing.assert_array_equal(sorted_PxM, again_PxM)
    what = "log F tables, {} x {}".format(*rewards_PxM.shape)
    times = {
        f"{what}, from lists": _row(loop_s, lists_s),
        f"{what}, from a matrix": _row(loop_s, matrix_s),
    }
    return times, tables, sorted_PxM


def ks_times(
    prompts: int = 5000, m: int = 250, m_full: int = 600, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Times two-sample Kolmogorov-Smirnov tests of all prompts, against a loop of SciPy's.

    Args:
      prompts: number of prompts.
      m: rewards per prompt in the smaller sample.
      m_full: rewards per prompt in the larger sample.
      seed: seed of the random rewards, all from one distribution.

    Returns:
      {what: {"loop_s": seconds, "ours_s": seconds, "ratio": loop_s / ours_s}}, medians.

    Raises:
      ValueError: if a size is below 1.
      AssertionError: if a statistic or p-value differs from SciPy's.
    """
    from scipy import stats

    _check_sizes(prompts=prompts, m=m, m_full=m_full)
    rng = np.random.default_rng(seed)
    a_PxM, b_PxK = rng.normal(size=(prompts, m)), rng.normal(size=(prompts, m_full))

    def loop() -> list[Any]:
        return [stats.ks_2samp(a, b) for a, b in zip(a_PxM, b_PxK, strict=True)]

    loop_s, tests = _seconds(loop)
    ours_s, (statistic_P, p_value_P) = _seconds(lambda: ks.ks_test(a_PxM, b_PxK))
    np.testing.assert_allclose(statistic_P, [test.statistic for test in tests], atol=1e-6)
    np.testing.assert_allclose(p_value_P, [test.pvalue for test in tests], rtol=1e-6)
    return {f"{prompts} KS tests, {m} against {m_full}": _row(loop_s, ours_s)}


def _row(loop_s: float, ours_s: float) -> dict[str, float]:
    return {"loop_s": loop_s, "ours_s": ours_s, "ratio": loop_s / ours_s}


def rows(results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Makes the lines of the table.

    Args:
      results: what `log_f_times` or `ks_times` returns, or both merged.

    Returns:
      One a result, its ratio being how many times as long the loop takes.
    """
    return [
        Row("log_f", what, row["ours_s"], "s", row["ratio"], "a loop over prompts")
        for what, row in results.items()
    ]
