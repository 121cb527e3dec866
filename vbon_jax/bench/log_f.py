"""Seconds of the preprocessing mathematics beside per-prompt loops, measured in one process.

The loops do what the paper's code does, a prompt and a look-up at a time, in NumPy and SciPy. Both
sides get the same numbers and must give the same results, or AssertionError is raised.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vbon_jax.bon import ks
from vbon_jax.bon import log_f as lf

_REPEATS = 5


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median wall time over repeats, and the result; once before, untimed, to compile and warm."""
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
    """Times the tables of log F and look-ups in them, with the `smoothed` estimator.

    Tables, from rewards as a JSON file gives them, lists of floats: a loop sorts each prompt's list
    and takes the logarithm of its CDF, into a dictionary by prompt; ours is one float32 matrix with
    sorted rows, on the device. `tables, from a matrix` starts ours from the matrix, as it is where
    samples were just scored; the loop is the same. Look-ups: a loop searches one table at a time;
    ours is one call of `reference_ranks` and `log_f`, its checks of the values included.

    Args:
        prompts: the number of prompts.
        m: reference rewards of each.
        lookups: rewards to look up, a multiple of prompts: equally many of each, shuffled.
        seed: of the random rewards.

    Returns:
        {what: {"loop_s": seconds, "ours_s": seconds, "ratio": loop_s / ours_s}}, medians.

    Raises:
        ValueError: a size below 1, or lookups that are not a multiple of prompts.
        AssertionError: the two sides disagree.
    """
    _check_sizes(prompts=prompts, m=m, lookups=lookups)
    if lookups % prompts:
        raise ValueError(
            f"lookups must be a multiple of prompts, got lookups={lookups}, prompts={prompts}"
        )
    rng = np.random.default_rng(seed)
    rewards_PxM = rng.normal(size=(prompts, m)).astype(np.float32)
    rewards_PxB = rng.normal(size=(prompts, lookups // prompts)).astype(np.float32)
    lists = rewards_PxM.tolist()
    names = [f"prompt {i}" for i in range(prompts)]
    queries = [(names[i], j, float(r)) for (i, j), r in np.ndenumerate(rewards_PxB)]
    rng.shuffle(queries)

    def tables_loop() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        tables = {}
        for name, rewards in zip(names, lists, strict=True):
            cdf = np.cumsum(np.ones(len(rewards) + 1)) / (len(rewards) + 1)
            tables[name] = np.sort(np.array(rewards)), np.log(cdf)
        return tables

    def tables_ours(rewards: Any) -> jax.Array:
        return jnp.asarray(np.sort(np.asarray(rewards, np.float32), axis=1))

    loop_s, tables = _seconds(tables_loop)
    lists_s, sorted_PxM = _seconds(lambda: tables_ours(lists))
    matrix_s, again_PxM = _seconds(lambda: tables_ours(rewards_PxM))
    np.testing.assert_array_equal(np.stack([tables[name][0] for name in names]), sorted_PxM)
    np.testing.assert_array_equal(sorted_PxM, again_PxM)

    def lookups_loop() -> list[float]:
        found = []
        for name, _, reward in queries:
            sorted_rewards, log_cdf = tables[name]
            found.append(log_cdf[np.searchsorted(sorted_rewards, reward)])
        return found

    def lookups_ours() -> jax.Array:
        below_PxB, _ = lf.reference_ranks(sorted_PxM, rewards_PxB)
        return lf.log_f(below_PxB, m, "smoothed")

    lookups_loop_s, found = _seconds(lookups_loop)
    lookups_ours_s, log_f_PxB = _seconds(lookups_ours)
    row = {name: i for i, name in enumerate(names)}
    ours = np.asarray(log_f_PxB)[[row[name] for name, _, _ in queries], [j for _, j, _ in queries]]
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-6)
    return {
        f"log F tables, {prompts} x {m}, from lists": _row(loop_s, lists_s),
        f"log F tables, {prompts} x {m}, from a matrix": _row(loop_s, matrix_s),
        f"{lookups} look-ups of log F": _row(lookups_loop_s, lookups_ours_s),
    }


def ks_times(
    prompts: int = 5000, m: int = 250, m_full: int = 600, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Times two-sample Kolmogorov-Smirnov tests of all prompts beside a loop of SciPy's.

    Args:
        prompts: the number of prompts.
        m: rewards of each in the smaller sample.
        m_full: rewards of each in the larger one.
        seed: of the random rewards, all from one distribution.

    Returns:
        As `log_f_times`.

    Raises:
        ValueError: a size below 1.
        AssertionError: a statistic or p-value differs from SciPy's.
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


def table(results: dict[str, dict[str, float]]) -> Table:
    """The results of `log_f_times`, `ks_times` or both (merged) as a table for the screen."""
    shown = Table("what", title="median seconds, one process")
    for column in ("loop", "vbon_jax", "ratio"):
        shown.add_column(column, justify="right")
    for what, row in results.items():
        shown.add_row(what, f"{row['loop_s']:.4f}", f"{row['ours_s']:.4f}", f"{row['ratio']:.1f}x")
    return shown


def main() -> None:
    """Prints the tables at full size: 5,000 prompts, 600 samples, 10,000 look-ups; 8 policies."""
    from rich.console import Console

    from vbon_jax.bench import population as bench_population

    console = Console()
    console.print(table(log_f_times() | ks_times()))
    console.print(population_table(bench_population.population_times()))


def population_table(times: dict[str, float]) -> Table:
    """The result of ``bench_population.population_times``, for the screen."""
    shown = Table(title="A population of 8 policies beside 8 single runs", title_justify="left")
    shown.add_column("quantity")
    shown.add_column("value", justify="right")
    for name, value in times.items():
        shown.add_row(name, f"{value:.3g}")
    return shown
