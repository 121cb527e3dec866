"""Checks of concrete arguments; under tracing values are unknown and nothing is checked."""

from typing import Any

import jax
import numpy as np


def is_readable(x: Any) -> bool:
    """Whether this process can read the values of `x`: no tracer, nothing on other hosts."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _first(bad: np.ndarray, values: np.ndarray) -> Any:
    return values[bad].reshape(-1)[0].item()


def check_n(n: Any) -> None:
    """Raises ValueError unless every concrete value of `n` is finite and at least 1."""
    if n is None:
        raise ValueError("n must be a number >= 1, got None")
    if not is_readable(n):
        return
    values = np.asarray(n)
    bad = ~(np.isfinite(values) & (values >= 1))
    if bad.any():
        raise ValueError(
            "n must be finite and >= 1 (the N of best-of-N, any real number), "
            f"got n={_first(bad, values)}"
        )


def check_m(m: Any) -> None:
    """Raises ValueError unless every concrete value of `m` is at least 1."""
    if not is_readable(m):
        return
    values = np.asarray(m)
    bad = ~(values >= 1)
    if bad.any():
        raise ValueError(
            "m must be >= 1 (the number of reference rewards of a prompt), "
            f"got m={_first(bad, values)}"
        )


def check_beta(beta: Any) -> None:
    """Raises ValueError unless every concrete value of `beta` is finite and not negative."""
    if not is_readable(beta):
        return
    values = np.asarray(beta)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise ValueError(
            "beta must be finite and >= 0 (the weight of the KL penalty), "
            f"got beta={_first(bad, values)}"
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {name}={value!r}")
