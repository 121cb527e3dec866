"""The mathematics of best-of-N: pure functions of arrays."""

from vbon_jax.bon import (
    distribution,
    enumeration,
    exponential,
    ks,
    log_f,
    pool,
    references,
    targets,
    theory,
)

__all__ = [
    "distribution",
    "enumeration",
    "exponential",
    "ks",
    "log_f",
    "pool",
    "references",
    "targets",
    "theory",
]
