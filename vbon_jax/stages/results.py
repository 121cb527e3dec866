"""What a stage left in the workdir, known by digests."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vbon_jax.training import seals

_CHECKPOINTS = "checkpoints/"  # folders that check themselves when they are restored


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of(root: Path, leaves: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Digests of the files that are there.

    Args:
      root: the workdir.
      leaves: files and folders in it.

    Returns:
      By path, {"size", "sha256"} of each file; of checkpoints {"newest"}, see `seals.newest`.
    """
    found: dict[str, dict[str, Any]] = {}
    for leaf in leaves:
        if leaf.startswith(_CHECKPOINTS):
            newest = seals.newest(root / leaf)
            if newest is not None:
                found[leaf] = {"newest": newest}
            continue
        for path in files(root / leaf):
            name = path.relative_to(root).as_posix()
            found[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return found


def files(path: Path) -> Iterator[Path]:
    """The file of a path, or all files below it, but for temporary ones."""
    if path.is_file():
        yield path
    for each in sorted(path.rglob("*")) if path.is_dir() else ():
        if each.is_file() and not each.name.endswith((".tmp", ".partial")):
            yield each


def changes(root: Path, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What of recorded results is not there as it was: by path, "is missing" or "was changed"."""
    found = {}
    for name, known in recorded.items():
        path = root / name
        if "newest" in known:
            newest = seals.newest(path)
            if newest != known["newest"]:
                found[name] = "is missing" if newest is None else "was changed"
        elif not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != known["size"] or sha256(path) != known["sha256"]:
            found[name] = "was changed"
    return found


def digest(recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of recorded results."""
    return hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()
