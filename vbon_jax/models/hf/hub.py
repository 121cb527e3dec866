"""Models on the Hugging Face hub: a model's name is resolved to a local directory."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from vbon_jax.models.hf.tensor_files import CheckpointError

# What cannot be a path: one "/" at most, none at either end, no "." or "~" in front.
_NAME = re.compile(r"(?P<repository>\w[\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# No pickles; configuration, weights and whatever tokenizer there is.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# Other formats of the same weights, which some repositories hold beside.
_UNWANTED = ("*/*", "consolidated*")


def resolve(name: str) -> Path:
    """Returns the local directory of a model, downloading it from the Hugging Face hub if need be.

    Args:
      name: an existing directory, or a name on the hub: "owner/name" or "name", followed by
        "@revision" for a revision other than the latest. Downloads are kept in huggingface_hub's
        cache and reused.

    Returns:
      The directory.

    Raises:
      CheckpointError: if there is no such directory, or the hub does not provide the files; the
        message says why and what to do.
    """
    path = Path(name)
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name} is a file: give the directory it is in")
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{name!r} is no directory: give the path of one with config.json and"
            " model.safetensors, or a name on the hub, owner/name or owner/name@revision"
        )
    return _download(name, match["repository"], match["revision"])


def origin(name: str) -> tuple[str, str | None]:
    """Returns how another program finds a model that ``resolve`` finds.

    Args:
      name: as for ``resolve``.

    Returns:
      (name on the hub, the commit that is used here), or (absolute path of the directory, None).

    Raises:
      CheckpointError: as ``resolve``.
    """
    path = resolve(name)
    match = _NAME.fullmatch(name)
    if Path(name).is_dir() or match is None:
        return str(path.absolute()), None
    # huggingface_hub's cache: models--owner--name/snapshots/COMMIT
    return match["repository"], path.name if path.parent.name == "snapshots" else match["revision"]


@functools.cache  # a process asks once, and has one snapshot from its start to its end
def _download(name: str, repository: str, revision: str | None) -> Path:
    import huggingface_hub  # slow to import
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    except errors.GatedRepoError as error:  # before the class it descends from
        fault = "is gated: accept its terms on its page, then run huggingface-cli login"
        raise CheckpointError(_message(name, fault, error)) from error
    except errors.RepositoryNotFoundError as error:
        fault = "is not on the hub, or is private: check the spelling, or run huggingface-cli login"
        raise CheckpointError(_message(name, fault, error)) from error
    except errors.RevisionNotFoundError as error:
        fault = f"has no revision {revision!r}: check the spelling, or leave it out"
        raise CheckpointError(_message(name, fault, error)) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        fault = (
            "is not in the cache and cannot be fetched: check the network and HF_HUB_OFFLINE, or"
            " give a directory that holds it"
        )
        raise CheckpointError(_message(name, fault, error)) from error
    except Exception as error:  # of the HTTP client (which one depends on the version), the disk
        fault = "could not be fetched: check the name and the network, or give a directory"
        raise CheckpointError(_message(name, fault, error)) from error


def _message(name: str, fault: str, error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"{name!r} is no directory here, and on the Hugging Face hub it {fault} ({first_line})"
