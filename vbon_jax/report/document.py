"""The report: everything a run found on one self-contained page, ``report.html``.

It reads what the stages left in the workdir. A workdir with a sweep shows the sweep first, any
other the run's own policy. What was not run is one line at the end. The page holds its figures and
styles, and refers to nothing outside itself.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vbon_jax.errors import writing
from vbon_jax.report import page, run_sections, sweep_sections
from vbon_jax.report.page import Missing, Section
from vbon_jax.report.results import Results, read
from vbon_jax.report.style import Looks, method_name


def write(workdir: Path, looks: Looks) -> Path:
    """Writes ``report.html``, and the figures it holds to ``figures/``.

    Args:
        workdir: The folder of the run.
        looks: How each fine-tuned method appears, by its label in the result files (see
            `vbon_jax.report.style.Look`); its order is that of the legends. Labels it lacks are
            shown as they stand, with spare colors.

    Returns:
        The page's path.

    Raises:
        InputError: The workdir is missing, or a file in it is at fault.
    """
    results = read(workdir, looks)
    parts = sweep_parts(results) if results.sweep else run_parts(results)
    sections = [part for part in parts if isinstance(part, Section)]
    missing = [part for part in parts if isinstance(part, Missing)]
    text = page.render(title(results), description(results), sections, missing)
    path = results.workdir / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)  # the page is whole, or as it was before
    return path


def run_parts(results: Results) -> list[Section | Missing]:
    """Returns the page of a single run, in order.

    Args:
        results: What the workdir holds.

    Returns:
        The sections, and what was not run.
    """
    own = [
        run_sections.this_run(results),
        run_sections.choose(results),
        run_sections.training(results),
        run_sections.exact(results),
        run_sections.responses(results),
        Missing("sweep", "sweep"),
        sweep_sections.convergence(results),
        run_sections.config(results),
    ]
    return [part for part in own if part is not None]


def sweep_parts(results: Results) -> list[Section | Missing]:
    """Returns the page of a sweep, in the order of the paper's figures.

    Args:
        results: What the workdir holds.

    Returns:
        The sections, and what was not run.
    """
    all_parts = [
        sweep_sections.findings(results),
        *sweep_sections.results(results),
        sweep_sections.front(results, "front", "Win rate and reward against KL (Figure 2)"),
        sweep_sections.convergence(results),
        sweep_sections.sample_size(results),
        sweep_sections.temperature(results),
        sweep_sections.front(
            results, "bound", "Exact objective against its lower bound (Figure 6)"
        ),
        sweep_sections.front(results, "sft", "With maximum likelihood on BoN's winners (Figure 7)"),
        run_sections.choose(results),
        run_sections.training(results),
        sweep_sections.bon_kl(results),
        run_sections.exact(results),
        run_sections.responses(results),
        run_sections.config(results),
    ]
    return [part for part in all_parts if part is not None]


# --- What this run is ---------------------------------------------------------------------------


def title(results: Results) -> str:
    """Returns the title of the page.

    Args:
        results: What the workdir holds.

    Returns:
        The kind of page and the name of the workdir.
    """
    name = results.workdir.absolute().name
    if results.sweep or results.config is None:
        return f"Best-of-n methods compared: {name}"
    method = method_name(results.config["method"]["name"], results.looks)
    n = f" with n = {results.n:g}" if results.n is not None else ""
    return f"{method}{n}: {name}"


def description(results: Results) -> str:
    """Returns one paragraph on the task, the models, n and m, and the digest of the config.

    Args:
        results: What the workdir holds.

    Returns:
        Sentences of plain text.
    """
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
        f"The run's own method is {method_name(look('method.name'), results.looks)}"
        + (f" with n = {n:g}" if n is not None else "")
        + (f" and m = {m} reference samples per prompt" if m is not None else "")
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
