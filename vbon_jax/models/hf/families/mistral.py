"""Mistral (Jiang et al., 2023): Llama with a sliding window."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.families import llama
from vbon_jax.models.hf.family import rotary


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``MistralConfig``."""
    return DecoderConfig(
        **llama.fields(hf),
        rotary=rotary(hf.rope_parameters),
        activation=hf.hidden_act,
        window=hf.sliding_window,
    )


FAMILY = llama.FAMILY._replace(
    config=config, causal="MistralForCausalLM", sequence="MistralForSequenceClassification"
)
