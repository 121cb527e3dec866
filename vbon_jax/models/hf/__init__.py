"""Hugging Face directories: reading and writing of models and adapters, and the hub."""

from vbon_jax.models.hf.config_files import Labels, TokenIds, read_config
from vbon_jax.models.hf.reading import load_classifier, load_decoder
from vbon_jax.models.hf.tensor_files import CheckpointError
from vbon_jax.models.hf.writing import save_classifier, save_decoder

__all__ = [
    "CheckpointError",
    "Labels",
    "TokenIds",
    "load_classifier",
    "load_decoder",
    "read_config",
    "save_classifier",
    "save_decoder",
]
