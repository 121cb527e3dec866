"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.families import llama
from vbon_jax.models.hf.family import rotary


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``Qwen2Config``."""
    return DecoderConfig(
        **llama.fields(hf) | {"qkv_bias": True} | llama.window(hf),
        rotary=rotary(hf.rope_parameters),
        activation=hf.hidden_act,
    )


FAMILY = llama.FAMILY._replace(
    config=config, causal="Qwen2ForCausalLM", sequence="Qwen2ForSequenceClassification"
)
