"""Fills the disk under `vbon run`, makes room, and goes on.

    python -m tests.faults.disk --sizes=12 --inodes=3

The small run of `tests.faults.run` is started on a tmpfs of several sizes, from nearly nothing to
nearly enough, and of several numbers of inodes. It must end with exit code 2, within 10 seconds of
its line, which must be the last, and without a traceback. Then the tmpfs is made larger, the same
command must complete, and its results must equal those of an undisturbed run. Mounting needs root
on Linux; where it is not allowed, this is said and nothing is tried.

Options: --sizes and --inodes, how many of each; --stage (default: run).
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults import run

SECONDS = 10.0  # from the line to the end


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory, mounted on ``folder``.

    Raises:
      PermissionError: mounting is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise PermissionError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def enlarge(folder: Path) -> None:
    """Gives the tmpfs on ``folder`` all the room a run may want."""
    subprocess.run(["mount", "-o", "remount,size=512m,nr_inodes=100000", folder], check=True)


def faults_of(ended: run.Ended) -> list[str]:
    """What is wrong with how a process on a full disk ended."""
    if ended.code == 0:
        return []  # there was room enough
    wrong = [] if ended.code == 2 else [f"code {ended.code}"]
    wrong += ["traceback"] if ended.traceback else []
    wrong += [] if ended.last.startswith("vbon: ") else ["its line is not the last"]
    return wrong + (["late"] if ended.after > SECONDS else [])


def filled(folder: Path, options: str, wanted: dict[str, str], stage: str) -> tuple[str, ...]:
    """Runs on a small tmpfs, enlarges it and runs again: a row of the table."""
    with tmpfs(folder, options):
        workdir = folder / "run"
        ended = run.done(run.command(workdir, stage=stage), timeout=180.0)
        enlarge(folder)
        again = run.done(run.command(workdir, stage=stage))
        differing = run.differing(run.digest_of(workdir), wanted)
    wrong = faults_of(ended) + ([f"then {again.code}: {again.last}"] if again.code else [])
    wrong += ["other results: " + " ".join(differing)] if differing else []
    last = ended.last.replace(str(folder), "")[:110]
    return (
        options, str(ended.code), f"{ended.after:.1f}", str(again.code), str(not differing),
        "; ".join(wrong) or "-", last,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints a row a size; returns the number of sizes that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--inodes", type=int, default=3)
    parser.add_argument("--stage", default="run")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults-disk-"))
    with tmpfs(folder / "whole", "size=512m"):
        workdir = folder / "whole" / "run"
        whole = run.done(run.command(workdir, stage=options.stage))
        assert whole.code == 0, whole.lines
        wanted = run.digest_of(workdir)
        files = list(workdir.rglob("*"))
        pages = sum(4096 * -(-p.stat().st_size // 4096) for p in files if p.is_file())
    tried = [f"size={max(4, int(pages * (i + 0.5) / options.sizes) // 1024)}k"
             for i in range(options.sizes)]  # fmt: skip
    tried += [f"size=512m,nr_inodes={max(4, int(len(files) * (i + 0.5) / options.inodes))}"
              for i in range(options.inodes)]  # fmt: skip
    rows = [("tmpfs", "exit", "line to end", "then", "equal", "wrong", "last line")]
    for at, mounted in enumerate(tried):
        rows.append(filled(folder / str(at), mounted, wanted, options.stage))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    bad = sum(row[5] != "-" for row in rows[1:])
    print(run.table(rows))
    print(f"{len(tried)} disks, {bad} wrong; a run leaves {pages / 2**20:.1f} MiB")
    return bad


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except PermissionError as error:
        sys.exit(f"disk: {error}")
