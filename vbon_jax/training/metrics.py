"""Metrics of a training run: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vbon_jax.errors import InputError
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
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = _whole_lines(path, start_step) if path.exists() else b""
        self._wandb = None if wandb is None else _wandb_run(wandb)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(kept)
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the values of ``step``, finite or not (NaN is written as NaN).

        A value may be a list, one number a policy; the dashboards show its mean.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        means = {name: float(np.mean(value)) for name, value in values.items()}
        for name, value in means.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(means, step=step)

    def close(self) -> None:
        """Closes the files and ends the run on Weights & Biases."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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
