"""Families of checkpoints: one module per ``model_type``, of that name, with a ``FAMILY``."""

from __future__ import annotations

import importlib
import pkgutil

from vbon_jax.models.hf.family import Family

MODEL_TYPES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def family(model_type: str) -> Family:
    """Returns the family of a ``model_type``.

    Args:
      model_type: as in config.json.

    Raises:
      ValueError: if it is not supported; the message lists those that are.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}: supported are {', '.join(MODEL_TYPES)}")
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
