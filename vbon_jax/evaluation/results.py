"""What the stages left in the workdir, read back: metrics, evaluation rows and samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vbon_jax.data import jsonl
from vbon_jax.errors import InputError


def display_name(policy: str) -> str:
    """The name a reader sees: "BoN" for "bon", any other as it stands."""
    return "BoN" if policy == "bon" else policy


def _made_by(path: Path, stage: str) -> Path:
    if not path.exists():
        raise InputError(f"file {path} does not exist; `vbon {stage}` makes it")
    return path


def read_metrics(workdir: Path) -> dict[str, np.ndarray]:
    """Columns of ``metrics.jsonl``: float64 arrays [steps], NaN where a step has no number.

    Raises InputError: the file is missing or has no line, or a line is not JSON.
    """
    path = _made_by(Path(workdir) / "metrics.jsonl", "train")
    steps = [record for _, record in jsonl.read(path)]
    if not steps:
        raise InputError(f"file {path} has no training step; run `vbon train`")
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: np.array([_number(step.get(name)) for step in steps]) for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def read_evaluation(workdir: Path) -> dict[str, Any]:
    """``evaluation.json`` as it stands.

    Raises InputError: the file is missing, is not JSON, or has no "rows".
    """
    path = _made_by(Path(workdir) / "evaluation.json", "evaluate")
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"file {path} is not JSON ({error}); run `vbon evaluate` again") from error
    if not isinstance(evaluation, dict) or not evaluation.get("rows"):
        raise InputError(f'file {path} has no "rows"; run `vbon evaluate` again')
    return evaluation


def read_samples(workdir: Path) -> list[dict[str, Any]]:
    """The lines of ``evaluation_samples.jsonl``.

    Raises InputError: the file is missing or has no line, a line lacks a key, or a reward is not a
    finite number.
    """
    path = _made_by(Path(workdir) / "evaluation_samples.jsonl", "evaluate")
    samples = []
    for where, record in jsonl.read(path):
        for key in ("policy", "temperature", "prompt_id", "prompt", "response", "reward"):
            jsonl.field(record, key, where)
        reward = record["reward"]
        if not isinstance(reward, int | float) or not np.isfinite(reward):
            raise InputError(f"{where}: reward {reward!r} is no finite number; score it again")
        samples.append(record)
    if not samples:
        raise InputError(f"file {path} has no sample; run `vbon evaluate` again")
    return samples


def run_n(rows: Sequence[dict[str, Any]]) -> float:
    """The n of best-of-n that a run aimed at: that of its "bon" row, else of its policy's."""
    for wanted in (lambda name: name == "bon", lambda name: name != "reference"):
        for row in rows:
            if wanted(row["policy"]):
                return float(row["n"])
    raise InputError("evaluation.json has rows of the reference only: no n to draw the bound for")
