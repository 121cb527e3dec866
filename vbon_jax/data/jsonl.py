"""JSON lines: one JSON object a line; errors name the file and the line number."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vbon_jax.errors import InputError


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Parses one line.

    Args:
      line: the UTF-8 bytes of the line, with or without its newline.
      where: "file:line", for the message.

    Returns:
      The JSON object.

    Raises:
      InputError: the line is not UTF-8, not JSON, or not a JSON object.
    """
    try:
        parsed = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a BOM
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON ({error}); correct or delete it") from error
    if not isinstance(parsed, dict):
        kind = type(parsed).__name__
        raise InputError(f"{where}: a JSON object is needed on each line, this one is a {kind}")
    return parsed


def read(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the JSON object of each line of a file; blank lines are skipped.

    Lines end at the newline byte only, so U+2028 and similar characters do not split a string.

    Args:
      path: the file.

    Yields:
      ("file:line", JSON object), in file order.

    Raises:
      InputError: the file is missing or cannot be read, or a line is not a JSON object.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, parse_line(line, where)
    except FileNotFoundError as error:
        raise InputError(f"file {path} does not exist; check the path") from error
    except OSError as error:
        raise InputError(f"file {path} cannot be read: {error.strerror}") from error


def dump_line(record: dict[str, Any]) -> bytes:
    """Serializes one JSON object as a line.

    Args:
      record: what `json.dumps` takes.

    Returns:
      ASCII bytes, newline included.

    Raises:
      ValueError: a value is NaN or infinite.
    """
    return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def field(record: Mapping[str, Any], key: str, where: str, setting: str = "") -> Any:
    """Returns the value of a key that must be there.

    Args:
      record: the JSON object.
      key: its key.
      where: "file:line", for the message.
      setting: the config key that names the key, if one does; for the message.

    Raises:
      InputError: the key is not there; names the keys that are.
    """
    if key not in record:
        found = ", ".join(map(repr, record)) or "none"
        remedy = f"add it, or set {setting} to the key to read" if setting else "add it"
        raise InputError(f"{where}: key {key!r} is missing (found: {found}); {remedy}")
    return record[key]


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    """Returns the value of a key that must be there and a string.

    Args:
      record: the JSON object.
      key: its key.
      where: "file:line", for the message.

    Raises:
      InputError: the key is not there, or its value is no string.
    """
    value = field(record, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, not {value!r}")
    return value
