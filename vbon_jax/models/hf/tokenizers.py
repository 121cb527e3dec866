"""Tokenizers of Hugging Face directories: loaded, saved and compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vbon_jax import processes
from vbon_jax.errors import InputError, writing
from vbon_jax.models.hf.tensor_files import read_json

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
    if not processes.first():
        return
    with writing(path):
        tokenizer.save_pretrained(path)


def same(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Returns whether two tokenizers have the same vocabulary: equal ids for equal tokens."""
    return one.get_vocab() == other.get_vocab()


def begin_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the special tokens that the tokenizer puts in front of a text, such as BOS.

    They are those that its own call adds: ``tokenizer(text)`` against the same without special
    tokens. What it puts behind a text is left out, as a prompt goes on.

    Args:
      tokenizer: the tokenizer.
    """
    probe = "a"
    try:
        bare = tokenizer.encode(probe, add_special_tokens=False)
    except Exception:  # one token a character, none for this one
        bare = []
    if not bare:
        probe = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
        bare = tokenizer.encode(probe, add_special_tokens=False)
    whole = tokenizer.encode(probe, add_special_tokens=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()


def set_bos(tokenizer: PreTrainedTokenizerFast, add_bos: str) -> PreTrainedTokenizerFast:
    """Makes a tokenizer begin texts with its BOS token, or not.

    The choice is part of the tokenizer: saved with it, and what transformers reads back.

    Args:
      tokenizer: the tokenizer, changed in place.
      add_bos: "auto" leaves it as it is; "always" or "never".

    Returns:
      The tokenizer.

    Raises:
      InputError: it has no BOS token to begin with.
    """
    if add_bos == "auto":
        return tokenizer
    if add_bos == "always" and tokenizer.bos_token_id is None:
        raise InputError(
            f"tokenizer.add_bos='always': tokenizer {tokenizer.name_or_path or 'built here'} has "
            "no bos_token; set auto or never"
        )
    wanted = () if add_bos == "never" else (int(tokenizer.bos_token_id),)
    if begin_ids(tokenizer) != wanted:
        tokenizer.add_bos_token = add_bos == "always"
    return tokenizer


def end_ids(
    tokenizer: PreTrainedTokenizerFast,
    directory: str | os.PathLike[str] | None = None,
    tokens: Sequence[str] = (),
) -> tuple[int, ...]:
    """Returns the ids that end a response.

    They are the ``eos_token_id`` of the model's generation_config.json (or, where that has none, of
    its config.json), a number or a list as for transformers' ``generate``, and the tokenizer's own
    EOS. Ids without a token are left out: many configs keep the default of their class.

    Args:
      tokenizer: the model's tokenizer.
      directory: of the model; None where it has none yet.
      tokens: the tokens that end a response in place of these.

    Raises:
      InputError: a token is not in the vocabulary, or there is no id at all.
    """
    if tokens:
        vocabulary = tokenizer.get_vocab()
        for token in tokens:
            if token not in vocabulary:
                raise InputError(
                    f"sampling.end_tokens has {token!r}: the tokenizer has no such token; name "
                    "tokens of its vocabulary, such as '<|im_end|>'"
                )
        return tuple(dict.fromkeys(vocabulary[token] for token in tokens))
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    listed = [] if directory is None else _listed_ends(Path(directory))
    found = tuple(dict.fromkeys(i for i in (*listed, *own) if i < len(tokenizer)))
    if not found:
        raise InputError(
            f"tokenizer without EOS: {tokenizer.name_or_path or 'the one built here'} sets no "
            'eos_token; add "eos_token" to its tokenizer_config.json, or name the tokens that end '
            "a response in sampling.end_tokens"
        )
    return found


def _listed_ends(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        value = read_json(file).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(
                f"{file}: eos_token_id is {value!r}: an id or a list of ids is needed; correct it, "
                "or set sampling.end_tokens"
            )
        return ids
    return []
