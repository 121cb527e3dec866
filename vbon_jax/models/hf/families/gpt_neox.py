"""GPT-NeoX, the family of Pythia (Black et al., 2022; Biderman et al., 2023)."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.family import Family, Tensor, rotary
from vbon_jax.models.hf.layouts import AS_IS, FLAT_HEAD_QKV, LINEAR, LINEAR_HEAD_QKV, LINEAR_HEADS

_QKV = tuple(f"blocks/attention/{name}" for name in "qkv")


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``GPTNeoXConfig``."""
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        positions=hf.max_position_embeddings,
        layers=hf.num_hidden_layers,
        width=hf.hidden_size,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        place="parallel" if hf.use_parallel_residual else "pre",
        rotary=rotary(hf.rope_parameters),
        activation=hf.hidden_act,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        tied=hf.tie_word_embeddings,
        initializer_range=hf.initializer_range,
    )


def tensors(config: DecoderConfig) -> list[Tensor]:
    """Returns the table of the model without its head."""
    layer = "layers.{i}."
    rows = [
        Tensor("embed_in.weight", ("wte",), AS_IS),
        Tensor(
            layer + "attention.query_key_value.weight",
            tuple(f"{p}/kernel" for p in _QKV),
            LINEAR_HEAD_QKV,
        ),
        Tensor(layer + "attention.dense.weight", ("blocks/attention/out/kernel",), LINEAR_HEADS),
        Tensor(layer + "mlp.dense_h_to_4h.weight", ("blocks/mlp/up/kernel",), LINEAR),
        Tensor(layer + "mlp.dense_h_to_4h.bias", ("blocks/mlp/up/bias",), AS_IS),
        Tensor(layer + "mlp.dense_4h_to_h.weight", ("blocks/mlp/down/kernel",), LINEAR),
        Tensor(layer + "mlp.dense_4h_to_h.bias", ("blocks/mlp/down/bias",), AS_IS),
    ]
    for name, path in (
        (layer + "input_layernorm", "blocks/ln_1"),
        (layer + "post_attention_layernorm", "blocks/ln_2"),
        ("final_layer_norm", "ln_f"),
    ):
        rows += [
            Tensor(f"{name}.weight", (f"{path}/scale",), AS_IS),
            Tensor(f"{name}.bias", (f"{path}/bias",), AS_IS),
        ]
    if config.qkv_bias:
        biases = tuple(f"{p}/bias" for p in _QKV)
        rows += [
            Tensor(layer + "attention.query_key_value.bias", biases, FLAT_HEAD_QKV),
            Tensor(layer + "attention.dense.bias", ("blocks/attention/out/bias",), AS_IS),
        ]
    return rows


FAMILY = Family(
    config=config,
    tensors=tensors,
    prefix="gpt_neox.",
    head="embed_out.weight",
    classifier=(Tensor("score.weight", ("score/kernel",), LINEAR),),
    buffers=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    causal="GPTNeoXForCausalLM",
    sequence="GPTNeoXForSequenceClassification",
)
