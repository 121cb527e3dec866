"""The training algorithms, one file each. What lists methods reads this tuple."""

from importlib import import_module
from typing import Any

from vbon_jax.methods.base import BEST_OF_N, Method, Options, Series

# The files that hold a ``METHOD``, in the order of tables and legends.
FILES = (
    "vbon",
    "ppo",
    "bond",
    "jbond",
    "dpo",
    "qrpo",
    "bonbon",
    "bon_sft",
)
METHODS: tuple[Method, ...] = tuple(
    import_module(f"vbon_jax.methods.{name}").METHOD for name in FILES
)
NAMES = (BEST_OF_N, *dict.fromkeys(m.name for m in METHODS))  # of `method.name`
SERIES: dict[str, tuple[Method, Series]] = {s.label: (m, s) for m in METHODS for s in m.series}


def of_config(config: Any) -> Method:
    """The method that ``method.name`` and its group's keys name (not best-of-n itself)."""
    return next(m for m in METHODS if m.name == config.method.name and m.when(config))


def of_options(options: Any) -> Method:
    """The method whose options these are: ``of_options(VBoN(n=8))``.

    Raises:
      TypeError: they are no method's.
    """
    for method in METHODS:
        if type(options) is method.options:
            return method
    known = ", ".join(m.options.__name__ for m in METHODS)
    raise TypeError(f"method={options!r}: give the options of a method, one of {known}")


__all__ = [
    "BEST_OF_N", "METHODS", "NAMES", "SERIES", "Method", "Options", "Series", "of_config",
    "of_options",
]  # fmt: skip
