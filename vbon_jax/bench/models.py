"""The models that are measured: random weights of a known architecture, or a checkpoint's."""

import os
from typing import Any

import jax

from vbon_jax.errors import InputError
from vbon_jax.models import decoder, lm
from vbon_jax.models.config import DecoderConfig, Rotary
from vbon_jax.models.lm import LanguageModel

GPT2_SMALL = DecoderConfig(
    vocab_size=50_257, positions=1_024, layers=12, width=768, heads=12, mlp_width=3_072
)


SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152, positions=8_192, layers=30, width=576, heads=9, kv_heads=3, head_width=64,
    mlp_width=1_536, norm="rms", norm_eps=1e-5, rotary=Rotary(theta=1e5), activation="silu",
    gated=True, qkv_bias=False, out_bias=False, mlp_bias=False,
)  # fmt: skip


def pythia(layers: int, width: int, heads: int) -> DecoderConfig:
    """The architecture of a Pythia model (Biderman et al., 2023).

    Args:
      layers: number of blocks.
      width: width of the residual stream.
      heads: number of attention heads.
    """
    return DecoderConfig(
        vocab_size=50_304, positions=2_048, layers=layers, width=width, heads=heads,
        mlp_width=4 * width, place="parallel", rotary=Rotary(fraction=0.25),
        activation="gelu", tied=False, compute_dtype="bfloat16",
    )  # fmt: skip


MODELS = {
    "gpt2": GPT2_SMALL,
    "smollm2-135m": SMOLLM2_135M,
    "pythia-410m": pythia(24, 1_024, 16),
    "pythia-1.4b": pythia(24, 2_048, 16),
}


def block_products(config: DecoderConfig) -> int:
    """Multiplications a token of the products with the weights of one block.

    Args:
      config: of the decoder.
    """
    attention = config.width * config.key_width * (2 * config.heads + 2 * config.key_heads)
    return attention + config.width * config.mlp_width * (3 if config.gated else 2)


def source(name: str) -> dict[str, Any] | None:
    """The config.json that one of ``MODELS`` has on the hub, as far as it is read; None: GPT-2's.

    Args:
      name: a key of ``MODELS``.
    """
    c = MODELS[name]
    if name == "gpt2":
        return None
    sizes = {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.positions,
        "num_hidden_layers": c.layers, "hidden_size": c.width, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width, "tie_word_embeddings": c.tied,
    }  # fmt: skip
    if c.rotary is not None and c.gated:
        return sizes | {
            "model_type": "llama", "num_key_value_heads": c.kv_heads, "rms_norm_eps": c.norm_eps,
            "hidden_act": c.activation, "rope_theta": c.rotary.theta,
        }  # fmt: skip
    return sizes | {
        "model_type": "gpt_neox", "hidden_act": c.activation, "rotary_pct": 0.25,
        "layer_norm_eps": c.norm_eps,
    }  # fmt: skip


def load(name: str) -> LanguageModel:
    """Opens the model that is measured.

    Args:
      name: one of ``MODELS``, with random weights and no tokenizer; or a Hugging Face directory, or
        a model's name on the hub, "owner/name".

    Raises:
      InputError: if it is none of them.
    """
    if name in MODELS:
        config = MODELS[name]
        params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
        # Nothing here is text, so there is no tokenizer.
        return LanguageModel(config, params, tokenizer=None, source=source(name))
    if "/" not in name and not os.path.isdir(name):
        raise InputError(
            f"--model={name}: name one of {', '.join(MODELS)}, a directory, or owner/name on the "
            "hub"
        )
    return lm.load(name)
