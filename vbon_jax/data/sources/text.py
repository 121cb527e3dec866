"""Labelled text: what the reference model is fine-tuned on and the reward model is trained on."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbon_jax.data import jsonl, records
from vbon_jax.errors import InputError

TEXT_COLUMN, LABEL_COLUMN = "text", "label"


@dataclass(frozen=True)
class Example:
    """A labelled text.

    Attributes:
      text: the text, never blank.
      label: 1 for the class that the reward model should prefer, else 0.
    """

    text: str
    label: int


def settings(text_column: str, label_column: str) -> dict[str, str]:
    """The two columns, each with the config key that names it, as `records.read` takes them."""
    return {text_column: "data.text_column", label_column: "data.label_column"}


def read(
    path: str | os.PathLike[str],
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
) -> list[Example]:
    """Reads labelled text from a .jsonl, .csv, .tsv or .parquet file.

    Other columns are ignored; see `records.read` for the formats.

    Args:
      path: the file.
      text_column: the column (or JSON key) of the texts.
      label_column: the column of the labels: 0 or 1, or false or true; in .csv and .tsv the
        strings 0 or 1.

    Returns:
      The examples in file order; both labels occur.

    Raises:
      InputError: the file cannot be read, holds no record or lacks a column, a text is no string or
        blank, a label is none of the above (file and line are named), or all labels are the same.
    """
    delimited = Path(path).suffix.lower() in records.DELIMITERS
    found = records.read(path, settings(text_column, label_column))
    if delimited:  # where every value is a string
        found = ((where, _number_label(record, label_column)) for where, record in found)
    return examples(found, str(path), text_column, label_column)


def _number_label(record: dict[str, Any], column: str) -> dict[str, Any]:
    label = record[column]
    return record | {column: int(label) if label in ("0", "1") else label}


def examples(
    found: Iterable[tuple[str, dict[str, Any]]], source: str, text_column: str, label_column: str
) -> list[Example]:
    """Makes examples of records that have both columns.

    Args:
      found: (location, record) of each, the location for messages.
      source: the name of the file or data set, for messages.
      text_column: the column of the texts, strings.
      label_column: the column of the labels, 0 or 1, or false or true.

    Returns:
      The examples in order; both labels occur.

    Raises:
      InputError: as `read`.
    """
    made = []
    for where, record in found:
        text = jsonl.text_field(record, text_column, where)
        if not text.strip():
            raise InputError(f"{where}: {text_column!r} is empty; give it words or delete it")
        label = record[label_column]
        # 1.0 == 1, so the type is asked first: a float label is some other scale.
        if not isinstance(label, int) or label not in (0, 1):
            raise InputError(f"{where}: {label_column!r} must be 0 or 1, not {label!r}")
        made.append(Example(text, int(label)))
    if not made:
        raise InputError(
            f"{source}: the file is empty; give it records with a text ({text_column!r}) and a "
            f"label ({label_column!r})"
        )
    labels = {example.label for example in made}
    if len(labels) == 1:
        raise InputError(
            f"{source}: all {len(made)} labels are {labels.pop()}; a reward model needs examples "
            "of both 0 and 1"
        )
    return made
