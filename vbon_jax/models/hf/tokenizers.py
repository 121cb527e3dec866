"""Tokenizers of Hugging Face directories: loaded, saved and compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vbon_jax.errors import InputError, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a Hugging Face directory, without network access.

    Args:
      path: a local directory with tokenizer.json, or with the vocabulary files that its
        config.json implies.

    Returns:
      The tokenizer, which does not clean up spaces when it decodes.

    Raises:
      InputError: if the directory is missing or holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer  # slow to import

    path = Path(path)
    if not path.is_dir():  # from_pretrained would take the name for one on the hub
        raise InputError(f"tokenizer directory {path} does not exist; check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,  # its absence means: ask on standard input
            clean_up_tokenization_spaces=False,
        )
        # Of a directory without vocabulary files transformers makes a tokenizer of nothing else.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("there are no tokens but the special ones")
        return tokenizer
    except Exception as error:  # a broken file surfaces as whatever its parser raises
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"no tokenizer could be loaded from {path} ({type(error).__name__}: {reason}); it "
            "needs tokenizer.json or the vocabulary files that go with its config.json"
        ) from error


def save(tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer into a Hugging Face directory.

    Args:
      tokenizer: the tokenizer to write, with its chat template where it has one.
      path: the directory, made if absent.
    """
    with writing(path):
        tokenizer.save_pretrained(path)


def same(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Returns whether two tokenizers have the same vocabulary: equal ids for equal tokens."""
    return one.get_vocab() == other.get_vocab()


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the id of the tokenizer's end-of-sequence token.

    Args:
      tokenizer: the tokenizer.

    Raises:
      InputError: if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer without EOS: {tokenizer.name_or_path or 'the one built here'} sets no "
            'eos_token; add "eos_token" to its tokenizer_config.json'
        )
    return int(tokenizer.eos_token_id)
