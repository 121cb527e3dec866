"""Hugging Face directories: reading and writing models, adapters, and the hub."""

from vbon_jax.models.hf.checkpoint import (
    load_classifier,
    load_decoder,
    save_classifier,
    save_decoder,
)
from vbon_jax.models.hf.config_files import read_config
from vbon_jax.models.hf.tensor_files import CheckpointError

__all__ = [
    "CheckpointError",
    "load_classifier",
    "load_decoder",
    "read_config",
    "save_classifier",
    "save_decoder",
]
