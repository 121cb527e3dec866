"""The one error that means: what the user gave is wrong, not the program. And a full disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class InputError(ValueError):
    """Bad input from the user: the command line shows its text as one line and exits with code 2.

    The text names the thing, its value, and what to do about it.
    """


@contextmanager
def writing(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Says of a disk error inside which file it was, which a failed write itself does not know.

    Args:
      path: the file or directory that is written.
      needed: bytes it will take, where that is known.

    Raises:
      InputError: the operating system refused; names the path, the reason and the space.
    """
    try:
        yield
    except OSError as error:
        raise InputError(disk_line(error, path, needed)) from error


def disk_line(
    error: OSError, path: str | os.PathLike[str] | None, needed: int | None = None
) -> str:
    """One line for an error of the disk.

    Args:
      error: what the operating system said.
      path: the file that was written; None where that is not known.
      needed: bytes it takes, where that is known.

    Returns:
      The path, the reason, the space needed and free, and what to do.
    """
    line = f"{path or 'disk'}: {error.strerror or error}"
    if error.errno not in DISK_FULL:
        return line
    return f"{line} ({space(path or os.curdir, needed)}): make room and run the same command again"


def space(path: str | os.PathLike[str], needed: int | None = None) -> str:
    """Words for the space at ``path``, and what is needed of it: "2.0 MiB needed, 0.1 MiB free"."""
    words = [] if needed is None else [f"{size(needed)} needed"]
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    words.append(f"{size(found.f_bavail * found.f_frsize)} free")
    if found.f_files and not found.f_favail:
        words.append("no file more can be made there")
    return ", ".join(words)


def size(count: int) -> str:
    """A number of bytes in GiB, or MiB below a tenth of one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
