"""Work shared by processes and hosts through a common folder: each piece has one holder at a time.

A piece is a folder. Its state is the record in the file `claim.<generation>` of highest generation:
held, released or done. To claim a free piece, take one over from a dead worker, release or finish
one is always to create the file of the next generation, whole and exclusively (a hard link, atomic
on NFS too), so of several who try one wins, and who was overtaken can no longer finish. A record
never changes; its holder touches the file as a heartbeat.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from vbon_jax.errors import InputError

_BEATS = 5  # heartbeats in the time after which a holder that gives none counts as dead


class Claim:
    """A piece of work held, as `try_claim` makes it: enter it, and `finish` it with its results.

    On the way out of the context a piece that was not finished is released, and another worker may
    claim it at once. A claim that was taken over (this process was thought dead) is left alone.
    """

    def __init__(self, folder: Path, generation: int, stale_after: float):
        self.folder = folder
        self.generation = generation
        self._interval = stale_after / _BEATS
        self._finished = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {folder}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._finished:
            with contextlib.suppress(OSError):  # a full disk: others wait until it is stale
                _publish(self.folder, self.generation + 1, "released")

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            with contextlib.suppress(OSError):  # a server that is away for a moment
                if not self.held():
                    return
                os.utime(self.folder / f"claim.{self.generation}")

    def held(self) -> bool:
        """Whether nobody has taken the piece over, and it is neither finished nor released.

        A worker that lost its claim must stop and publish nothing. On NFS the answer may lag behind
        by the client's caching of directories; that of `finish` does not.

        Raises OSError where the folder cannot be read.
        """
        return _highest(self.folder) == self.generation

    def finish(self) -> bool:
        """Marks the piece done, if it is still held; call it when its results are on disk.

        Returns True where it is done now, False where the claim was lost: then the piece is another
        worker's, and the results of this one do not count.

        Raises OSError where the folder cannot be written.
        """
        self._finished = self._finished or _publish(self.folder, self.generation + 1, "done")
        return self._finished


def try_claim(folder: str | os.PathLike[str], stale_after: float) -> Claim | None:
    """Claims the piece of work that lies in ``folder``, which is made where it is missing.

    A piece is free when nobody claimed it, or it was released, or its holder is dead: a process of
    this machine that is gone, or one anywhere without a heartbeat for ``stale_after`` seconds by
    the clock of the folder's file system, as those of hosts may disagree.

    Args:
      folder: one piece; other files in it are left alone.
      stale_after: seconds > 0, the same for all workers; the longest a live worker may be held up.

    Returns:
      The claim, to be entered soon; None where the piece is done or another one holds it.

    Raises:
      InputError: stale_after is not positive, or the folder cannot be made, read or written.
    """
    if not stale_after > 0:
        raise InputError(f"stale_after={stale_after!r} seconds: give a number above 0")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        generation = _highest(folder)
        if generation and not _is_free(folder, generation, stale_after):
            return None
        won = _publish(folder, generation + 1, "held")
    except OSError as error:
        raise InputError(
            f"{folder}: work cannot be claimed there ({error.strerror}); give a folder that can be "
            "written and whose file system has hard links"
        ) from error
    return Claim(folder, generation + 1, stale_after) if won else None


def done(folder: str | os.PathLike[str]) -> bool:
    """Whether the piece of work that lies in ``folder`` was finished."""
    folder = Path(folder)
    generation = _highest(folder) if folder.is_dir() else 0
    return generation > 0 and _read(folder, generation)[0]["state"] == "done"


def _highest(folder: Path) -> int:
    """The highest generation, 0 if none; if the listing lags, the next one cannot be made."""
    found = (re.fullmatch(r"claim\.(\d+)", name) for name in os.listdir(folder))
    return max((int(match[1]) for match in found if match), default=0)


def _publish(folder: Path, generation: int, state: str) -> bool:
    """Makes the file of a generation; returns False where another one made it first."""
    record = {
        "state": state,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),  # for people: no clock is compared
    }
    draft = folder / f".claim-{uuid.uuid4().hex}"
    try:
        with draft.open("x") as file:
            file.write(json.dumps(record))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, folder / f"claim.{generation}")
        return True
    except FileExistsError:
        # An NFS server whose reply was lost is asked again, and then finds what it made itself.
        return draft.stat().st_nlink == 2
    finally:
        draft.unlink(missing_ok=True)


def _read(folder: Path, generation: int) -> tuple[dict[str, Any], float]:
    """The record of a generation, and its last heartbeat in seconds of the file system's clock."""
    with (folder / f"claim.{generation}").open() as file:  # to open it makes NFS look at the server
        text, beat = file.read(), os.fstat(file.fileno()).st_mtime
    try:
        return json.loads(text), beat
    except json.JSONDecodeError:  # cut short by a crash of the machine: the heartbeat decides
        return {"state": "held", "machine": "", "pid": 0}, beat


def _is_free(folder: Path, generation: int, stale_after: float) -> bool:
    record, beat = _read(folder, generation)
    if record["state"] != "held":
        return record["state"] == "released"
    if record["machine"] and record["machine"] == _machine() and not _is_alive(record["pid"]):
        return True
    return _now(folder) - beat > stale_after


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system: what a file touched now is given."""
    probe = folder / f".claim-{uuid.uuid4().hex}"
    try:
        probe.touch(exist_ok=False)
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """What a process id belongs to: a boot of a kernel and, in it, a container. "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only heartbeats count
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or hidden: the heartbeat will tell
        return True
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # killed, but not yet waited for
