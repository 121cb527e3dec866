"""JSON lines: one JSON object a line; errors name the file and the line number.

The lines of samples and prompts that are written here end in a checksum of themselves, under the
key `CHECKSUM`; wherever there is one it is checked on reading.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vbon_jax.errors import InputError

CHECKSUM = "vbon_crc32"  # the last key of a line: of all bytes before it
_SEAL = f', "{CHECKSUM}": "'.encode()


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Parses one line.

    Args:
      line: the UTF-8 bytes of the line, with or without its newline.
      where: "file:line", for the message.

    Returns:
      The JSON object, without its checksum.

    Raises:
      InputError: the line is not UTF-8, not JSON, not a JSON object, or not what its checksum was
        taken of.
    """
    try:
        parsed = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a BOM
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON ({error}); correct or delete it") from error
    if not isinstance(parsed, dict):
        kind = type(parsed).__name__
        raise InputError(f"{where}: a JSON object is needed on each line, this one is a {kind}")
    if CHECKSUM in parsed:
        body, _, end = line.rpartition(_SEAL)
        if end.rstrip(b"\r\n") != _checksum(body):
            raise InputError(
                f"{where}: the line is not what it was written as ({CHECKSUM} differs): it is "
                f"damaged or was edited; put it back, or take {CHECKSUM} out of it to use it as it "
                "is"
            )
        del parsed[CHECKSUM]
    return parsed


def _checksum(body: bytes) -> bytes:
    """The end of a line after `_SEAL`; 32 bits see every change of up to 4 neighbouring bytes."""
    return f'{zlib.crc32(body):08x}"}}'.encode()


def is_sealed(line: bytes) -> bool:
    """Whether a line carries a checksum."""
    return _SEAL in line


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


def dump_sealed(record: dict[str, Any]) -> bytes:
    """Serializes one JSON object as a line with a checksum.

    Args:
      record: as for `dump_line`, with at least one key.

    Returns:
      ASCII bytes, newline included.

    Raises:
      ValueError: a value is NaN or infinite.
    """
    body = dump_line(record).removesuffix(b"}\n")
    return body + _SEAL + _checksum(body) + b"\n"


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
