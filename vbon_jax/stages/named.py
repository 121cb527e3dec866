"""Files, models and modules that settings name, known by digests of their content."""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vbon_jax
from vbon_jax.errors import InputError
from vbon_jax.models.hf import hub
from vbon_jax.stages import results

_PATHS = ("path", "test_path", "ood_path")
_MODELS = ("reference", "tokenizer", "reward", "evaluator")  # groups whose path may be a hub name

# (path, size, mtime in ns, inode) -> SHA-256: a file that has all of these is not read again.
Known = dict[tuple[str, int, int, int], str]


def names_content(key: str) -> bool:
    """Whether a flat config key names files or code."""
    return key.rpartition(".")[2] in (*_PATHS, "function")


def content(key: str, value: str, known: Known) -> dict[str, Any] | None:
    """What a setting names, as a note keeps it.

    Args:
      key: a flat config key of `names_content`.
      value: a file, a model's directory or name on the hub, or "module:function".
      known: digests taken before.

    Returns:
      {"sha256", "parts"}: the digest of the content, and of each file (path, size, mtime, inode,
      SHA-256); of a model on the hub its revision and no parts. None where nothing is named, or it
      is not there (whoever needs it says so), or it is code of this package.
    """
    if not value:
        return None
    if key.endswith(".function"):
        path = _module_file(value)
        return None if path is None else _digest([path], known)
    path = Path(value)
    if path.is_file():
        return _digest([path], known)
    if path.is_dir():
        return _digest([p for w in hub.WANTED for p in path.glob(w) if p.is_file()], known)
    if key.partition(".")[0] not in _MODELS:
        return None
    try:
        return {"sha256": hub.resolve(value).name, "parts": []}  # .../snapshots/<commit>
    except InputError:
        return None


def known(notes: Iterable[Mapping[str, Mapping[str, Any]]]) -> Known:
    """The digests that the ``files`` of notes hold."""
    return {
        (path, size, changed, inode): digest
        for files in notes
        for entry in files.values()
        for path, size, changed, inode, digest in entry["parts"]
    }


def _digest(paths: list[Path], known: Known) -> dict[str, Any]:
    parts, lines = [], []
    for path in sorted(paths):
        stat = path.stat()
        at = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        digest = known.get(at) or results.sha256(path)
        parts.append([*at, digest])
        lines.append(f"{path.name} {digest}\n")
    if len(parts) == 1:
        return {"sha256": parts[0][-1], "parts": parts}
    return {"sha256": hashlib.sha256("".join(lines).encode()).hexdigest(), "parts": parts}


def _module_file(name: str) -> Path | None:
    """The source of the module of "module:function", which is not imported."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # a package's own code may run, and raise anything
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    path = Path(spec.origin)
    ours = Path(vbon_jax.__file__).parent
    return None if path.is_relative_to(ours) else path
