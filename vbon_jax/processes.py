"""One run of several processes: who this one is, and the few things on which they must agree.

Every process runs the same program on the same values of the host, each on its own devices of one
mesh. The first one alone writes the files of the run, which all of them read, and talks to the
user. In a run of one process nothing here does anything.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vbon_jax import exits, progress, signals
from vbon_jax.errors import InputError

T = TypeVar("T")

LOST_SECONDS = 30  # without a sign of life, after which a process counts as lost
CONNECT_SECONDS = 300  # for all processes to come
_alone = False  # whether `by_first` is at work, whose callee must not wait for the others


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Joins the processes of a run, before anything else of JAX.

    Args:
      coordinator: "host:port" of process 0; None, with the other two, where
        ``jax.distributed.initialize`` finds its cluster by itself: Slurm, Open MPI, Cloud TPU, GKE.
      count: of processes.
      index: of this one, from 0.

    Raises:
      InputError: there is no cluster to be found. (Where not all processes come, JAX ends this
        one, with the exit code of a lost process.)
    """
    who = f"--coordinator={coordinator}: process {index} of {count}"
    exits.end_with_the_others(
        f"{who if coordinator else '--distributed: this process'} did not meet the others within "
        f"{CONNECT_SECONDS} s: start all of them, with the address and a free port of process 0"
    )
    try:
        jax.distributed.initialize(
            coordinator, count, index,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=CONNECT_SECONDS, heartbeat_timeout_seconds=LOST_SECONDS,
        )  # fmt: skip
    except ValueError as error:  # what jax says where it knows of no cluster
        raise InputError(
            f"--distributed: JAX finds no cluster ({error}): start it by srun, mpirun or on a TPU "
            "slice, or give --coordinator, --num_processes and --process_id"
        ) from error
    exits.end_with_the_others(exits.LOST_LINE)
    _keep_stdout()
    if not first():
        progress.silence()


def _keep_stdout() -> None:
    """Leaves standard output to Python: Gloo writes to it, which is for results."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = own


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def _together() -> bool:
    return not _alone and count() > 1


def by_first(act: Callable[[], T]) -> T:
    """What ``act`` gives in the first process, where alone it is called, for all of them.

    Nobody goes on before it is done.

    Args:
      act: of the host alone; gives what JSON can say.

    Raises:
      InputError: it did so, in all processes.
    """
    global _alone
    if not _together():
        return act()
    said: list[Any] = []
    if first():
        _alone = True
        try:
            said = ["gave", act()]
        except InputError as error:
            said = ["refused", str(error)]
        finally:
            _alone = False
    how, found = json.loads(_told(json.dumps(said).encode()))
    if how == "refused":
        raise InputError(found)
    return found


def _told(data: bytes) -> bytes:
    """What the first process says, to all."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = np.zeros(1 << max(size - 1, 1).bit_length(), np.uint8)  # few sizes: each is a compile
    if first():
        room[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(room))[:size].tobytes()


def wait() -> None:
    """Returns when every process is here: what the first has written can now be read."""
    if _together():
        multihost_utils.sync_global_devices("vbon")


def most(value: int) -> int:
    """The greatest of what the processes say."""
    if not _together():
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def signal(stop: signals.StopSignal) -> int | None:
    """The signal that came to any of the processes, the same for all of them; None for none."""
    return most(stop.signum or 0) or None


def joined(total: int, score: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Numbers of rows, of which each process computes its share.

    Args:
      total: of rows.
      score: gives float32 [stop - start] of the rows of a slice, which is not empty.

    Returns:
      float32 [total], in all processes.

    Raises:
      InputError: a process's share was refused; the others tell of which.
      Interrupted: a signal came to one whose user's code did not return.
    """
    if not _together():
        return score(slice(0, total))
    each = -(-total // count())
    start = min(jax.process_index() * each, total)
    mine = slice(start, min(start + each, total))
    failure: InputError | signals.Interrupted | None = None
    share = np.zeros(each, np.float32)
    try:
        if mine.stop > mine.start:
            share[: mine.stop - mine.start] = score(mine)
    except (InputError, signals.Interrupted) as error:
        failure = error
    code = {type(None): 0, InputError: -1}.get(type(failure), getattr(failure, "signum", -1))
    codes = np.atleast_1d(multihost_utils.process_allgather(np.int32(code)))
    if failure is not None:
        raise failure
    if signums := [c for c in codes.tolist() if c > 0]:
        raise signals.Interrupted(signums[0])
    if (codes < 0).any():
        bad = int(np.argmax(codes < 0))
        raise InputError(f"process {bad} was refused its share of {total} responses: see its line")
    return np.asarray(multihost_utils.process_allgather(share)).ravel()[:total]


def see_the_same(path: str | os.PathLike[str]) -> None:
    """Raises InputError, in all processes, where not all of them see the files of the first.

    Args:
      path: the run's folder, which is there.
    """
    if not _together():
        return
    mark = os.path.join(path, ".processes")

    def leave() -> str:
        word = os.urandom(8).hex()
        with open(mark, "w") as file:
            file.write(word)
        return word

    word = by_first(leave)
    try:
        with open(mark) as file:
            seen = file.read() == word
    except OSError:
        seen = False
    blind = most(0 if seen else jax.process_index())
    by_first(lambda: os.unlink(mark))
    if blind:
        raise InputError(
            f"--workdir={path}: process {blind} does not see what process 0 writes there: give a "
            "folder that all hosts share, such as NFS or a mounted bucket"
        )


def refuse_apart(mesh: jax.sharding.Mesh) -> None:
    """Raises InputError for a mesh on which a process of the run has no device."""
    idle = set(range(count())) - {d.process_index for d in mesh.devices.flat}
    if idle:
        sizes = dict(mesh.shape)
        raise InputError(
            f"mesh {sizes} takes {mesh.size} of {jax.device_count()} devices and none of process "
            f"{min(idle)}: set mesh.data, mesh.fsdp and mesh.tensor so that their product is "
            f"{jax.device_count()} (one of them may be -1), or start fewer processes"
        )
