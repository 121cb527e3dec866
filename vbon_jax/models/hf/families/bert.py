"""BERT (Devlin et al., 2019) as a sequence classifier; RoBERTa uses the same tensor names."""

from typing import Any

from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf.family import Family, Tensor, only
from vbon_jax.models.hf.layouts import AS_IS, FLAT, LINEAR, LINEAR_HEADS


def fields(hf: Any) -> dict[str, Any]:
    """Reads the fields that configs of BERT and RoBERTa have in common."""
    only(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        "vocab_size": hf.vocab_size,
        "layers": hf.num_hidden_layers,
        "width": hf.hidden_size,
        "heads": hf.num_attention_heads,
        "mlp_width": hf.intermediate_size,
        "token_types": hf.type_vocab_size,
        "norm_eps": hf.layer_norm_eps,
        "activation": hf.hidden_act,
        "initializer_range": hf.initializer_range,
    }


def config(hf: Any) -> EncoderConfig:
    """Reads our configuration from transformers' ``BertConfig``."""
    return EncoderConfig(**fields(hf), positions=hf.max_position_embeddings, head="bert")


def linear(name: str, path: str) -> list[Tensor]:
    """Returns the rows of a torch Linear with a bias, given its name and our path."""
    return [
        Tensor(f"{name}.weight", (f"{path}/kernel",), LINEAR),
        Tensor(f"{name}.bias", (f"{path}/bias",), AS_IS),
    ]


def attention(names: dict[str, str]) -> list[Tensor]:
    """Returns the rows of the attention projections, given their names for our q, k, v and out."""
    rows = []
    for ours, name in names.items():
        path = f"blocks/attention/{ours}"
        kernel, bias = (LINEAR_HEADS, AS_IS) if ours == "out" else (LINEAR, FLAT)
        rows.append(Tensor(f"{name}.weight", (f"{path}/kernel",), kernel))
        rows.append(Tensor(f"{name}.bias", (f"{path}/bias",), bias))
    return rows


def norm(name: str, path: str) -> list[Tensor]:
    """Returns the rows of a torch LayerNorm, given its name and our path."""
    return [
        Tensor(f"{name}.weight", (f"{path}/scale",), AS_IS),
        Tensor(f"{name}.bias", (f"{path}/bias",), AS_IS),
    ]


def tensors(config: EncoderConfig) -> list[Tensor]:
    """Returns the table of the model without its head."""
    layer = "encoder.layer.{i}."
    rows = [
        Tensor("embeddings.word_embeddings.weight", ("wte",), AS_IS),
        Tensor("embeddings.position_embeddings.weight", ("wpe",), AS_IS),
        Tensor("embeddings.token_type_embeddings.weight", ("wtt",), AS_IS),
        *norm("embeddings.LayerNorm", "ln_embed"),
        *attention(
            {
                "q": layer + "attention.self.query",
                "k": layer + "attention.self.key",
                "v": layer + "attention.self.value",
                "out": layer + "attention.output.dense",
            }
        ),
        *norm(layer + "attention.output.LayerNorm", "blocks/ln_1"),
        *linear(layer + "intermediate.dense", "blocks/mlp/up"),
        *linear(layer + "output.dense", "blocks/mlp/down"),
        *norm(layer + "output.LayerNorm", "blocks/ln_2"),
    ]
    if config.head == "bert":
        rows += linear("pooler.dense", "pooler")  # with the body's prefix, so it counts as body
    return rows


FAMILY = Family(
    config=config,
    tensors=tensors,
    prefix="bert.",
    head="",
    classifier=tuple(linear("classifier", "score/out")),
    buffers=r"embeddings\.position_ids",
    causal="",
    sequence="BertForSequenceClassification",
)
