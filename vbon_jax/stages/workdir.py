"""The run's folder: where each thing lies, and which stage has been done under which settings."""

import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from vbon_jax import config
from vbon_jax.config import Config
from vbon_jax.errors import DISK_FULL, InputError, space, writing
from vbon_jax.progress import log

# Settings that change how fast a result comes, not what it is.
FREE = (
    "data.tfds_dir", "sampling.batch_size", "train.checkpoint_every", "train.keep", "sweep.at_once",
    "sweep.stale_seconds",
)  # fmt: skip


# Temporary names of what is written in our folders, and of the files of the workdir itself.
TEMPORARY = ("*.tmp", "*.partial", ".claim-*", "*.orbax-checkpoint-tmp*")
OURS = (
    "prompts", "samples", "stages", "tokenizer", "reference", "reward", "evaluator", "policy",
    "checkpoints", "figures", "sweep",
)  # fmt: skip
WRITTEN = ("config", "evaluation", "metrics", "report", "sweep", "tabular", "convergence")
STALE_SECONDS = 600.0  # age of a temporary file that no other worker is still writing

_OTHER = object()


class Follows(Protocol):
    """What the workdir asks of a stage; see ``stages.base.Stage``."""

    leaves: tuple[str, ...]

    def follows(self, stages: Any) -> tuple[str, ...]:
        """The config keys that its results follow from."""


class Workdir:
    """Paths below one folder, and a note a stage of the settings it was done with."""

    def __init__(self, root: str | os.PathLike[str], settings: Config, stages: Mapping[str, Any]):
        """Nothing is made or read yet; ``stages``: all there are, by name."""
        self.root = Path(root).expanduser().absolute()
        self._flat = config.flatten(config.as_dict(settings))
        self._stages: Mapping[str, Follows] = stages
        self.tokenizer = self.root / "tokenizer"
        self.reference = self.root / "reference"
        self.reward = self.root / "reward"
        self.evaluator = self.root / "evaluator"
        self.policy = self.root / "policy"
        self.data = self.root / "data"
        self.evaluation = self.root / "evaluation.json"

    def prompts(self, split: str) -> Path:
        """The prompts of a split."""
        return self.root / "prompts" / f"{split}.jsonl"

    @property
    def train_samples(self) -> Path:
        """The scored reference responses to the training prompts."""
        return self.root / "samples" / "train.jsonl"

    def held_out(self, role: str, split: str, temperature: float, m: int) -> Path:
        """The reference samples of a split at a temperature: "opponents" or "pool".

        Their name carries a digest of what they follow from, so that samples of another reference,
        reward, evaluator or prompt set are never taken for these.
        """
        follows = self.relevant("sample") | {
            k: v for k, v in self._flat.items() if k.startswith("evaluator.")
        }
        digest = self.digest(self.settled(follows))
        return self.root / "samples" / f"{split}_{role}_t{temperature:g}_m{m}_{digest}.jsonl"

    def date(self) -> datetime.date:
        """The day on which the workdir was begun, for chat templates that write a date.

        It is ``prompts.date`` where that is set. The first call writes it down.
        """
        given = self._flat["prompts.date"]
        if given:
            return datetime.date.fromisoformat(given)
        path = self.root / "date"
        try:
            return datetime.date.fromisoformat(path.read_text().strip())
        except FileNotFoundError:
            today = datetime.datetime.now().astimezone().date()
            if self.root.is_dir():
                self.write_text(path, f"{today}\n")
            return today
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): write the day of the run into it, as "
                "2026-01-31, or set prompts.date"
            ) from error

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's checkpoints lie."""
        return self.root / "checkpoints" / stage

    def relevant(self, stage: str) -> dict[str, Any]:
        """The flat settings that a stage's results follow from."""
        keys = self._stages[stage].follows(self._stages)
        if "method" in keys:  # and the groups of their own that methods have
            keys = (*keys, *config.METHOD_GROUPS)

        def counts(name: str) -> bool:
            return any(name == key or name.startswith(f"{key}.") for key in keys)

        return {k: v for k, v in self._flat.items() if counts(k) and k not in FREE}

    @staticmethod
    def settled(follows: Mapping[str, Any]) -> dict[str, Any]:
        """Settings without the keys added since the first workdirs, where they have their default.

        So the files of an older workdir, which are named by a digest of its settings, are found.
        """
        added = config.added(follows)
        return {k: v for k, v in follows.items() if added.get(k, _OTHER) != v}

    @staticmethod
    def digest(follows: Mapping[str, Any]) -> str:
        """A short name for results that follow from these values."""
        return hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:8]

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """Makes the folder and holds it for this process.

        Args:
          wait: until another process lets go of it, instead of raising.

        Raises InputError where it cannot be made or written, or another process holds it.
        """
        marks = [mark for mark in "[*?" if mark in str(self.root)]
        if marks:  # orbax would look for files that match, and leave checkpoints in pieces
            raise InputError(
                f"--workdir={self.root}: {marks[0]} in a path is a pattern to the library that "
                "writes checkpoints: choose a path without [, * and ?"
            )
        lock = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Not through a link, and nothing is cut: what lies there may be somebody's file.
            file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InputError(f"{lock} is a link: remove it, a lock must be a file") from error
            raise InputError(
                f"--workdir={self.root}: cannot be made or written ({error.strerror})"
                + (f"; {space(self.root)}" if error.errno in DISK_FULL else "")
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on a kill
            except BlockingIOError as error:
                if not wait:
                    raise InputError(
                        f"--workdir={self.root}: another vbon is at work there; wait for it or "
                        "stop it"
                    ) from error
                log(f"waiting for another vbon at work in {self.root}")
                fcntl.flock(file, fcntl.LOCK_EX)
            self._lock = file
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Removes the temporary files that killed processes left, the folder being ours alone.

        Where there is a sweep, others may be at work in it: then only those that are old.
        """
        begun = time.time() - (STALE_SECONDS if (self.root / "sweep").is_dir() else 0.0)
        found = [p for p in self.root.glob("*.tmp") if p.name.startswith(WRITTEN)]
        for folder in OURS:
            for pattern in TEMPORARY:
                found += (self.root / folder).rglob(pattern)
        for path in found:
            with suppress(FileNotFoundError):
                if path.is_symlink() or path.lstat().st_mtime <= begun:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside `locked`: lets other workers in, and takes the folder back on the way out."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _note(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def _read_note(self, stage: str) -> dict[str, Any] | None:
        path = self._note(stage)
        return json.loads(path.read_text()) if path.exists() else None

    def _refuse_changes(self, stage: str, note: dict[str, Any]) -> None:
        wanted = self.relevant(stage)
        # A note written before a key existed: that stage was done under what is now its default.
        done = config.defaults_flat() | config.added(wanted) | note["settings"]
        changed = [k for k, v in wanted.items() if done.get(k, _OTHER) != v]
        changed += [k for k in note["settings"] if k not in wanted]  # parts that were removed
        if changed:
            first = changed[0]
            results = [str(self.root / name) for name in self._stages[stage].leaves]
            raise InputError(
                f"stage {stage} in {self.root} was done with "
                f"{first}={done.get(first)!r}, now it is {wanted.get(first)!r}"
                + (f" (and {len(changed) - 1} more keys changed)" if changed[1:] else "")
                + ": use another --workdir, or do the stage again after removing "
                + " ".join([*results, str(self._note(stage))])
            )

    def begin(self, stage: str) -> bool:
        """Notes that ``stage`` starts; returns True when it is complete already.

        Raises InputError when it was begun under settings that give other results: what is there
        must neither be lost nor be taken for what is asked for now.
        """
        note = self._read_note(stage)
        if note is not None:
            self._refuse_changes(stage, note)
            return note["complete"]
        self._write_note(stage, complete=False)
        return False

    def abandon(self, stage: str) -> None:
        """Drops the note of a stage that was refused before it left any result.

        A wrong setting that is put right must not be held against the run.
        """
        for name in self._stages[stage].leaves:
            path = self.root / name
            if path.is_file() or any(p.is_file() for p in path.rglob("*")):
                return
        self.forget(stage)

    def forget(self, stage: str) -> None:
        """Drops the note of a stage whose results are to be overwritten."""
        self._note(stage).unlink(missing_ok=True)

    def complete(self, stage: str) -> None:
        """Notes that all files of ``stage`` are in place."""
        self._write_note(stage, complete=True)

    def _write_note(self, stage: str, complete: bool) -> None:
        note = {"settings": self.relevant(stage), "complete": complete}
        self.write_json(self._note(stage), note)

    def require(self, stage: str, what: str) -> None:
        """Raises InputError unless ``stage``, which makes ``what``, is complete.

        It must be so under the settings of this run.
        """
        note = self._read_note(stage)
        if note is None or not note["complete"]:
            raise InputError(
                f"{self.root} does not hold {what} yet: run `vbon {stage}` with the same --config "
                "and --workdir first, or `vbon run` for all stages"
            )
        self._refuse_changes(stage, note)

    @classmethod
    def write_json(cls, path: Path, value: Any) -> None:
        """Writes JSON so that the file is whole or not there."""
        cls.write_text(path, json.dumps(value, indent=1))

    @staticmethod
    def write_text(path: Path, text: str) -> None:
        """Writes a text so that the file is whole or not there."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another worker may be writing the same file.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with writing(path):
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
