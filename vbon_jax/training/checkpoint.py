"""Checkpoints: everything needed to go on, written asynchronously and atomically by orbax."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vbon_jax.errors import InputError, writing


class Checkpointer:
    """Saves and restores a train state with JSON metadata; the last ``keep`` stay.

    A save returns once the state is copied to the host, and the writing goes on behind it; on CPU,
    where that copy would take as much memory again, it returns when all is written. A checkpoint
    gets its name only when it is whole, so a crash at any moment leaves the one before.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory.absolute()
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True
                ),
            )

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
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
                ),
            )
        except (OSError, ValueError) as error:  # tensorstore's own errors are ValueErrors
            raise self._disk_error(step, error) from error
        if jax.default_backend() == "cpu":
            # Host arrays are views of device memory here: the write would race with a donation.
            self.wait()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint, laid out as ``like``; None where there is none.

        Args:
          like: a tree of arrays or ShapeDtypeStructs carrying the target shardings, so another
            topology than the one that saved works.

        Raises InputError when the checkpoint does not have the shape of ``like``.
        """
        step = self.latest_step
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), metadata=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"checkpoint {self.directory / str(step)} cannot be read as this run's state "
                f"({error}): remove it to go on from the one before"
            ) from error
        return restored.state, restored.metadata

    def wait(self) -> None:
        """Returns once every save is on disk; raises InputError if one failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._disk_error(None, error) from error

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            with suppress(OSError, ValueError):  # a failed write is raised by every later call
                self._manager.close()

    def _disk_error(self, step: int | None, error: Exception) -> InputError:
        free = shutil.disk_usage(self.directory).free / 2**30
        reason = str(error).strip().splitlines()[0][:200]
        what = "a checkpoint" if step is None else f"checkpoint {step}"
        return InputError(
            f"{what} could not be written to {self.directory} ({reason}; {free:.1f} GiB free): "
            f"make room and run the same command again; the last good one is {self.latest_step}"
        )
