"""Metrics of a training run: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vbon_jax.errors import InputError


class MetricsWriter:
    """Writes one JSON object a step to ``metrics.jsonl``, and the same numbers to dashboards."""

    def __init__(self, workdir: Path, start_step: int, wandb: Mapping[str, Any] | None = None):
        """Opens the files at ``start_step``.

        Lines of later steps, from a run that was cut after its last checkpoint, are dropped, so
        that a step stands there once.

        Args:
          workdir: folder of ``metrics.jsonl`` and ``tensorboard/``.
          start_step: steps done already.
          wandb: arguments of ``wandb.init``; None for no Weights & Biases.

        Raises:
          InputError: ``wandb`` is asked for and not installed, or cannot start.
        """
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [
            line
            for line in (path.read_text().splitlines(keepends=True) if path.exists() else [])
            if line.endswith("\n") and json.loads(line)["step"] <= start_step
        ]
        self._wandb = None if wandb is None else _wandb_run(wandb)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
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
