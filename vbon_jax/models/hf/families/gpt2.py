"""GPT-2 (Radford et al., 2019)."""

from typing import Any

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf.family import Family, Tensor, only
from vbon_jax.models.hf.layouts import AS_IS, CONV1D, CONV1D_HEADS, CONV1D_QKV, FLAT_QKV, LINEAR

_QKV = tuple(f"blocks/attention/{name}" for name in "qkv")


def config(hf: Any) -> DecoderConfig:
    """Reads our configuration from transformers' ``GPT2Config``."""
    only(
        hf,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        positions=hf.n_positions,
        layers=hf.n_layer,
        width=hf.n_embd,
        heads=hf.n_head,
        mlp_width=4 * hf.n_embd if hf.n_inner is None else hf.n_inner,
        norm_eps=hf.layer_norm_epsilon,
        activation=hf.activation_function,
        initializer_range=hf.initializer_range,
    )


def tensors(config: DecoderConfig) -> list[Tensor]:
    """Returns the table of the model without its head."""
    del config  # one table for all sizes
    return [
        Tensor("wte.weight", ("wte",), AS_IS),
        Tensor("wpe.weight", ("wpe",), AS_IS),
        Tensor("h.{i}.ln_1.weight", ("blocks/ln_1/scale",), AS_IS),
        Tensor("h.{i}.ln_1.bias", ("blocks/ln_1/bias",), AS_IS),
        Tensor("h.{i}.attn.c_attn.weight", tuple(f"{p}/kernel" for p in _QKV), CONV1D_QKV),
        Tensor("h.{i}.attn.c_attn.bias", tuple(f"{p}/bias" for p in _QKV), FLAT_QKV),
        Tensor("h.{i}.attn.c_proj.weight", ("blocks/attention/out/kernel",), CONV1D_HEADS),
        Tensor("h.{i}.attn.c_proj.bias", ("blocks/attention/out/bias",), AS_IS),
        Tensor("h.{i}.ln_2.weight", ("blocks/ln_2/scale",), AS_IS),
        Tensor("h.{i}.ln_2.bias", ("blocks/ln_2/bias",), AS_IS),
        Tensor("h.{i}.mlp.c_fc.weight", ("blocks/mlp/up/kernel",), CONV1D),
        Tensor("h.{i}.mlp.c_fc.bias", ("blocks/mlp/up/bias",), AS_IS),
        Tensor("h.{i}.mlp.c_proj.weight", ("blocks/mlp/down/kernel",), CONV1D),
        Tensor("h.{i}.mlp.c_proj.bias", ("blocks/mlp/down/bias",), AS_IS),
        Tensor("ln_f.weight", ("ln_f/scale",), AS_IS),
        Tensor("ln_f.bias", ("ln_f/bias",), AS_IS),
    ]


FAMILY = Family(
    config=config,
    tensors=tensors,
    prefix="transformer.",  # absent from OpenAI's own file
    head="lm_head.weight",
    classifier=(Tensor("score.weight", ("score/kernel",), LINEAR),),
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",  # causal masks that old files carry along
    causal="GPT2LMHeadModel",
    sequence="GPT2ForSequenceClassification",
)
