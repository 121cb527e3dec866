"""Metrics of a training run: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import json
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vbon_jax.errors import InputError, writing
from vbon_jax.progress import log


class MetricsWriter:
    """Writes one JSON object a step to ``metrics.jsonl``, and the same numbers to dashboards."""

    def __init__(self, workdir: Path, start_step: int, wandb: Mapping[str, Any] | None = None):
        """Opens the files at ``start_step``.

        Lines of later steps, from a run that was cut after its last checkpoint, are dropped, so
        that a step stands there once. So are damaged ones; a line says so.

        Args:
          workdir: folder of ``metrics.jsonl`` and ``tensorboard/``.
          start_step: steps done already.
          wandb: arguments of ``wandb.init``; None for no Weights & Biases.

        Raises:
          InputError: ``wandb`` is asked for and not installed, or cannot start.
        """
        path = workdir / "metrics.jsonl"
        kept = _whole_lines(path, start_step) if path.exists() else b""
        self._wandb = None if wandb is None else _wandb_run(wandb)
        temporary = path.with_suffix(".tmp")
        with writing(path):
            temporary.write_bytes(kept)
            temporary.replace(path)
            self._file = path.open("ab", buffering=0)  # what is refused is not tried again
        self._path = path
        self._board = _Board(workdir / "tensorboard", start_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the values of ``step``, finite or not (NaN is written as NaN).

        A value may be a list, one number a policy; the dashboards show its mean.

        Raises:
          InputError: the disk is full, or refuses for another reason; names the file.
        """
        with writing(self._path):
            _append(self._file, (json.dumps({"step": step, **values}) + "\n").encode())
        means = {name: float(np.mean(value)) for name, value in values.items()}
        self._board.write(step, means)
        if self._wandb is not None:
            self._wandb.log(means, step=step)

    def close(self) -> None:
        """Closes the files and ends the run on Weights & Biases."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Board:
    """TensorBoard's file of events, written in the caller's thread.

    tensorboardX's own writer has a thread for it, which a full disk ends; its queue then blocks the
    caller for ever.
    """

    def __init__(self, directory: Path, first_step: int):
        """Begins a file whose steps replace those of earlier files from ``first_step`` on."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._path = directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with writing(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        begins = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=first_step, session_log=begins))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends numbers of a step."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _add(self, event: Any) -> None:
        """Appends a record: its length, its bytes, and a checksum of each."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        with writing(self._path):
            _append(self._file, length + sums[0] + data + sums[1])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _append(file: Any, data: bytes) -> None:
    """Writes all of ``data`` to an unbuffered file, which may take less at a time."""
    while data:
        data = data[file.write(data) :]


def _whole_lines(path: Path, start_step: int) -> bytes:
    """The lines of the steps up to ``start_step``, each in its place."""
    kept, broken, step = [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            found = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = None
        if type(found) is int and found > start_step:
            break
        if type(found) is not int or found <= step or not line.endswith(b"\n"):
            broken += 1
            continue
        kept.append(line)
        step = found
    if broken and len(kept) < start_step:  # more than the end of the last line that a kill tore
        log(f"{path}: {broken} damaged lines dropped; no result follows from them")
    return b"".join(kept)


def _wandb_run(arguments: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "log.wandb=True, but wandb is not installed: pip install 'vbon_jax[wandb]', or set "
            "log.wandb=False"
        ) from error
    try:
        return wandb.init(**arguments)
    except Exception as error:  # wandb raises errors of its own for each way it cannot start
        raise InputError(
            f"log.wandb=True, but Weights & Biases cannot start ({error}): log in with `wandb "
            "login`, set WANDB_MODE=offline, or set log.wandb=False"
        ) from error
