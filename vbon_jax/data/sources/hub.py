"""Data sets of the Hugging Face hub, or local ones, by name: an optional extra.

`datasets` is imported only when a data set is loaded.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vbon_jax.data import jsonl, prompts, records
from vbon_jax.data.sources import chat, text
from vbon_jax.data.sources.chat import Conversation
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError

_LOCAL = f"a local file ({', '.join(records.SUFFIXES)})"


def load(
    name: str,
    split: str,
    text_column: str = text.TEXT_COLUMN,
    label_column: str = text.LABEL_COLUMN,
) -> list[Example]:
    """Loads labelled text.

    Args:
      name: "owner/name" on the hub, with ":configuration" behind it where the data set has
        several; or a local directory of .parquet, .csv or .jsonl files.
      split: such as "train", or a slice of it, "train[:1000]".
      text_column: the column of the texts, strings.
      label_column: the column of the labels: 0 or 1, booleans, or a `ClassLabel` of 2 classes, of
        which the second is preferred.

    Returns:
      The examples in the order of the data set; both labels occur.

    Raises:
      InputError: `datasets` is not installed; the data set is not in the cache and cannot be
        fetched, or has no such configuration, split or column; or a text or label is not valid.
    """
    found = _records(name, split, text.settings(text_column, label_column), "data.path")
    return text.examples(found, _shown(name, split), text_column, label_column)


def load_prompts(name: str, split: str, column: str = prompts.TEXT_COLUMN) -> list[str]:
    """Loads prompts; `prompts.from_texts` tokenizes them.

    Args:
      name: see `load`.
      split: see `load`.
      column: the column of the prompts, strings.

    Returns:
      The prompts in the order of the data set.

    Raises:
      InputError: as `load`, or a prompt is empty.
    """
    found = []
    for where, record in _records(name, split, {column: prompts.COLUMN_SETTING}, "prompts.path"):
        found.append(jsonl.text_field(record, column, where))
        if not found[-1]:
            raise InputError(f"{where}: {column!r} is empty; give another split, or a local file")
    return found


def load_conversations(name: str, split: str, column: str = "") -> list[Conversation]:
    """Loads conversations; `chat.prompts` tokenizes them.

    Args:
      name: see `load`.
      split: see `load`.
      column: see `chat.read`.

    Returns:
      The conversations in the order of the data set.

    Raises:
      InputError: as `load`, or as `chat.read`.
    """
    found = _records(name, split, chat.settings(column), "prompts.path")
    return chat.conversations(found, _shown(name, split), column)


def _shown(name: str, split: str) -> str:
    return f"data set {name!r}, split {split!r}"


def _records(
    name: str, split: str, columns: Mapping[str, str], instead: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, record) of each row, as `records.read` does of a file."""
    rows = _dataset(name, split, instead)
    records.check_columns(_shown(name, split), rows.column_names, columns)
    if columns:
        rows = rows.select_columns(list(columns))
    for index, record in enumerate(rows):
        yield f"{_shown(name, split)}: row index {index}", record


def _dataset(name: str, split: str, instead: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data set {name!r}: the package datasets is not installed; run pip install "
            f'"vbon_jax[hub]", or set {instead} to {_LOCAL}'
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # lines that redraw themselves, in a log
    path, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        return datasets.load_dataset(
            path, configuration or None, split=split, trust_remote_code=False
        )
    except Exception as error:  # whatever a builder, the HTTP client or the disk raises
        if isinstance(error, ConnectionError):
            offline = datasets.config.HF_HUB_OFFLINE
            reason = "HF_HUB_OFFLINE is set" if offline else f"check the network: {_words(error)}"
            fault = (
                "is neither a local directory nor in the cache, and the Hugging Face hub cannot be "
                f"reached ({reason}); download it first, where there is a network"
            )
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            fault = (
                "is neither a local directory nor on the Hugging Face hub, or is private or gated "
                f"({_words(error)}); check the spelling, run hf auth login"
            )
        else:
            fault = (
                f"cannot be loaded with split {split!r} ({_words(error)}); check the split and the "
                "configuration (owner/name:configuration)"
            )
        raise InputError(f"data set {name!r} {fault}, or set {instead} to {_LOCAL}") from error


def _words(error: Exception) -> str:
    """The text of an error as part of a sentence."""
    said = " ".join(str(error).split()).rstrip(".")
    return said if len(said) <= 300 else said[:297] + "..."
