"""Gemma 3, text only (Gemma Team, 2025): norms of queries and keys, two rotary bases."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.families import gemma2, llama
from vbon_jax.models.hf.family import rotary


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``Gemma3TextConfig``."""
    return DecoderConfig(
        **gemma2.fields(hf),
        rotary=rotary(hf.rope_parameters["full_attention"]),
        rotary_window=rotary(hf.rope_parameters["sliding_attention"]),
        qk_norm=True,
    )


FAMILY = llama.FAMILY._replace(
    config=config, causal="Gemma3ForCausalLM", sequence="Gemma3TextForSequenceClassification"
)
