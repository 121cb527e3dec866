"""What a training run says of itself: metrics.jsonl and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class MetricsWriter:
    """One JSON object a step in ``metrics.jsonl``, and the same numbers for TensorBoard."""

    def __init__(self, workdir: Path, start_step: int):
        """Opens the files at ``start_step``: lines of later steps, from a run that was cut after
        its last checkpoint, are dropped, so that a step stands there once."""
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [
            line
            for line in (path.read_text().splitlines(keepends=True) if path.exists() else [])
            if line.endswith("\n") and json.loads(line)["step"] <= start_step
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the finite and non-finite values of ``step`` alike (NaN is written as NaN).

        A value may be a list, one number a policy; TensorBoard shows its mean."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(np.mean(value)), step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
