"""What the metadata of a checkpoint hold beside the caller's: fingerprints and a digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vbon_jax.training import fingerprints

_KEYS = frozenset({"step", "given", "arrays", "sha256"})


class Damaged(Exception):
    """What is on disk is not what was saved."""


def sealed(step: int, state: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The metadata on disk: the caller's, the fingerprints of the state, and a digest of both."""
    body = {"step": step, "given": given, "arrays": fingerprints.of_tree(state)}
    return body | {"sha256": _digest(body)}


def is_sealed(metadata: dict[str, Any]) -> bool:
    """Whether metadata are of a version that seals them, whole or not."""
    return bool(metadata.keys() & {"arrays", "sha256"})


def check(step: int, metadata: dict[str, Any]) -> None:
    """Raises Damaged where metadata are not those saved as ``step``."""
    body = {key: value for key, value in metadata.items() if key != "sha256"}
    if metadata.keys() != _KEYS or _digest(body) != metadata["sha256"]:
        raise Damaged("its metadata are not those that were saved")
    if metadata["step"] != step:
        raise Damaged(f"it was saved as {metadata['step']}")


def newest(directory: Path) -> str | None:
    """What the newest checkpoint of a folder holds: a digest of its step and fingerprints.

    None where there is none, or its metadata are damaged or of a version that did not seal them.
    The arrays themselves are not read.
    """
    if not directory.is_dir():
        return None
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdecimal()]
    if not steps:
        return None
    step = max(steps)
    try:
        metadata = json.loads((directory / str(step) / "metadata" / "metadata").read_bytes())
        check(step, metadata)
    except (OSError, ValueError, AttributeError, RecursionError, Damaged):
        return None
    return _digest({"step": step, "arrays": metadata["arrays"]})


def free_name(path: Path) -> Path:
    """``path``, or where it is taken the first free one of ``path.1``, ``path.2``, ..."""
    number, found = 0, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
