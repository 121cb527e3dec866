"""Gemma 2 (Gemma Team, 2024): sandwich norms, soft caps, and a window in every other layer."""

import math
from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.families import llama
from vbon_jax.models.hf.family import only, rotary


def fields(hf: Any) -> dict[str, Any]:
    """Reads the fields that configs of Gemma 2 and 3 have in common."""
    only(hf, use_bidirectional_attention=(None, False))
    return {
        **llama.fields(hf),
        **llama.window(hf),
        "qkv_bias": hf.attention_bias,
        "out_bias": hf.attention_bias,
        "activation": hf.hidden_activation,
        "norm_offset": True,
        "place": "sandwich",
        "embed_scale": math.sqrt(hf.hidden_size),
        "query_scale": hf.query_pre_attn_scalar**-0.5,
        "attention_cap": hf.attn_logit_softcapping,
        "logit_cap": hf.final_logit_softcapping,
    }


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``Gemma2Config``."""
    return DecoderConfig(**fields(hf), rotary=rotary(hf.rope_parameters))


FAMILY = llama.FAMILY._replace(
    config=config, causal="Gemma2ForCausalLM", sequence="Gemma2ForSequenceClassification"
)
