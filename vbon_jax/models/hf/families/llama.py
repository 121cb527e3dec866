"""Llama 2 and 3 (Grattafiori et al., 2024), whose tensor names its descendants keep."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.family import Family, Tensor, rotary
from vbon_jax.models.hf.layouts import AS_IS, FLAT, LINEAR, LINEAR_HEADS


def fields(hf: Any) -> dict[str, Any]:
    """Reads the fields that configs of Llama and its descendants have in common."""
    return {
        "vocab_size": hf.vocab_size,
        "positions": hf.max_position_embeddings,
        "layers": hf.num_hidden_layers,
        "width": hf.hidden_size,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_width": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "mlp_width": hf.intermediate_size,
        "norm": "rms",
        "norm_eps": hf.rms_norm_eps,
        "gated": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied": hf.tie_word_embeddings,
        "initializer_range": hf.initializer_range,
    }


def window(hf: Any) -> dict[str, Any]:
    """Reads the sliding window, and from ``layer_types`` which layers have it."""
    windowed = tuple(kind == "sliding_attention" for kind in hf.layer_types)
    if not any(windowed):
        return {}
    return {"window": hf.sliding_window, "windowed": windowed}


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``LlamaConfig``."""
    biases = {"qkv_bias": hf.attention_bias, "out_bias": hf.attention_bias}
    return DecoderConfig(
        **fields(hf) | biases | {"mlp_bias": hf.mlp_bias},
        rotary=rotary(hf.rope_parameters),
        activation=hf.hidden_act,
    )


def tensors(config: DecoderConfig) -> list[Tensor]:
    """Returns the table of the model without its head."""
    attention, mlp = "layers.{i}.self_attn.", "layers.{i}.mlp."
    norms = {
        "norm.weight": "ln_f",
        "layers.{i}.input_layernorm.weight": "blocks/ln_1",
        "layers.{i}.post_attention_layernorm.weight": "blocks/ln_2",
    }
    if config.place == "sandwich":
        norms |= {
            "layers.{i}.post_attention_layernorm.weight": "blocks/post_attention",
            "layers.{i}.pre_feedforward_layernorm.weight": "blocks/ln_2",
            "layers.{i}.post_feedforward_layernorm.weight": "blocks/post_mlp",
        }
    if config.qk_norm:
        norms |= {f"{attention}{x}_norm.weight": f"blocks/attention/{x}_norm" for x in "qk"}
    rows = [Tensor("embed_tokens.weight", ("wte",), AS_IS)]
    rows += [Tensor(name, (f"{path}/scale",), AS_IS) for name, path in norms.items()]
    for x in "qkv":
        rows.append(
            Tensor(f"{attention}{x}_proj.weight", (f"blocks/attention/{x}/kernel",), LINEAR)
        )
        if config.qkv_bias:
            rows.append(Tensor(f"{attention}{x}_proj.bias", (f"blocks/attention/{x}/bias",), FLAT))
    rows.append(Tensor(f"{attention}o_proj.weight", ("blocks/attention/out/kernel",), LINEAR_HEADS))
    if config.out_bias:
        rows.append(Tensor(f"{attention}o_proj.bias", ("blocks/attention/out/bias",), AS_IS))
    for x in ("gate", "up", "down"):
        rows.append(Tensor(f"{mlp}{x}_proj.weight", (f"blocks/mlp/{x}/kernel",), LINEAR))
        if config.mlp_bias:
            rows.append(Tensor(f"{mlp}{x}_proj.bias", (f"blocks/mlp/{x}/bias",), AS_IS))
    return rows


FAMILY = Family(
    config=config,
    tensors=tensors,
    prefix="model.",
    head="lm_head.weight",
    classifier=(Tensor("score.weight", ("score/kernel",), LINEAR),),
    buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    causal="LlamaForCausalLM",
    sequence="LlamaForSequenceClassification",
)
