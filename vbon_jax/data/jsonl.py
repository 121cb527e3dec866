"""JSON lines: one JSON object a line, every fault named by file and line number."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vbon_jax.errors import InputError


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Parses one line.

    Args:
      line: the bytes of the line, with or without its newline, UTF-8.
      where: "file:line", for the message.

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
    """Yields ("file:line", object) for each line of a file; blank lines are skipped.

    Lines end at the newline byte only, so U+2028 and its like inside a string do not split it.

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
    """One JSON object as ASCII bytes with its newline; NaN and infinity raise ValueError."""
    return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def field(record: dict[str, Any], key: str, where: str) -> Any:
    """The value of a key that must be there; InputError names the keys that are."""
    if key not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where}: key {key!r} is missing (found: {found}); add it")
    return record[key]


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    """The value of a key that must be a string."""
    value = field(record, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, not {value!r}")
    return value
