"""The run that faults are tried on: configs/tabular.py made small, in processes of its own."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = (
    "--config.data.train=600",
    "--config.reference.fit.epochs=1",
    "--config.reference.model.layers=1",
    "--config.reference.model.width=16",
    "--config.reference.model.heads=2",
    "--config.prompts.test=4",
    "--config.samples.m=32",
    "--config.sampling.batch_size=32",
    "--config.train.iterations=12",
    "--config.train.batch_size=32",
    "--config.train.minibatch_size=16",
    "--config.train.ppo_epochs=2",
    "--config.train.checkpoint_every=2",
    "--config.evaluate.m=16",
    "--config.evaluate.samples_per_prompt=2",
)
SECONDS = 600.0  # a run that takes longer hangs
# In names of values that tell of time, not of results.
TIMED = ("second",)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
      code: its exit code; that of a kill is negative.
      lines: what it wrote to standard error, without empty lines.
      seconds: how long it ran.
      after: seconds from its last line to its end.
    """

    code: int
    lines: list[str]
    seconds: float
    after: float

    @property
    def last(self) -> str:
        """The line that says how it ended."""
        return self.lines[-1] if self.lines else ""

    @property
    def traceback(self) -> bool:
        """Whether a traceback stands among the lines."""
        return any("Traceback (most recent call last)" in line for line in self.lines)


def command(workdir: Path, *flags: str, stage: str = "run") -> list[str]:
    """The command line of a small run."""
    config = ROOT / "configs" / "tabular.py:ppo"
    return [
        sys.executable, "-m", "vbon_jax", stage, f"--config={config}", f"--workdir={workdir}",
        *SMALL, *flags,
    ]  # fmt: skip


def environment(path: Path | None = None, devices: int = 1) -> dict[str, str]:
    """Of such a process: this tree, CPU devices, and one cache of compiled programs for all.

    Args:
      path: a further folder to import from.
      devices: how many it has.
    """
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path(tempfile.gettempdir()) / "vbon_jax_test_xla"
    )
    paths = [str(p) for p in (ROOT, path, os.environ.get("PYTHONPATH")) if p]
    flags = os.environ.get("XLA_FLAGS", "")  # the last of one name counts
    return dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def together(count: int, workdir: Path, *flags: str, stage: str = "run") -> list[list[str]]:
    """The command lines of a small run of several processes on this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whose = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
    return [
        command(workdir, *flags, *whose, f"--process_id={i}", stage=stage) for i in range(count)
    ]


@contextlib.contextmanager
def all_started(argvs: Sequence[Sequence[str]], path: Path | None = None) -> Iterator[list[Any]]:
    """`started`, of several processes."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(argv, path)) for argv in argvs]


def all_done(argvs: Sequence[Sequence[str]], path: Path | None = None) -> list[Ended]:
    """Runs several processes to their ends."""
    with all_started(argvs, path) as processes:
        return [finished(process) for process in processes]


@contextlib.contextmanager
def started(
    argv: Sequence[str], path: Path | None = None, devices: int = 1
) -> Iterator[subprocess.Popen]:
    """A process, its standard error on a pipe; killed where it still runs on the way out."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as `&` leaves it, for children too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(path, devices), text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def finished(process: subprocess.Popen, timeout: float = SECONDS) -> Ended:
    """Reads to the end of a process; one that hangs is killed (code -9)."""
    began = told = time.monotonic()
    timer = _killer(process, timeout)
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip():
            lines.append(line.rstrip())
            told = time.monotonic()
    code = process.wait()
    timer.cancel()
    ended = time.monotonic()
    return Ended(code, lines, ended - began, ended - told)


def _killer(process: subprocess.Popen, timeout: float) -> threading.Timer:
    timer = threading.Timer(timeout, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def done(
    argv: Sequence[str], timeout: float = SECONDS, path: Path | None = None, devices: int = 1
) -> Ended:
    """Runs a process to its end."""
    with started(argv, path, devices) as process:
        return finished(process, timeout)


def digest_of(workdir: Path) -> dict[str, str]:
    """The results of a run by name, as SHA-256 of what does not tell of time.

    Prompts, samples, the weights of each model, metrics, evaluation.
    """
    found = {}
    for pattern in ("prompts/*.jsonl", "samples/*.jsonl", "*/model.safetensors"):
        for path in sorted(workdir.glob(pattern)):
            found[path.relative_to(workdir).as_posix()] = _sha256(path.read_bytes())
    for name in ("metrics.jsonl", "evaluation_samples.jsonl"):
        if (workdir / name).exists():
            rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
            found[name] = _sha256(json.dumps([_untimed(row) for row in rows]).encode())
    if (workdir / "evaluation.json").exists():
        value = _untimed(json.loads((workdir / "evaluation.json").read_text()))
        found["evaluation.json"] = _sha256(json.dumps(value, sort_keys=True).encode())
    return found


def differing(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Names whose results differ or are on one side alone."""
    return sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if not any(t in k for t in TIMED)}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of words in columns; the first row names them."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in texts
    )
