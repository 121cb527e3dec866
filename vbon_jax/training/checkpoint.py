"""Checkpoints: everything needed to go on, written asynchronously and atomically by orbax."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vbon_jax import exits, processes
from vbon_jax.errors import InputError, space, writing
from vbon_jax.progress import log
from vbon_jax.training import fingerprints, seals

_TIMES = "_CHECKPOINT_METADATA"  # of orbax: when a step was written


class Checkpointer:
    """Saves and restores a train state with JSON metadata; the last ``keep`` stay.

    A save returns once the state is copied to the host, and the writing goes on behind it; on CPU,
    where that copy would take as much memory again, it returns when all is written. A checkpoint
    gets its name only when it is whole, so a crash at any moment leaves the one before.

    The metadata hold fingerprints of the arrays, taken before they are written, and a digest of
    themselves, so that a checkpoint is whole and checkable from the moment it has its name.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory.absolute()
        self._needed: int | None = None  # bytes of the state that was saved last
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                # Orbax reads one file of each step on opening, and of it the times alone.
                broken = list(self.directory.glob(f"*/{_TIMES}"))
                if not broken:
                    raise
                for path in broken:
                    path.unlink()
                log(f"{self.directory}: a file {_TIMES} is damaged ({error}): all of them removed")
                self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts saving ``state`` (a pytree of arrays) and ``metadata`` (JSON) as ``step``.

        The caller may donate ``state`` afterwards. Saving a step twice does nothing.
        Raises InputError when the disk cannot take it.
        """
        if step in self._manager.all_steps():
            return
        self._needed = sum(int(x.nbytes) for x in jax.tree.leaves(state))
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    metadata=ocp.args.JsonSave(seals.sealed(step, state, metadata)),
                ),
            )
        except (OSError, ValueError) as error:  # tensorstore's own errors are ValueErrors
            if exits.of_the_others(error):
                raise
            raise self._disk_error(step, error) from error
        if jax.default_backend() == "cpu":
            # Host arrays are views of device memory here: the write would race with a donation.
            self.wait()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, laid out as ``like``; None where there is none.

        A damaged one, whose bits are not those that were saved, is set aside in a folder beside,
        ``<directory>.damaged``, and the one before is taken; a line says so. `latest_step` is the
        step that was restored. A checkpoint of a version that took no fingerprints is taken as it
        is; a line says so too.

        Args:
          like: a tree of arrays or ShapeDtypeStructs carrying the target shardings, so another
            topology than the one that saved works.

        Raises InputError when the checkpoint does not have the shape of ``like``.
        """
        with _quiet_readers():
            while (step := self.latest_step) is not None:
                try:
                    return self._restored(step, like)
                except seals.Damaged as error:
                    self._set_aside(step, error)
        return None

    def _restored(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        metadata = self._read(step, "metadata", ocp.args.JsonRestore())
        if not isinstance(metadata, dict):
            raise seals.Damaged(f"its metadata are a {type(metadata).__name__}")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        target = ocp.args.StandardRestore(abstract)
        if not seals.is_sealed(metadata):
            log(f"checkpoint {self.directory / str(step)} has no fingerprints: taken unchecked")
            try:
                return self._read(step, "state", target), metadata
            except seals.Damaged as error:  # or of another shape, which nothing tells apart
                raise self._unfit(step, str(error)) from error
        seals.check(step, metadata)
        wanted = fingerprints.described(like)
        if wanted != {path: found[:2] for path, found in metadata["arrays"].items()}:
            paths = [p for p in wanted if metadata["arrays"].get(p, [])[:2] != wanted[p]]
            paths += [p for p in metadata["arrays"] if p not in wanted]
            raise self._unfit(step, f"of another shape at {paths[0]}")
        state = self._read(step, "state", target)
        if fingerprints.of_tree(state) != metadata["arrays"]:
            raise seals.Damaged("its arrays are not those that were saved")
        return state, metadata["given"]

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # of this machine or process, not of the checkpoint
        except Exception as error:  # broken bytes surface as whatever their reader raises
            if exits.of_the_others(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            raise seals.Damaged(
                f"its {item} cannot be read: {type(error).__name__}: {reason}"
            ) from error

    def _unfit(self, step: int, reason: str) -> InputError:
        return InputError(
            f"checkpoint {self.directory / str(step)} cannot be read as this run's state "
            f"({reason}): remove it to go on from the one before, or to begin anew where it is the "
            "only one"
        )

    def _set_aside(self, step: int, reason: Exception) -> None:
        target = processes.by_first(lambda: self._move(step))
        self._manager.reload()
        before = self.latest_step
        log(
            f"checkpoint {self.directory / str(step)} is damaged ({reason}): set aside as "
            f"{target}; "
            + ("beginning anew" if before is None else f"going on from checkpoint {before}")
        )

    def _move(self, step: int) -> str:
        aside = self.directory.with_name(f"{self.directory.name}.damaged")
        aside.mkdir(exist_ok=True)
        target = seals.free_name(aside / str(step))
        os.rename(self.directory / str(step), target)
        return str(target)

    def wait(self) -> None:
        """Returns once every save is on disk; raises InputError if one failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            if exits.of_the_others(error):
                raise
            raise self._disk_error(None, error) from error

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            with suppress(OSError, ValueError):  # a failed write is raised by every later call
                self._manager.close()

    def _disk_error(self, step: int | None, error: Exception) -> InputError:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        what = "a checkpoint" if step is None else f"checkpoint {step}"
        room = space(self.directory, self._needed)
        return InputError(
            f"{what} could not be written to {self.directory} ({reason}; {room}): make room and "
            f"run the same command again; the last good one is {self.latest_step}"
        )


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """Keeps tracebacks of readers that a damaged array left behind from the user's terminal.

    Orbax closes its loop at the first array that cannot be read; the reads of the others then have
    nobody to tell, which Python prints, and which says nothing.
    """
    usual = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            usual(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
