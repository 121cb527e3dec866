"""The note of a stage: what it was done with, what it read and what it left, by digests."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from vbon_jax.errors import InputError

_OLD = frozenset({"settings", "complete"})  # the keys of versions that took no digests


@dataclasses.dataclass(frozen=True)
class Note:
    """What ``stages/<stage>.json`` says.

    Attributes:
      settings: flat settings that the results follow from.
      complete: whether all results are there.
      files: of the settings that name files or models, the digests of their content; see `named`.
      read: digests of the results of the other stages that it read.
      results: digests of what it left by path; None in a note of a version that took none.
    """

    settings: dict[str, Any]
    complete: bool
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    read: dict[str, str] = dataclasses.field(default_factory=dict)
    results: dict[str, dict[str, Any]] | None = None


def as_json(note: Note) -> dict[str, Any]:
    """The JSON object of a note, with a digest of itself."""
    body = dataclasses.asdict(note)
    return body | {"sha256": _digest(body)}


def read(path: Path) -> Note | None:
    """Reads a note; None where there is none.

    Raises:
      InputError: it is not what was written.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
        if value.keys() != _OLD and value.pop("sha256", None) != _digest(value):
            raise ValueError("its digest differs")
        note = Note(**value)
        if not isinstance(note.settings, dict) or not isinstance(note.complete, bool):
            raise ValueError("settings or complete is of another type")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or was edited ({error}): put it back, or remove it and run the "
            "same command again: then the stage is done anew, and what it left before is set aside"
        ) from error
    return note


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
