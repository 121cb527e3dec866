"""RoBERTa (Liu et al., 2019): BERT with another head, its first position embeddings unused."""

from typing import Any

from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf.families import bert


def config(hf: Any) -> EncoderConfig:
    """Reads our configuration from transformers' ``RobertaConfig``."""
    if hf.pad_token_id is None:
        raise ValueError("pad_token_id is None: positions are counted from it, so it must be set")
    offset = hf.pad_token_id + 1
    if hf.max_position_embeddings <= offset:
        raise ValueError(
            f"max_position_embeddings is {hf.max_position_embeddings}: the first {offset},"
            " pad_token_id + 1, are never used, so there must be more"
        )
    return EncoderConfig(
        **bert.fields(hf),
        positions=hf.max_position_embeddings - offset,
        position_offset=offset,
        head="roberta",
    )


FAMILY = bert.FAMILY._replace(
    config=config,
    prefix="roberta.",
    classifier=(
        *bert.linear("classifier.dense", "score/dense"),
        *bert.linear("classifier.out_proj", "score/out"),
    ),
    # Old classifiers carry along a pooler that their head does not read.
    buffers=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
    sequence="RobertaForSequenceClassification",
)
