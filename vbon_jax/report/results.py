"""What the stages left in the workdir, read back: metrics, evaluation rows and samples."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vbon_jax.bon import theory
from vbon_jax.data import jsonl
from vbon_jax.errors import InputError
from vbon_jax.report.style import Looks


class Results(NamedTuple):
    """What a workdir holds; None, or an empty list, is what was not run.

    Attributes:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.
        config: The content of ``config.json``.
        evaluation: The content of ``evaluation.json``.
        sweep: The rows of ``sweep.jsonl``.
        convergence: The content of ``convergence.json``.
        tabular: The rows of ``tabular.json``.
        choose: The content of ``choose.json``.
    """

    workdir: Path
    looks: Looks
    config: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    sweep: list[dict[str, Any]]
    convergence: dict[str, Any] | None
    tabular: list[dict[str, Any]] | None
    choose: dict[str, Any] | None

    @property
    def n(self) -> float | None:
        """The n of best-of-n that the run aims at; None where it is not known, or is any."""
        if self.config is not None and "n" in self.config["method"]:
            n = self.config["method"]["n"]
            return None if isinstance(n, list) else float(n)
        return run_n(self.evaluation["rows"]) if self.evaluation is not None else None


def read(workdir: Path, looks: Looks) -> Results:
    """Reads the result files that are in a workdir.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The content of the files.

    Raises:
        InputError: The workdir is missing, or a file in it is at fault.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: no such folder; `vbon run` makes it")

    def there(name: str, reader: Callable[[Path], Any]) -> Any:
        return reader(workdir) if (workdir / name).exists() else None

    return Results(
        workdir=workdir,
        looks=looks,
        config=there("config.json", read_config),
        evaluation=there("evaluation.json", read_evaluation),
        sweep=there("sweep.jsonl", read_sweep) or [],
        convergence=there("convergence.json", read_convergence),
        tabular=there("tabular.json", read_tabular),
        choose=there("choose.json", read_choose),
    )


def display_name(policy: str) -> str:
    """Returns the name of a policy where no looks are at hand.

    Args:
        policy: The policy's label in the result files.

    Returns:
        "BoN" for "bon", any other label as it stands.
    """
    return "BoN" if policy == "bon" else policy


def policies_in_order(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the policies of some samples: the reference first, best-of-n last.

    Args:
        samples: Scored responses, as `read_samples` returns them.

    Returns:
        Each policy once, those between in the order of the samples.
    """
    names = dict.fromkeys(sample["policy"] for sample in samples)
    return sorted(names, key=lambda name: {"reference": 0, "bon": 2}.get(name, 1))


# --- A run --------------------------------------------------------------------------------------


def _made_by(path: Path, stage: str) -> Path:
    if not path.exists():
        raise InputError(f"file {path} does not exist; `vbon {stage}` makes it")
    return path


def read_metrics(workdir: Path) -> dict[str, np.ndarray]:
    """Reads ``metrics.jsonl``.

    Args:
        workdir: The folder of the run.

    Returns:
        The columns by name: float64 arrays [steps], NaN where a step has no number.

    Raises:
        InputError: The file is missing or has no line, or a line is not JSON.
    """
    path = _made_by(Path(workdir) / "metrics.jsonl", "train")
    steps = [record for _, record in jsonl.read(path)]
    if not steps:
        raise InputError(f"file {path} has no training step; run `vbon train`")
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: np.array([_number(step.get(name)) for step in steps]) for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _read_object(path: Path, stage: str, key: str) -> dict[str, Any]:
    """Reads the JSON object of a file, in which the value of ``key`` must not be empty."""
    path = _made_by(path, stage)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"file {path} is not JSON ({error}); run `vbon {stage}` again") from error
    if not isinstance(value, dict) or not value.get(key):
        raise InputError(f'file {path} has no "{key}"; run `vbon {stage}` again')
    found = value[key]
    rows = isinstance(found, list) and all(isinstance(row, dict) for row in found)
    if not (rows if key == "rows" else isinstance(found, dict)):
        raise InputError(f'file {path}: "{key}" is damaged; run `vbon {stage}` again')
    return value


def read_evaluation(workdir: Path) -> dict[str, Any]:
    """Reads ``evaluation.json``.

    Args:
        workdir: The folder of the run.

    Returns:
        The content of the file.

    Raises:
        InputError: The file is missing, is not JSON, or has no "rows".
    """
    path = Path(workdir) / "evaluation.json"
    evaluation = _read_object(path, "evaluate", "rows")
    for row in evaluation["rows"]:
        if not isinstance(row.get("policy"), str):
            raise InputError(f"file {path}: a row has no policy; run `vbon evaluate` again")
    return evaluation


def read_config(workdir: Path) -> dict[str, Any]:
    """Reads ``config.json``, the settings of the run.

    Args:
        workdir: The folder of the run.

    Returns:
        The content of the file.

    Raises:
        InputError: The file is missing, is not JSON, or has no "method".
    """
    return _read_object(Path(workdir) / "config.json", "run", "method")


def read_convergence(workdir: Path) -> dict[str, Any]:
    """Reads ``convergence.json``: Table 1 and the curves of Figure 3 of the paper.

    Args:
        workdir: The folder of the run.

    Returns:
        The content of the file.

    Raises:
        InputError: The file is missing or not JSON, or a key of it or of its rows is missing.
    """
    return _read_rows(
        workdir,
        "convergence",
        ("m_full", "prompts", "level", "temperature", "recommended", "why", "examples"),
        ("m", "rejected", "statistic", "p_value", "mean_statistic"),
    )


def read_choose(workdir: Path) -> dict[str, Any]:
    """Reads ``choose.json``: which n of best-of-n the evaluator trusts.

    Args:
        workdir: The folder of the run.

    Returns:
        The content of the file.

    Raises:
        InputError: The file is missing or not JSON, or a key of it or of its rows is missing.
    """
    return _read_rows(
        workdir,
        "choose",
        (
            "temperature", "prompts", "n_max", "peak", "recommended", "over_optimised_from",
            "over_optimised_to", "why",
        ),
        (
            "family", "n", "rate", "temperature", "kl_ref", "below_peak", "reward", "win_rate",
            "evaluator_reward", "evaluator_reward_band", "evaluator_win_rate",
            "evaluator_win_rate_band",
        ),
    )  # fmt: skip


def _read_rows(
    workdir: Path, stage: str, keys: Sequence[str], row_keys: Sequence[str]
) -> dict[str, Any]:
    """Reads the file of a stage that has these keys, and rows that have those."""
    path = Path(workdir) / f"{stage}.json"
    found = _read_object(path, stage, "rows")
    for key in keys:
        jsonl.field(found, key, str(path))
    for at, row in enumerate(found["rows"]):
        for key in row_keys:
            jsonl.field(row, key, f"row {at} of {path}")
    return found


def read_tabular(workdir: Path) -> list[dict[str, Any]]:
    """Reads ``tabular.json``: exact results of each method where all responses can be enumerated.

    Args:
        workdir: The folder of the run.

    Returns:
        The rows of the file.

    Raises:
        InputError: The file is missing or not JSON, or a row lacks a key.
    """
    path = Path(workdir) / "tabular.json"
    rows = _read_object(path, "sweep", "rows")["rows"]
    for number, row in enumerate(rows):
        for key in ("method", "n", "beta", "kl_target", "kl_bon", "kl_ref", "win_rate", "target"):
            jsonl.field(row, key, f"row {number} of {path}")
    return rows


def read_samples(
    workdir: Path, name: str = "evaluation_samples.jsonl", stage: str = "evaluate"
) -> list[dict[str, Any]]:
    """Reads ``evaluation_samples.jsonl``, or a file of the same layout.

    Args:
        workdir: The folder of the run.
        name: The file's name in the workdir.
        stage: The stage that writes the file, for the messages.

    Returns:
        The scored responses, a dict for each line.

    Raises:
        InputError: The file is missing or has no line, a line lacks a key, or a reward is not a
            finite number.
    """
    path = _made_by(Path(workdir) / name, stage)
    samples = []
    for where, record in jsonl.read(path):
        for key in ("policy", "temperature", "prompt_id", "prompt", "response", "reward"):
            jsonl.field(record, key, where)
        reward = record["reward"]
        if not isinstance(reward, int | float) or not np.isfinite(reward):
            raise InputError(f"{where}: reward {reward!r} is no finite number; score it again")
        samples.append(record)
    if not samples:
        raise InputError(f"file {path} has no sample; run `vbon {stage}` again")
    return samples


def run_n(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the n of best-of-n that a run aimed at.

    Args:
        rows: The rows of ``evaluation.json``.

    Returns:
        The n of the first row of best-of-n, or else of the first that is not the reference's.

    Raises:
        InputError: All rows are the reference's.
    """
    for wanted in (lambda name: name == "bon", lambda name: name != "reference"):
        for row in rows:
            if wanted(row["policy"]):
                return float(row["n"])
    raise InputError("evaluation.json has rows of the reference only: no n to draw the bound for")


# --- The sweep ---------------------------------------------------------------------------------

_NUMBERS = ("seed", "temperature", "reward", "win_rate", "kl_ref")
_MAY_BE_NULL = (
    "n",
    "beta",
    "m",
    "kl_bon",
    "evaluator_reward",
    "evaluator_win_rate",
    "eos_rate",
    "length",
    "seconds",
    "sample_seconds",
)
_BON_KL = ("kl_bound", "kl_beirami", "kl_direct")  # of BoN in the study "front"
_INTERVALS = ("reward", "win_rate", "kl_ref", "kl_bon", "evaluator_reward", "evaluator_win_rate")


def read_sweep(workdir: Path) -> list[dict[str, Any]]:
    """Reads ``sweep.jsonl``.

    Args:
        workdir: The folder of the run.

    Returns:
        The rows, one for each member of the sweep, temperature and split.

    Raises:
        InputError: The file is missing or has no row, or a row lacks a key, or has something else
            than a finite number (or null, where that means "not measured") as a measurement.
    """
    path = _made_by(Path(workdir) / "sweep.jsonl", "sweep")
    rows = [_sweep_row(record, where) for where, record in jsonl.read(path)]
    if not rows:
        raise InputError(f"file {path} has no row; run `vbon sweep`")
    return rows


def _sweep_row(record: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("method", "split", "study"):
        jsonl.text_field(record, key, where)
    bon = record["method"] == "bon"
    needed = (*_NUMBERS, "n") if bon else _NUMBERS
    others = (*_MAY_BE_NULL, *(_BON_KL if bon and record["study"] == "front" else ()))
    for key in (*needed, *others):
        value = jsonl.field(record, key, where)
        if value is None and key not in needed:
            continue
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise InputError(f"{where}: {key} is {value!r}, not a finite number; delete the line "
                             "and run `vbon sweep` again")  # fmt: skip
    for key in _INTERVALS:
        jsonl.field(record, f"{key}_ci95", where)
    return record


def chosen(rows: Sequence[dict[str, Any]], **where: Any) -> list[dict[str, Any]]:
    """Selects rows by their values: ``chosen(rows, study="front", split="test")``.

    Args:
        rows: Rows that have every key of ``where``.
        **where: The value of each key.

    Returns:
        The rows that have all of these values, in order.
    """
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def matched(rows: Sequence[dict[str, Any]], n: float) -> dict[str, list[dict[str, Any]]]:
    """Returns the setting of each method that is nearest to best-of-n.

    That is the setting of the nearest n on the scale of log n. A method steered by beta has no n,
    and what a beta does depends on the scale of the reward: for it, the setting whose KL to the
    reference, mean over its seeds, is nearest to best-of-n's bound log n - (n-1)/n.

    Args:
        rows: Rows of one study, split and temperature.
        n: The n of best-of-n.

    Returns:
        The rows of the setting, one for each seed, by method.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        setting = (row["method"], row["n"], row["beta"], row["m"])
        groups.setdefault(setting, []).append(row)
    bound = float(theory.kl_upper_bound(n))
    nearest: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    for (method, own_n, *_), group in groups.items():
        if own_n is not None:
            distance = abs(float(np.log(own_n) - np.log(n)))
        else:
            distance = abs(float(np.mean([row["kl_ref"] for row in group])) - bound)
        if method not in nearest or distance < nearest[method][0]:
            nearest[method] = (distance, group)
    return {method: group for method, (_, group) in nearest.items()}


class Spread(NamedTuple):
    """Mean and standard deviation over seeds.

    Attributes:
        mean: The mean.
        sd: The standard deviation, divided by seeds - 1; NaN for a single seed.
        seeds: The number of values.
    """

    mean: float
    sd: float
    seeds: int


def over_seeds(rows: Sequence[dict[str, Any]], key: str) -> Spread | None:
    """Returns the mean and standard deviation of a column over rows.

    Args:
        rows: Rows that have the key, one for each seed.
        key: The column; null values are left out.

    Returns:
        The mean and standard deviation; None where no row has a number.
    """
    values = np.array([row[key] for row in rows if row[key] is not None], dtype=float)
    if not len(values):
        return None
    sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return Spread(float(values.mean()), sd, len(values))
