"""Qwen 3 (Yang et al., 2025): Llama with an RMS norm over the queries and keys of each head."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.families import llama
from vbon_jax.models.hf.family import rotary


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``Qwen3Config``."""
    biases = {"qkv_bias": hf.attention_bias, "out_bias": hf.attention_bias}
    return DecoderConfig(
        **llama.fields(hf) | biases | llama.window(hf),
        rotary=rotary(hf.rope_parameters),
        activation=hf.hidden_act,
        qk_norm=True,
    )


FAMILY = llama.FAMILY._replace(
    config=config, causal="Qwen3ForCausalLM", sequence="Qwen3ForSequenceClassification"
)
