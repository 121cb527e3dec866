"""The machine under a benchmark: its ceilings, its versions, and how times are taken on it."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.progress import reporting

_COMPILED = "/jax/core/compile/backend_compile_duration"
_PACKAGES = ("vbon_jax", "jax", "jaxlib", "transformers", "torch", "vllm")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of `vbon bench`.

    Attributes:
      section: what it belongs to.
      what: was measured.
      value: a median where it is a time or a rate.
      unit: of the value.
      ratio: of the value to another, or the share of a ceiling; None without one.
      against: what the ratio is to; "" without one.
    """

    section: str
    what: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""


def matrix_rate(dtype: str = "float32", size: int = 4_096) -> float:
    """Measures the floating-point operations per second of a square matrix product in JAX.

    Args:
      dtype: of the matrices.
      size: rows and columns.

    Returns:
      The best of 5 repetitions.
    """
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: product(x, x))


def copy_rate(size: int = 2**26) -> float:
    """Measures the bytes per second of memory in JAX: a large float32 array read, and written.

    Args:
      size: numbers in the array; the default's 256 MiB are in no processor's cache.

    Returns:
      The best of 5 repetitions, bytes read and written counted each.
    """
    x = jnp.ones(size, jnp.float32)
    successor = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best(lambda: successor(x))


def _best(call: Callable[[], jax.Array]) -> float:
    """The fewest seconds of 5 calls; called once before, untimed, to compile."""
    call().block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        call().block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def interleaved(
    cases: Mapping[Any, Callable[[], Any]], repeats: int
) -> dict[Any, tuple[float, Any]]:
    """Runs cases in turns, so that what else the machine does slows all of them alike.

    Args:
      cases: what to time; each is called once before, untimed, to compile.
      repeats: rounds.

    Returns:
      For each case its seconds, the median of the rounds, and what its last call returned.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
    results: dict[Any, Any] = {}
    with reporting("bench", (repeats + 1) * len(cases)) as report:
        rounds = itertools.product(range(repeats + 1), cases.items())
        for done, (repeat, (name, call)) in enumerate(rounds, 1):
            began = time.perf_counter()
            results[name] = jax.block_until_ready(call())
            took = time.perf_counter() - began
            if repeat:
                seconds[name].append(took)
            words = name if isinstance(name, str) else ", ".join(name)
            report.update(done, words)
    return {name: (statistics.median(seconds[name]), results[name]) for name in cases}


class CompileClock:
    """Counts the seconds XLA compiles in this process, programs read from a cache left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.seconds += duration_secs


def description() -> dict[str, Any]:
    """The devices and the versions that figures depend on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"devices": [str(device) for device in jax.devices()], "versions": versions}
