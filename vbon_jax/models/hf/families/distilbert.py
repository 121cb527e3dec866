"""DistilBERT (Sanh et al., 2019): BERT's block under other names, without token types."""

from typing import Any

from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf.families import bert
from vbon_jax.models.hf.family import Family, Tensor
from vbon_jax.models.hf.layouts import AS_IS


def config(hf: Any) -> EncoderConfig:
    # sinusoidal_pos_embds only says how the position embedding was initialised: it is in the file.
    """Reads our configuration from transformers' ``DistilBertConfig``."""
    return EncoderConfig(
        vocab_size=hf.vocab_size,
        positions=hf.max_position_embeddings,
        layers=hf.n_layers,
        width=hf.dim,
        heads=hf.n_heads,
        mlp_width=hf.hidden_dim,
        head="distilbert",
        norm_eps=1e-12,  # fixed in transformers' code
        activation=hf.activation,
        initializer_range=hf.initializer_range,
    )


def tensors(config: EncoderConfig) -> list[Tensor]:
    """Returns the table of the model without its head."""
    del config  # one table for all sizes
    layer = "transformer.layer.{i}."
    return [
        Tensor("embeddings.word_embeddings.weight", ("wte",), AS_IS),
        Tensor("embeddings.position_embeddings.weight", ("wpe",), AS_IS),
        *bert.norm("embeddings.LayerNorm", "ln_embed"),
        *bert.attention({x: f"{layer}attention.{x}_lin" for x in ("q", "k", "v", "out")}),
        *bert.norm(layer + "sa_layer_norm", "blocks/ln_1"),
        *bert.linear(layer + "ffn.lin1", "blocks/mlp/up"),
        *bert.linear(layer + "ffn.lin2", "blocks/mlp/down"),
        *bert.norm(layer + "output_layer_norm", "blocks/ln_2"),
    ]


FAMILY = Family(
    config=config,
    tensors=tensors,
    prefix="distilbert.",
    head="",
    classifier=(
        *bert.linear("pre_classifier", "score/dense"),
        *bert.linear("classifier", "score/out"),
    ),
    buffers=r"embeddings\.position_ids",
    causal="",
    sequence="DistilBertForSequenceClassification",
)
