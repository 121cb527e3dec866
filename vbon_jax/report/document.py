"""The report: everything a run found on one self-contained page, ``report.html``.

It reads what the stages left in the workdir and says of everything else that it was not run. The
page holds its figures and styles, and refers to nothing outside itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vbon_jax.errors import InputError
from vbon_jax.report import figures, front_figures, page, sweep_figures
from vbon_jax.report import report_tables as tables
from vbon_jax.report.findings import findings, run_sentence, share_rows
from vbon_jax.report.results import (
    chosen,
    read_config,
    read_convergence,
    read_evaluation,
    read_metrics,
    read_samples,
    read_sweep,
    read_tabular,
    run_n,
)
from vbon_jax.report.style import method_name

COMMAND = "vbon {} --config=CONFIG --workdir=DIR"
PROMPTS_SHOWN = 6


class Results(NamedTuple):
    """What the workdir holds; None is what was not run."""

    workdir: Path
    config: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    sweep: list[dict[str, Any]]
    convergence: dict[str, Any] | None
    tabular: list[dict[str, Any]] | None

    @property
    def n(self) -> float | None:
        """The n of best-of-n that the run aims at."""
        if self.config is not None and "n" in self.config["method"]:
            return float(self.config["method"]["n"])
        return run_n(self.evaluation["rows"]) if self.evaluation is not None else None


def read(workdir: Path) -> Results:
    """Reads the files of a workdir that are there.

    Raises InputError: the workdir is missing, or a file in it is at fault.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: no such folder; `vbon run` makes it")

    def there(name: str, reader: Callable[[Path], Any]) -> Any:
        return reader(workdir) if (workdir / name).exists() else None

    return Results(
        workdir=workdir,
        config=there("config.json", read_config),
        evaluation=there("evaluation.json", read_evaluation),
        sweep=there("sweep.jsonl", read_sweep) or [],
        convergence=there("convergence.json", read_convergence),
        tabular=there("tabular.json", read_tabular),
    )


def write(workdir: Path) -> Path:
    """Writes ``report.html``, and the figures it holds to ``figures/``.

    Returns:
      The page's path.

    Raises InputError: the workdir is missing, or a file in it is at fault.
    """
    results = read(workdir)
    sections = [
        _findings(results),
        _results(results),
        _front(results, "front", "Win rate and reward against KL (Figure 2)"),
        _convergence(results),
        _sample_size(results),
        _temperature(results),
        _front(results, "bound", "Exact objective against its lower bound (Figure 6)"),
        _front(results, "sft", "With maximum likelihood on BoN's winners (Figure 7)"),
        _training(results),
        _bon_kl(results),
        _tabular(results),
        _responses(results),
        _config(results),
    ]
    title = f"Best-of-n methods compared: {results.workdir.absolute().name}"
    text = page.render(title, page.paragraph(description(results)), sections)
    path = results.workdir / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)  # the page is whole, or as it was before
    return path


def _not_run(anchor: str, title: str, why: str, stage: str) -> page.Section:
    return page.Section(anchor, title, page.not_run(why, COMMAND.format(stage)), run=False)


# --- What this run is ---------------------------------------------------------------------------


def description(results: Results) -> str:
    """One paragraph: the task, the models, n and m, and the digest of the config."""
    config = results.config
    if config is None:
        return "The settings of this run are not known: config.json is not in its folder."

    def look(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def model(group: str) -> str:
        if look(f"{group}.path"):
            return f"the model at {look(f'{group}.path')}"
        if look(f"{group}.function"):
            return f"the function {look(f'{group}.function')}"
        size = look(f"{group}.model") or {}
        return f"a model ({', '.join(f'{key} {value}' for key, value in size.items())})"

    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    n, m = results.n, look("samples.m")
    parts = [
        f"Task: {look('data.path') or look('data.corpus')}.",
        f"Reference: {model('reference')}; reward: {model('reward')}.",
        f"The run's own method is {method_name(look('method.name'))}"
        + (f" with n = {n:g}" if n is not None else "")
        + (f" and m = {m} reference samples a prompt" if m is not None else "")
        + f", sampled at temperature {look('sampling.temperature')}.",
        f"Seed {look('seed')}; digest of the config {digest}.",
    ]
    members = {
        tuple(row[key] for key in ("method", "n", "beta", "seed", "m")): row["seconds"] or 0.0
        for row in results.sweep
        if row["method"] not in ("reference", "bon")
    }
    if members:
        minutes = sum(members.values()) / 60
        parts.append(f"The sweep trained {len(members)} policies, {minutes:.1f} minutes.")
    return " ".join(parts)


def _findings(results: Results) -> page.Section:
    texts = findings(results.sweep, results.n)
    if results.evaluation is not None:
        texts += run_sentence(results.evaluation["rows"])
    if results.convergence is not None:
        enough = results.convergence["recommended"]
        words = f"m = {enough} samples a prompt" if enough else "none of the m tried is enough"
        texts.append(f"Estimating log F: {words}. {results.convergence['why']}")
    if not texts:
        why = "There is neither a sweep.jsonl nor an evaluation.json to draw them from."
        return _not_run("findings", "Findings", why, "sweep")
    return page.Section("findings", "Findings", page.items(texts))


# --- Tables -------------------------------------------------------------------------------------


def _results(results: Results) -> page.Section:
    parts = []
    if results.evaluation is not None:
        parts += ["<h3>This run's own policy</h3>", tables.evaluation_table(results.evaluation)]
    else:
        parts.append(page.not_run("There is no evaluation.json.", COMMAND.format("evaluate")))
    if results.sweep:
        parts.append("<h3>Every method of the sweep</h3>")
        if results.n is not None:
            parts.append(tables.matched_table(results.sweep, results.n))
        parts.append(
            page.details(
                f"All {len(results.sweep)} rows of the sweep", tables.sweep_table(results.sweep)
            )
        )
    else:
        parts.append(page.not_run("There is no sweep.jsonl.", COMMAND.format("sweep")))
    run = results.evaluation is not None or bool(results.sweep)
    return page.Section("results", "Results", "\n".join(parts), run)


def _front(results: Results, which: str, title: str) -> page.Section:
    rows = front_figures.front_rows(results.sweep, which)
    wanted = {"bound": "lower_bound", "sft": "bon_sft"}.get(which)
    if not rows or (wanted and not chosen(rows, method=wanted)):
        what = method_name(wanted) if wanted else "a fine-tuned method"
        why = f"No row of {what} in the study “front” of sweep.jsonl."
        return _not_run(which, title, why, "sweep")
    pictures = []
    for letter, quantity in zip("ab", front_figures.QUANTITIES):
        path = front_figures.front_figure(results.workdir, which, quantity)
        held = share_rows(rows, front_figures.bon_rows(results.sweep))
        shares = ", ".join(
            f"{method_name(e['method'])} {e[f'share_{quantity.key}']:.0%}" for e in held
        )
        alt = (
            f"Scatter plot of {quantity.name} against KL to the reference for {len(rows)} "
            f"fine-tuned policies, with the curve of best-of-n. Shares of the front: {shares}."
        )
        caption = (
            f"({letter}) One point a policy; faint points are off the Pareto front of the "
            "fine-tuned methods shown; thin bars are 95% intervals over prompts. BoN needs n "
            "samples a response and is not counted."
        )
        pictures.append(page.figure(path, alt, caption))
    shown = tables.shares_table(held)
    return page.Section(which, title, page.side_by_side(pictures) + "\n" + shown)


# --- Samples and temperature --------------------------------------------------------------------


def _convergence(results: Results) -> page.Section:
    anchor, title = "convergence", "How many samples log F needs (Figure 3, Table 1)"
    found = results.convergence
    if found is None:
        return _not_run(anchor, title, "There is no convergence.json.", "convergence")
    if found["recommended"]:
        advice = f"Recommended: m = {found['recommended']} samples a prompt. {found['why']}"
    else:
        advice = f"None of the m tried is enough. {found['why']}"
    parts = [page.paragraph(advice)]
    if found["examples"]:
        path = sweep_figures.log_f_curves(results.workdir)
        prompts = "; ".join(f"{e['kind']}: “{e['prompt']}”" for e in found["examples"])
        alt = "Estimates of log F against the reward, one panel a prompt and one line for each m."
        caption = (f"log F against the reward by prompts with low, middle and high rewards "
                   f"({prompts}).")  # fmt: skip
        parts.append(page.figure(path, alt, caption, wide=True))
    parts.append(tables.convergence_table(found))
    return page.Section(anchor, title, "\n".join(parts))


def _sample_size(results: Results) -> page.Section:
    anchor, title = "samples", "Quality against m and preprocessing time (Figure 4)"
    rows = sweep_figures.sample_size_rows(results.sweep)
    if not rows:
        return _not_run(anchor, title, "No row of the study “m” in sweep.jsonl.", "sweep")
    sizes = sorted({row["m"] for row in rows})
    pictures = [
        page.figure(
            sweep_figures.sample_size(results.workdir, quantity),
            f"{quantity.name} against m from {sizes[0]:g} to {sizes[-1]:g}, mean and standard "
            "deviation over seeds.",
            f"{quantity.name.capitalize()}: mean and standard deviation over seeds (small points) "
            "against the reference samples a prompt that log F is estimated from.",
        )
        for quantity in front_figures.QUANTITIES
    ]
    body = page.side_by_side(pictures) + "\n" + tables.sample_size_table(rows)
    return page.Section(anchor, title, body)


def _temperature(results: Results) -> page.Section:
    anchor, title = "temperature", "Quality against temperature (Figure 5)"
    rows = sweep_figures.temperature_rows(results.sweep)
    if not rows:
        why = "No row of the study “temperature” in sweep.jsonl."
        return _not_run(anchor, title, why, "sweep")
    quantities = [
        quantity
        for quantity in sweep_figures.EVALUATOR_QUANTITIES
        if any(row[quantity.key] is not None for row in rows)
    ]
    if not quantities:
        why = "The sweep has no figures by a separate evaluator reward: give its config one."
        return _not_run(anchor, title, why, "sweep")
    splits = {row["split"] for row in rows}
    pictures = [
        page.figure(
            sweep_figures.temperature(results.workdir, quantity),
            f"{quantity.name} against sampling temperature, a line for each method; solid in "
            "distribution, dashed out of distribution.",
            f"{quantity.name[0].upper()}{quantity.name[1:]}: mean and standard deviation over "
            "seeds, by a reward model that no method was trained on. Solid lines and filled "
            "markers: prompts like those trained on"
            + ("; dashed and open: out of distribution." if "ood" in splits else "."),
        )
        for quantity in quantities
    ]
    return page.Section(anchor, title, page.side_by_side(pictures))


# --- The run itself -----------------------------------------------------------------------------


def _training(results: Results) -> page.Section:
    anchor, title = "training", "Training curves"
    if not (results.workdir / "metrics.jsonl").exists():
        return _not_run(anchor, title, "There is no metrics.jsonl.", "train")
    metrics = read_metrics(results.workdir)
    if metrics.keys() >= figures.PPO_COLUMNS and results.n is not None:
        path = figures.training_curves(results.workdir, results.n)
    else:  # the offline methods have columns of their own
        path = sweep_figures.metric_columns(results.workdir)
    name = method_name(results.config["method"]["name"]) if results.config else "the run's method"
    steps = len(metrics["step"]) if "step" in metrics else 0
    alt = f"Panels of the metrics of {name} against its {steps} training steps."
    caption = f"Metrics of {name}, the run's own method, over {steps} training steps."
    return page.Section(anchor, title, page.figure(path, alt, caption, wide=True))


def _bon_kl(results: Results) -> page.Section:
    anchor, title = "bon-kl", "KL of best-of-n from the reference, three ways"
    rows = front_figures.bon_rows(results.sweep)
    if not rows:
        why = "No row of best-of-n in the study “front” of sweep.jsonl."
        return _not_run(anchor, title, why, "sweep")
    return page.Section(anchor, title, tables.bon_kl_table(rows))


def _tabular(results: Results) -> page.Section:
    anchor, title = "tabular", "Exact figures where every response can be enumerated"
    exact = (results.evaluation or {}).get("exact")
    parts = []
    if results.tabular:
        parts.append(tables.tabular_table(results.tabular))
    if exact:
        parts.append(tables.exact_table(exact))
    if not parts:
        why = "There is no tabular.json: a sweep over the tabular world (data.corpus=tabular)."
        return _not_run(anchor, title, why, "sweep")
    return page.Section(anchor, title, "\n".join(parts))


def _responses(results: Results) -> page.Section:
    anchor, title = "responses", "Sample responses"
    workdir = results.workdir
    samples = []
    if (workdir / "sweep_samples.jsonl").exists():
        samples = read_samples(workdir, "sweep_samples.jsonl", "sweep")
    if (workdir / "evaluation_samples.jsonl").exists():  # has reference and best-of-n as well
        known = {sample["policy"] for sample in samples}
        samples += [sample for sample in read_samples(workdir) if sample["policy"] not in known]
    if not samples:
        why = "There is neither sweep_samples.jsonl nor evaluation_samples.jsonl."
        return _not_run(anchor, title, why, "evaluate")
    return page.Section(anchor, title, responses(samples, PROMPTS_SHOWN))


def responses(samples: Sequence[dict[str, Any]], count: int) -> str:
    """The first response of each policy to the first prompts by id, with its reward, as HTML.

    Of several temperatures, the first of the file.

    Args:
      samples: as `vbon_jax.report.results.read_samples` gives them.
      count: prompts shown; all where there are fewer.
    """
    temperature = samples[0]["temperature"]
    samples = [sample for sample in samples if sample["temperature"] == temperature]
    names = dict.fromkeys(sample["policy"] for sample in samples)
    order = sorted(names, key=lambda name: {"reference": 0, "bon": 2}.get(name, 1))
    first: dict[Any, dict[str, dict[str, Any]]] = {}
    for sample in samples:
        where = sample["prompt_id"], sample["prompt"]
        first.setdefault(where, {}).setdefault(sample["policy"], sample)
    parts = [
        page.paragraph(
            f"Temperature {temperature:g}; the first response of each policy. The responses "
            "continue the prompt.",
            "note",
        )
    ]
    for prompt_id, prompt in sorted(first)[:count]:
        own = first[prompt_id, prompt]
        rows = [
            [method_name(name), own[name]["response"].strip(), f"{own[name]['reward']:.2f}"]
            for name in order
            if name in own
        ]
        parts.append(
            page.table(
                ["policy", "response", "reward"], rows, f"Prompt: {prompt}", left=2,
                kind="responses", caption_kind="prompt",
            )
        )  # fmt: skip
    return "\n".join(parts)


def _config(results: Results) -> page.Section:
    if results.config is None:
        return _not_run("config", "Config", "There is no config.json.", "run")
    text = page.escape(json.dumps(results.config, indent=2, ensure_ascii=False))
    body = page.details(
        "config.json",
        '<div class="scroll" role="region" tabindex="0" aria-label="config.json">'
        f"<pre>{text}</pre></div>",
    )
    return page.Section("config", "Config", body)
