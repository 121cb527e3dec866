"""The mathematics of best-of-N: pure functions of arrays."""

from vbon_jax.bon import (
    amortised,
    distribution,
    enumeration,
    exponential,
    jackknife,
    ks,
    log_f,
    pool,
    quantiles,
    references,
    targets,
    theory,
)

__all__ = [
    "amortised",
    "distribution",
    "enumeration",
    "exponential",
    "jackknife",
    "ks",
    "log_f",
    "pool",
    "quantiles",
    "references",
    "targets",
    "theory",
]
