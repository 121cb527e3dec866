"""A workdir as a whole run leaves it, with figures that follow theory and a little noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

TEMPERATURES = (0.25, 0.5, 0.75, 1.0)
N = 8.0
# Fraction of BoN's gain that a method keeps at the same KL, and its steering values.
METHODS = {
    "vbon": (0.98, "n", (1, 2, 4, 8, 32, 128)),
    "lower_bound": (0.97, "n", (1, 2, 4, 8, 32, 128)),
    "ppo": (0.93, "beta", (0.02, 0.05, 0.1, 0.2, 0.5, 2.0)),
    "dpo": (0.88, "beta", (0.05, 0.1, 0.3, 0.5, 1.0, 3.0)),
    "bonbon": (0.84, "n", (1, 2, 4, 8, 32, 128)),
    "bond": (0.91, "n", (1, 2, 4, 8, 32, 128)),
    "bon_sft": (0.62, "n", (2, 4, 8, 32, 64, 128)),
}


def bound(n: float) -> float:
    return float(np.log(n) - (n - 1) / n)


def gain(n: float) -> float:
    """About the mean of the largest of n standard normals."""
    return float(1.7 * np.sqrt(np.log(n)) * (1 - 0.1 / n))


def ci(value: float, half: float) -> list[float]:
    return [value - half, value + half]


def sweep_row(method: str, n: float | None, beta: float | None, **changed) -> dict:
    """A row with every key; figures of the reference unless changed."""
    row = {
        "unit": method,
        "method": method,
        "n": n,
        "beta": beta,
        "seed": 0,
        "m": 64,
        "temperature": 1.0,
        "split": "test",
        "study": "front",
        "reward": 0.1,
        "win_rate": 0.5,
        "kl_ref": 0.0,
        "kl_bon": None,
        "evaluator_reward": 0.2,
        "evaluator_win_rate": 0.5,
        "eos_rate": 0.998,
        "length": 19.2,
        "seconds": 41.5,
        "sample_seconds": 63.0,
    } | changed
    halves = {"reward": 0.06, "win_rate": 0.012, "kl_ref": 0.03, "kl_bon": 0.04}
    for key in ("reward", "win_rate", "kl_ref", "kl_bon", "evaluator_reward", "evaluator_win_rate"):
        value = row[key]
        half = halves[key.removeprefix("evaluator_")]
        row.setdefault(f"{key}_ci95", None if value is None else ci(value, half))
    return row


def bon_row(n: float, **changed) -> dict:
    estimate = bound(n) * 0.99
    return sweep_row(
        "bon", float(n), None,
        **{
            "reward": 0.1 + gain(n), "win_rate": n / (n + 1) - 0.002, "kl_ref": estimate,
            "kl_bound": bound(n), "kl_beirami": estimate, "kl_direct": bound(n) * 0.98,
            "kl_direct_ci95": ci(bound(n) * 0.98, 0.02),
            "evaluator_reward": 0.2 + 0.9 * gain(n), "evaluator_win_rate": n / (n + 1) - 0.02,
            "seconds": None,
        } | changed,
    )  # fmt: skip


def policy_row(method: str, value: float, seed: int, **changed) -> dict:
    """A fine-tuned policy: less gain than BoN at the same KL, and noise fixed by its identity."""
    kept, steer, _ = METHODS[method]
    random = np.random.default_rng([seed, *method.encode(), int(1000 * value)])
    n = value if steer == "n" else 1 / value + 1
    if method == "bon_sft":
        spent = bound(n) * random.uniform(1.5, 2.2) + 0.5
    else:
        spent = bound(n) * random.uniform(0.8, 1.15) + random.uniform(0, 0.02)
    reached = np.exp(spent + 1 - np.exp(-spent))  # the n whose bound is about what was spent
    win = 0.5 + (reached / (reached + 1) - 0.5) * kept + random.normal(0, 0.004)
    reward = 0.1 + gain(reached) * kept + random.normal(0, 0.03)
    figures = {
        "seed": seed, "kl_ref": spent, "win_rate": win, "reward": reward, "kl_bon": 0.02 * spent,
        "evaluator_win_rate": win - 0.03, "evaluator_reward": 0.1 + reward * 0.9,
    }  # fmt: skip
    own = {"n": float(value), "beta": None} if steer == "n" else {"n": None, "beta": value}
    return sweep_row(method, own["n"], own["beta"], **figures | changed)


def sweep_rows() -> list[dict]:
    """All three studies: 7 methods x 6 values x 2 seeds, m, and temperature."""
    rows = [sweep_row("reference", None, None, split=split) for split in ("test", "ood")]
    rows += [bon_row(n, split=s) for n in (1, 2, 3, 4, 8, 16, 32, 64, 128) for s in ("test", "ood")]
    for method, (_, _, values) in METHODS.items():
        rows += [
            policy_row(method, value, seed, split=split)
            for value in values for seed in (0, 1) for split in ("test", "ood")
        ]  # fmt: skip
    for m in (4, 8, 16, 32, 64, 128):
        for seed in (0, 1, 2):
            row = policy_row("vbon", N, seed, study="m", m=m, sample_seconds=1.1 * m)
            rows.append(row | {"win_rate": row["win_rate"] - 0.2 / m,
                               "reward": row["reward"] - 1.5 / m})  # fmt: skip
    return rows + _temperature_rows()


def _temperature_rows() -> list[dict]:
    rows = []
    for temperature in TEMPERATURES:
        for split in ("test", "ood"):
            where = {"study": "temperature", "temperature": temperature, "split": split}
            drop = 0.06 * temperature + (0.02 if split == "ood" else 0.0)
            rows.append(sweep_row("reference", None, None, **where))
            rows.append(bon_row(N, **where, evaluator_win_rate=0.95 - 0.8 * drop))
            for method, beta in (
                ("vbon", 0),
                ("ppo", 0.1),
                ("dpo", 0.1),
                ("bonbon", 0),
                ("bond", 0),
            ):
                for seed in (0, 1):
                    row = policy_row(method, beta or N, seed, **where)
                    row["evaluator_win_rate"] += 0.06 - drop
                    row["evaluator_reward"] -= 4 * drop
                    rows.append(row)
    return rows


def convergence() -> dict:
    random = np.random.default_rng(0)
    examples = []
    prompts = ("this movie is terrible , costs $5 or $6", "the second half", "a wonderful film by")
    for kind, prompt, centre in zip(("low", "middle", "high"), prompts, (-2.0, 0.0, 2.0)):
        curves = []
        grid = np.linspace(centre - 2, centre + 2.5, 60)
        for m in (10, 50, 100, 200, 600):
            drawn = np.sort(random.normal(centre, 0.9, m))
            log_f = np.log((np.searchsorted(drawn, grid) + 1) / (m + 1))
            curves.append({"m": m, "rewards": grid.tolist(), "log_f": log_f.tolist()})
        examples.append({"prompt": prompt, "kind": kind, "curves": curves})
    rows = [
        {"m": 5, "rejected": 0.061, "statistic": 0.63, "p_value": 0.02, "mean_statistic": 0.33},
        {"m": 100, "rejected": 0.011, "statistic": 0.17, "p_value": 0.021, "mean_statistic": 0.09},
        {"m": 250, "rejected": 0.0, "statistic": None, "p_value": None, "mean_statistic": 0.05},
    ]  # fmt: skip
    return {
        "m_full": 600, "prompts": 512, "level": 0.05, "temperature": 1.0, "rows": rows,
        "recommended": 250, "why": "With 250 samples no prompt is rejected.", "examples": examples,
    }  # fmt: skip


CONFIG = {
    "seed": 0,
    "data": {"corpus": "reviews", "path": ""},
    "prompts": {"train": 800, "test": 128},
    "tokenizer": {"vocab_size": 2048},
    "reference": {"path": "", "model": {"layers": 3, "width": 128, "heads": 4, "positions": 64}},
    "reward": {
        "path": "",
        "function": "",
        "label": "POSITIVE",
        "model": {"layers": 2, "width": 64, "heads": 4, "positions": 64},
    },
    "sampling": {"temperature": 1.0, "max_new_tokens": 36},
    "samples": {"m": 64, "path": ""},
    "method": {"name": "vbon", "objective": "exact", "n": N, "beta": 1 / 7},
}


def sample_lines() -> list[dict]:
    prompts = ['the film <script>alert(1)</script> & "more"', "a thriller costs $5", "in 1987 ,"]
    return [
        {
            "policy": policy, "temperature": 1.0, "prompt_id": number, "prompt": prompt,
            "response": f" is a {policy} answer </td> of some length ,\nand it goes on .",
            "reward": reward + number / 10,
        }
        for number, prompt in enumerate(prompts)
        for policy, reward in (("bon", 3.0), ("reference", 0.0), ("vbon", 2.5), ("ppo", 2.2))
    ]  # fmt: skip


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metric(step: int) -> dict[str, float]:
    names = ("objective", "kl_ref", "kl_bon", "reward", "response_length", "eos_rate", "entropy",
             "policy_clip_fraction", "value_clip_fraction", "explained_variance",
             "seconds_rollout", "seconds_reward", "seconds_update")  # fmt: skip
    return {"step": step} | dict.fromkeys(names, 0.5 + 0.01 * step)


def evaluation() -> dict:
    rows = []
    for policy, win, kl in (("reference", 0.5, 0.0), ("bon", 0.888, 1.2), ("vbon", 0.875, 1.25)):
        rows.append(
            {
                "policy": policy, "n": 1.0 if policy == "reference" else N, "temperature": 1.0,
                "reward": 2 * win, "reward_ci95": ci(2 * win, 0.05), "win_rate": win,
                "win_rate_ci95": ci(win, 0.01), "kl_ref": kl, "kl_ref_ci95": ci(kl, 0.02),
                "kl_bon": None, "responses_per_second": 1100.0, "tokens_per_second": 21000.0,
            }
        )  # fmt: skip
    return {"rows": rows}


TABULAR = {
    "rows": [
        {
            "method": method, "n": n, "beta": beta, "kl_target": 0.0013 + 0.0002 * seed,
            "kl_bon": 0.0123, "kl_ref": bound(8), "win_rate": 0.8765, "target": target,
        }
        for seed in (0, 1)
        for method, n, beta, target in (
            ("vbon", 8.0, None, "pi_bon"), ("ppo", None, 1 / 7, "pi_ref exp(r/beta)/Z"),
        )
    ]
}  # fmt: skip


class Look(NamedTuple):
    """What the caller of the report knows of a method, and more that the report does not read."""

    name: str
    color: str
    marker: str
    in_front: bool = True
    steps: int = 7


# Okabe and Ito's palette, which color-blind eyes can tell apart, without its yellow (too faint on
# white; a dark red of Paul Tol's stands in).
LOOKS = {
    "vbon": Look("vBoN", "#0072b2", "o"),
    "lower_bound": Look("vBoN, bound L", "#882255", "P", in_front=False),
    "ppo": Look("PPO", "#009e73", "s"),
    "dpo": Look("DPO", "#cc79a7", "^"),
    "bonbon": Look("BoNBoN", "#e69f00", "D"),
    "bond": Look("BOND", "#56b4e9", "v"),
    "bon_sft": Look("BoN-SFT", "#1a1a1a", "X", in_front=False),
}


@pytest.fixture(scope="session")
def looks() -> dict[str, Look]:
    """How each method appears, in the order of the legends."""
    return LOOKS


@pytest.fixture(scope="session")
def sweep() -> list[dict]:
    return sweep_rows()


@pytest.fixture(scope="session")
def fill_workdir(sweep: list[dict]) -> Callable[[Path], Path]:
    """Writes every file that the report reads into a folder."""

    def fill(workdir: Path) -> Path:
        for name, value in (("config", CONFIG), ("convergence", convergence()),
                            ("tabular", TABULAR), ("evaluation", evaluation())):  # fmt: skip
            (workdir / f"{name}.json").write_text(json.dumps(value))
        write_lines(workdir / "sweep.jsonl", sweep)
        write_lines(workdir / "metrics.jsonl", [metric(step) for step in range(1, 41)])
        lines = sample_lines()
        trained = [line for line in lines if line["policy"] in ("vbon", "ppo")]
        write_lines(workdir / "sweep_samples.jsonl", trained)
        own = [line for line in lines if line["policy"] != "ppo"]
        write_lines(workdir / "evaluation_samples.jsonl", own)
        return workdir

    return fill


@pytest.fixture
def full_workdir(tmp_path: Path, fill_workdir: Callable[[Path], Path]) -> Path:
    return fill_workdir(tmp_path)


def _kl_parts(kl_bon: float) -> dict:
    bins = ((0.0, 0.5, 0.02, 0.004), (0.5, 0.75, 0.11, 0.096), (0.75, 0.9, 0.31, 0.33),
            (0.9, 1.0, 0.56, 0.57))  # fmt: skip
    return {
        "kl_bon": kl_bon, "kl_bon_ci95": ci(kl_bon, 0.03), "kl_excess": 0.05,
        "kl_excess_ci95": ci(0.05, 0.02), "kl_lost": kl_bon - 0.05,
        "kl_lost_ci95": ci(kl_bon - 0.05, 0.025),
        "kl_lost_by_quantile": [
            {"from": low, "to": high, "policy": policy, "bon": bon, "lost": (kl_bon - 0.05) / 4,
             "lost_ci95": ci((kl_bon - 0.05) / 4, 0.01)}
            for low, high, policy, bon in bins
        ],
    }  # fmt: skip


@pytest.fixture
def kl_parts() -> Callable[[float], dict]:
    """Makes the columns of ``evaluation.kl_parts`` for a KL to best-of-n of at least 0.05."""
    return _kl_parts
