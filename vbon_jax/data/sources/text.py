"""Labelled text: what the reference is fine-tuned on and the reward model is trained on."""

import os
from dataclasses import dataclass

from vbon_jax.data import jsonl
from vbon_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """A text and its class: 1 for what the reward model shall prefer, else 0."""

    text: str
    label: int


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
    """Reads labelled text from {"text": str, "label": 0 | 1 | false | true} lines.

    Other keys are ignored and blank lines are skipped.

    Returns:
      The examples in file order; both labels occur.

    Raises:
      InputError: the file is missing or holds no example, a line is not a JSON object, lacks a key
        or has a value of another type (file and line are named), or all labels are the same.
    """
    examples = []
    for where, record in jsonl.read(path):
        text = jsonl.text_field(record, "text", where)
        if not text.strip():
            raise InputError(f"{where}: 'text' is empty; give it words or delete the line")
        label = jsonl.field(record, "label", where)
        # 1.0 == 1, so the type is asked first: a float label is some other scale.
        if not isinstance(label, int) or label not in (0, 1):
            raise InputError(f"{where}: 'label' must be 0 or 1, not {label!r}")
        examples.append(Example(text, int(label)))
    if not examples:
        raise InputError(
            f'{path}: the file is empty; give one {{"text": ..., "label": ...}} a line'
        )
    labels = {example.label for example in examples}
    if len(labels) == 1:
        raise InputError(
            f"{path}: all {len(examples)} labels are {labels.pop()}; a reward model needs examples "
            "of both 0 and 1"
        )
    return examples
