"""Families of checkpoints: one module a ``model_type``, of that name, each with a ``FAMILY``."""

from __future__ import annotations

import importlib
import pkgutil

from vbon_jax.models.hf.family import Family

MODEL_TYPES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def family(model_type: str) -> Family:
    """The family of a config.json's ``model_type``.

    Raises:
      ValueError: if there is none, naming those there are.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}: supported are {', '.join(MODEL_TYPES)}")
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
