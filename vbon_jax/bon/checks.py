"""Argument checks that are skipped under tracing, where values are not known."""

from typing import Any

import jax
import numpy as np


def is_readable(x: Any) -> bool:
    """Returns whether this process can read the values of ``x``.

    It cannot if ``x`` is a tracer, or a JAX array with shards on other hosts.
    """
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _first(bad: np.ndarray, values: np.ndarray) -> Any:
    return values[bad].reshape(-1)[0].item()


def check_n(n: Any) -> None:
    """Checks that every value of n is finite and at least 1.

    Args:
      n: the N of best-of-N, a number or array of any shape. Traced values are not checked.

    Raises:
      ValueError: if n is None, or one of its values is below 1, NaN or infinite.
    """
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
    """Checks that every value of m is at least 1.

    Args:
      m: the number of reference rewards of a prompt, a number or array of any shape. Traced values
        are not checked.

    Raises:
      ValueError: if a value is below 1 or NaN.
    """
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
    """Checks that every value of beta is finite and not negative.

    Args:
      beta: the weight of the KL penalty, a number or array of any shape. Traced values are not
        checked.

    Raises:
      ValueError: if a value is negative, NaN or infinite.
    """
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
    """Checks that a setting has one of its allowed values.

    Args:
      name: name of the setting, for the message.
      value: its value.
      allowed: all values it may have.

    Raises:
      ValueError: if ``value`` is not among ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {name}={value!r}")
