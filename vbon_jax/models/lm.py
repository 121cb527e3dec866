"""A language model as one object: configuration, parameters and tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vbon_jax.errors import InputError
from vbon_jax.models import hf
from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf import hub, tokenizers
from vbon_jax.models.hf.reading import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Fields of DecoderConfig that say how a model is computed, not what it computes.
ARITHMETIC = ("compute_dtype", "remat", "lora_alpha")


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model: configuration, parameters on a mesh and tokenizer.

    Attributes:
      config: the decoder's configuration, including how it is computed (``ARITHMETIC``).
      params: the decoder's parameter tree, ``{"wte": ..., "blocks": ..., ...}``; see
        ``models.decoder``.
      tokenizer: the tokenizer whose ids the embeddings are indexed by; at most
        ``config.vocab_size`` tokens.
      source: the config.json that the model was read from, whose settings are written back by
        ``save``; None for a GPT-2 trained from scratch.
    """

    config: DecoderConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: PreTrainedTokenizerFast = dataclasses.field(repr=False)
    source: dict[str, Any] | None = dataclasses.field(default=None, repr=False)


def check_vocabulary(name: str, config: DecoderConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Checks that every token of a tokenizer has an embedding.

    Args:
      name: what the message calls the model, such as ``"reference.path='gpt2'"``.
      config: the model's configuration. It may have more embeddings than the tokenizer has tokens:
        many models round their number up.
      tokenizer: the tokenizer to be used with the model.

    Raises:
      InputError: if the tokenizer has more tokens than the model has embeddings.
    """
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"{name} has {config.vocab_size} embeddings, its tokenizer {len(tokenizer)} tokens: "
            "the directory does not fit together"
        )


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    place: Place | None = None,
    dtype: str = "float32",
    **arithmetic: Any,
) -> LanguageModel:
    """Loads a causal language model and its tokenizer.

    Args:
      path: a Hugging Face directory, or the name of a model on the hub, "owner/name" or
        "owner/name@revision"; see ``hf.hub.resolve``.
      tokenizer: the tokenizer to use; None loads the one in the directory.
      place: maps the path of a parameter, such as "decoder/wte", and its shape to the sharding it
        is read into; see ``hf.load_decoder``. None: the default device.
      dtype: dtype of the parameters, "float32" or "bfloat16".
      **arithmetic: fields of ``DecoderConfig`` that say how the model is computed:
        ``compute_dtype``, ``remat`` and ``lora_alpha``. By default activations are float32.

    Returns:
      The model, its ``source`` being the directory's config.json.

    Raises:
      CheckpointError: if the directory or the hub does not give a causal language model that is
        supported; see ``hf.load_decoder``.
      InputError: if there is no tokenizer, or it has more tokens than the model has embeddings.
      TypeError: if ``arithmetic`` has another key.
      ValueError: if dtype, or a value of ``arithmetic``, is not supported.
    """
    if unknown := arithmetic.keys() - set(ARITHMETIC):
        raise TypeError(f"load got {', '.join(sorted(unknown))}: give {', '.join(ARITHMETIC)}")
    directory = hub.resolve(os.fspath(path))
    _, described, source = hf.read_config(directory)
    if tokenizer is None:
        tokenizer = tokenizers.load(directory)
    if isinstance(described, DecoderConfig):  # load_decoder refuses the others
        check_vocabulary(f"{os.fspath(path)!r}", described, tokenizer)
    config, params = hf.load_decoder(directory, place=place, dtype=dtype)
    return LanguageModel(dataclasses.replace(config, **arithmetic), params, tokenizer, source)


def save(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    temperature: float,
    end_ids: Sequence[int],
    params: Any = None,
) -> None:
    """Writes a model as a Hugging Face directory, which ``load`` and transformers read.

    Args:
      model: the model.
      path: the directory, made if absent; files of the same names are replaced.
      temperature: what transformers' ``generate`` samples at by default, without top-k or top-p:
        the distribution that the model was trained to have.
      end_ids: the ids that end a response; none where responses have a fixed length.
      params: parameters to write in place of the model's own, such as those of a policy trained
        from it; a plain tree, adapters merged (``models.trainable.merged``).

    Raises:
      ValueError: if the parameters do not fit the configuration, the configuration is not what
        ``model.source`` describes, or a special token's id is outside the vocabulary.
    """
    tokenizer = model.tokenizer
    hf.save_decoder(
        path,
        model.config,
        model.params if params is None else params,
        ids=hf.TokenIds(bos=tokenizer.bos_token_id, eos=end_ids, pad=tokenizer.pad_token_id),
        temperature=temperature,
        like=model.source,
    )
    tokenizers.save(tokenizer, path)


def is_end(tokens: Any, end_ids: Sequence[int]) -> Any:
    """Returns where token ids end a response: bool, of the shape of ``tokens``.

    Args:
      tokens: ids, an array of NumPy or JAX.
      end_ids: the ids that end a response; none where responses have a fixed length.
    """
    found = tokens != tokens  # all False
    for end in end_ids:
        found = found | (tokens == end)
    return found


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the id that fills padding: the pad token's, else the end-of-sequence token's, else 0.

    Which id it is changes no result, since padding is always masked.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
