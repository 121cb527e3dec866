"""The run's folder: where each thing lies, and which stage has been done under which settings."""

import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from vbon_jax import config, processes
from vbon_jax.config import Config
from vbon_jax.errors import DISK_FULL, InputError, space, writing
from vbon_jax.progress import log
from vbon_jax.stages import named, notes, results
from vbon_jax.stages.notes import Note
from vbon_jax.training.seals import free_name

# Settings that change how fast a result comes, not what it is.
FREE = (
    "data.tfds_dir", "sampling.batch_size", "train.checkpoint_every", "train.keep", "sweep.at_once",
)  # fmt: skip


# Temporary names of what is written in our folders, and of the files of the workdir itself.
TEMPORARY = ("*.tmp", "*.partial", "*.orbax-checkpoint-tmp*")
OURS = (
    "prompts", "samples", "stages", "tokenizer", "reference", "reward", "evaluator", "policy",
    "checkpoints", "figures", "sweep", "start", "last_iterate", "family",
)  # fmt: skip
WRITTEN = (
    "config", "evaluation", "metrics", "report", "sweep", "tabular", "convergence", "choose",
)  # fmt: skip
STALE_SECONDS = 600.0  # age of a temporary file that no other process is still writing

_OTHER = object()


class Follows(Protocol):
    """What the workdir asks of a stage; see ``stages.base.Stage``."""

    after: tuple[str, ...]
    leaves: tuple[str, ...]
    scratch: tuple[str, ...]
    logs: tuple[str, ...]
    redo: str

    def follows(self, stages: Any) -> tuple[str, ...]:
        """The config keys that its results follow from."""


class Workdir:
    """Paths below one folder, and a note a stage of the settings it was done with."""

    def __init__(self, root: str | os.PathLike[str], settings: Config, stages: Mapping[str, Any]):
        """Nothing is made or read yet; ``stages``: all there are, by name."""
        self.root = Path(root).expanduser().absolute()
        self._flat = config.flatten(config.as_dict(settings))
        self._stages: Mapping[str, Follows] = stages
        self._content: dict[str, dict[str, Any] | None] = {}  # of settings that name files
        self._whole: set[str] = set()  # stages whose results were checked by this process
        self._read: dict[str, str] = {}  # digests of what the stage at work has asked for
        self.tokenizer = self.root / "tokenizer"
        self.reference = self.root / "reference"
        self.reward = self.root / "reward"
        self.evaluator = self.root / "evaluator"
        self.policy = self.root / "policy"
        self.family = self.root / "family"  # policies for every n, of which policy is one
        self.last_iterate = self.root / "last_iterate"  # beside a policy that is an average
        self.start = self.root / "start"  # metrics of what the policy starts from
        self.data = self.root / "data"
        self.evaluation = self.root / "evaluation.json"

    def prompts(self, split: str) -> Path:
        """The prompts of a split."""
        return self.root / "prompts" / f"{split}.jsonl"

    @property
    def train_samples(self) -> Path:
        """The scored reference responses to the training prompts."""
        return self.root / "samples" / "train.jsonl"

    def given(self, tokens: Sequence[int], temperature: float, m: int) -> Path:
        """The reference samples of a prompt of the command line."""
        follows = self.relevant("sample")
        known = self.settled(follows) | self.contents(follows)
        digest = self.digest(known | {"tokens": list(tokens)})
        return self.root / "samples" / f"given_t{temperature:g}_m{m}_{digest}.jsonl"

    @property
    def reward_head(self) -> Path:
        """The head of the rewards' distributions that was fitted on the training samples.

        Its name carries a digest of what these follow from; beside it is a ``.json`` of the same
        name with its calibration.
        """
        follows = self.relevant("sample")
        digest = self.digest(self.settled(follows) | self.contents(follows))
        return self.root / "samples" / f"head_{digest}.npz"

    def held_out(self, role: str, split: str, temperature: float, m: int) -> Path:
        """The reference samples of a split at a temperature: "opponents" or "pool".

        Their name carries a digest of what they follow from, so that samples of another reference,
        reward, evaluator or prompt set are never taken for these.
        """
        follows = self.relevant("sample") | {
            k: v for k, v in self._flat.items() if k.startswith("evaluator.")
        }
        digest = self.digest(self.settled(follows) | self.contents(follows))
        return self.root / "samples" / f"{split}_{role}_t{temperature:g}_m{m}_{digest}.jsonl"

    def date(self) -> datetime.date:
        """The day on which the workdir was begun, for chat templates that write a date.

        It is ``prompts.date`` where that is set. The first call writes it down.
        """
        given = self._flat["prompts.date"]
        if given:
            return datetime.date.fromisoformat(given)
        return datetime.date.fromisoformat(processes.by_first(lambda: self._date().isoformat()))

    def _date(self) -> datetime.date:
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

    def contents(self, follows: Mapping[str, Any]) -> dict[str, str]:
        """The digests of the files, models and modules that settings name, where they name any."""
        files = self._files(follows)
        return {f"{key} sha256": entry["sha256"] for key, entry in files.items()}

    def _files(self, follows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What `named.content` says of each setting that names something; once a process."""
        wanted = [k for k, v in follows.items() if v and named.names_content(k)]
        if any(key not in self._content for key in wanted):
            known = named.known(note.files for note in self._notes())
            for key in wanted:
                if key not in self._content:
                    self._content[key] = named.content(key, follows[key], known)
        return {key: entry for key in wanted if (entry := self._content[key]) is not None}

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

        Of a run of several processes the first holds it for all.

        Raises InputError where it cannot be made or written, or another process holds it.
        """
        with ExitStack() as stack:

            def hold() -> None:
                stack.enter_context(self._locked(wait))

            processes.by_first(hold)
            processes.see_the_same(self.root)
            yield

    @contextmanager
    def _locked(self, wait: bool) -> Iterator[None]:
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
        """Inside `locked`: lets other processes in, and takes the folder back on the way out."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _note(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def _read_note(self, stage: str) -> Note | None:
        return notes.read(self._note(stage))

    def _notes(self) -> Iterator[Note]:
        """The notes that can be read, whatever their stage."""
        for stage in self._stages:
            try:
                note = self._read_note(stage)
            except InputError:  # told when that stage is looked at
                continue
            if note is not None:
                yield note

    def _refuse_changes(self, stage: str, note: Note) -> None:
        """Raises InputError where a stage was done with what gives other results."""
        wanted = self.relevant(stage)
        # A note written before a key existed: that stage was done under what is now its default.
        done = config.defaults_flat() | config.added(wanted) | note.settings
        changed = [k for k, v in wanted.items() if done.get(k, _OTHER) != v]
        changed += [k for k in note.settings if k not in wanted]  # parts that were removed
        if changed:
            first = changed[0]
            raise InputError(
                f"stage {stage} in {self.root} was done with "
                f"{first}={done.get(first)!r}, now it is {wanted.get(first)!r}"
                + (f" (and {len(changed) - 1} more keys changed)" if changed[1:] else "")
                + self._remedy(stage)
            )
        for key, entry in self._files(wanted).items():
            was = note.files.get(key, entry)["sha256"]
            if was != entry["sha256"]:
                raise InputError(
                    f"stage {stage} in {self.root} was done with {key}={wanted[key]!r} of another "
                    f"content (sha256 {was[:8]}.., now {entry['sha256'][:8]}..)"
                    + self._remedy(stage)
                )
        for other, was in note.read.items():
            now = self._read_note(other)
            if now is None or not now.complete or now.results is None or not was:
                continue  # not known, of an old version
            if self._digest(other, now) != was:
                raise InputError(
                    f"stage {stage} in {self.root} was done with other results of stage {other} "
                    "than are there now" + self._remedy(stage)
                )

    def _remedy(self, stage: str) -> str:
        """What to do about a stage that was done otherwise, to be followed to the letter."""

        def follows(name: str) -> bool:
            after = self._stages[name].after
            return stage in after or any(map(follows, after))

        again = [stage, *(x for x, s in self._stages.items() if follows(x) and s.redo != "always")]
        paths = []
        for name in (x for x in again if x == stage or self._note(x).exists()):
            s = self._stages[name]
            paths += [str(self.root / x) for x in (*s.leaves, *s.scratch, *s.logs)]
            paths.append(str(self._note(name)))
        return ": use another --workdir, or do the stage again after removing " + " ".join(paths)

    def _digest(self, stage: str, note: Note) -> str:
        """Of the results in a note, those that other stages read; "" in one of an old version."""
        logs = self._stages[stage].logs
        found = {k: v for k, v in (note.results or {}).items() if k not in logs}
        return results.digest(found) if note.results is not None else ""

    def _changes(self, stage: str, note: Note) -> dict[str, str]:
        """How the results of a complete stage differ from what it left; looked at once."""
        if stage in self._whole or note.results is None:
            return {}
        found = results.changes(self.root, note.results)
        if not found.keys() - set(self._stages[stage].logs):
            self._whole.add(stage)
        return found

    def begin(self, stage: str, again: bool = False) -> bool:
        """Notes that ``stage`` starts; returns True when it is complete already.

        It is not where a result is missing or was changed: a line says so, what is there is set
        aside, and the stage is to be done again.

        Args:
          stage: its name.
          again: it is to be done again, whatever the note says, over what it left.

        Raises InputError when it was begun under settings that give other results: what is there
        must neither be lost nor be taken for what is asked for now.
        """
        self._read = {}
        note = None if again else self._read_note(stage)
        if note is not None:
            self._refuse_changes(stage, note)
            changes = self._changes(stage, note) if note.complete else {}
            for name in [x for x in self._stages[stage].logs if x in changes]:
                log(
                    f"{stage}: {self.root / name} {changes.pop(name)} since; no result follows "
                    "from it (to have it as it was, remove "
                    + " and ".join(str(self.root / x) for x in self._stages[stage].leaves)
                    + f" and run `vbon {stage}`)"
                )
            if note.complete and not changes:
                return True
            for first, how in list(changes.items())[:1]:
                more = f" (and {len(changes) - 1} more files)" if changes.keys() - {first} else ""
                log(f"{stage}: {self.root / first} {how} since{more}: doing the stage again")
            for name in changes:
                self._set_aside(name)
        elif not again:
            for name in self._stages[stage].leaves:
                if any(results.files(self.root / name)):
                    log(f"{stage}: {self.root / name} is there without a note of what it is of")
                    self._set_aside(name, whole=True)
        self._whole.discard(stage)
        self._write_note(stage, complete=False)
        return False

    def _set_aside(self, name: str, whole: bool = False) -> None:
        """Moves a result to ``damaged/``, if it is there and nothing of it can be gone on from.

        Checkpoints and lines of samples tell themselves what of them is whole; ``whole``: even so.
        """
        path = self.root / name
        if not path.exists() or (name.startswith(("checkpoints/", "samples/")) and not whole):
            return
        target = free_name(self.root / "damaged" / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        log(f"{path} is set aside as {target}")

    def abandon(self, stage: str) -> None:
        """Drops the note of a stage that was refused before it left any result.

        A wrong setting that is put right must not be held against the run.
        """
        if not any(any(results.files(self.root / name)) for name in self._stages[stage].leaves):
            self.forget(stage)

    def forget(self, stage: str) -> None:
        """Drops the note of a stage that left no results."""
        self._note(stage).unlink(missing_ok=True)

    def reopen(self, stage: str) -> None:
        """Notes that a complete stage is to go on: what it left is not whole."""
        note = self._read_note(stage)
        if note is not None:
            self._put_note(stage, dataclasses.replace(note, complete=False, results=None))

    def complete(self, stage: str) -> None:
        """Notes that all files of ``stage`` are in place, and their digests."""
        self._write_note(stage, complete=True)
        self._whole.add(stage)

    def _write_note(self, stage: str, complete: bool) -> None:
        wanted, s = self.relevant(stage), self._stages[stage]
        left = results.of(self.root, (*s.leaves, *s.logs)) if complete else None
        if s.redo == "always":  # the files of a sweep are those of many processes
            left = None
        self._put_note(stage, Note(wanted, complete, self._files(wanted), self._read, left))

    def _put_note(self, stage: str, note: Note) -> None:
        self.write_json(self._note(stage), notes.as_json(note))

    def unfinished(self, stage: str) -> bool:
        """Whether ``stage`` was begun under the settings of this run and is not complete."""
        note = self._read_note(stage)
        return note is not None and not note.complete and note.settings == self.relevant(stage)

    def require(self, stage: str, what: str) -> None:
        """Raises InputError unless ``stage``, which makes ``what``, is complete.

        It must be so under the settings of this run, with its results as it left them.
        """
        processes.by_first(lambda: self._require(stage, what))

    def _require(self, stage: str, what: str) -> None:
        note = self._read_note(stage)
        if note is None or not note.complete:
            raise InputError(
                f"{self.root} does not hold {what} yet: run `vbon {stage}` with the same --config "
                "and --workdir first, or `vbon run` for all stages"
            )
        self._refuse_changes(stage, note)
        self._refuse_damage(stage, note)
        self._read[stage] = self._digest(stage, note)

    def refuse_damage(self, stage: str) -> None:
        """Raises InputError where ``stage`` is complete and its results are not as it left them."""

        def look() -> None:
            note = self._read_note(stage)
            if note is not None and note.complete:
                self._refuse_damage(stage, note)

        processes.by_first(look)

    def _refuse_damage(self, stage: str, note: Note) -> None:
        changes = self._changes(stage, note)
        for name in sorted(changes.keys() - set(self._stages[stage].logs)):
            raise InputError(
                f"{self.root / name} {changes[name]} since stage {stage} left it: run `vbon "
                f"{stage}` with the same --config and --workdir, which makes it again, or `vbon "
                "run` for all stages"
            )

    @classmethod
    def write_json(cls, path: Path, value: Any) -> None:
        """Writes JSON so that the file is whole or not there."""
        cls.write_text(path, json.dumps(value, indent=1))

    @staticmethod
    def write_text(path: Path, text: str) -> None:
        """Writes a text so that the file is whole or not there; in the first process alone."""
        if not processes.first():
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another process may be writing the same file.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with writing(path):
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
