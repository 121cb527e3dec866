"""Stage ``evaluate``: reference, best-of-n and policy on held-out prompts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from vbon_jax import methods, processes
from vbon_jax.bon import log_f as lf
from vbon_jax.config import Config
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import writing
from vbon_jax.evaluation import exact, heldout
from vbon_jax.evaluation.heldout import HeldOut, Models, Protocol
from vbon_jax.progress import log
from vbon_jax.rewards import function
from vbon_jax.sampling import family as family_files
from vbon_jax.sampling import samples
from vbon_jax.sampling.family import Family
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run
from vbon_jax.stages.report import looks

SAMPLES_SHOWN = 5  # prompts in evaluation.md, with a response of each policy


def run(run: Run) -> None:
    """Writes ``evaluation.json`` and ``.md``, samples and figures.

    Where the run has out-of-distribution prompts, the same rows of these are under "ood".
    """
    from vbon_jax.report import figures, table, tables

    s, workdir = run.config, run.workdir
    models = loading.models(run)
    policies = _policies(run)
    console, markdown = Console(quiet=not processes.first()), ""
    result: dict[str, Any] = {}
    for split in splits(s):
        key, suffix = ("rows", "") if split == "test" else (split, f"_{split}")
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for temperature in s.evaluate.temperatures:
            held = open_split(run, models, split, temperature, s.evaluate.m)
            new_rows, new_lines = _evaluated(s, held, policies)
            rows += new_rows
            lines += new_lines
        result[key] = rows
        path = workdir.root / f"evaluation_samples{suffix}.jsonl"
        _write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if split != "test":
            markdown += "\nOut of distribution:\n\n"
            console.print("Out of distribution:")
        parts = tables.kl_parts_table(rows)
        markdown += f"{tables.markdown_table(rows)}\n{tables.bon_kls(rows)}\n"
        console.print(tables.results_table(rows))
        console.print(tables.bon_kls(rows), highlight=False)
        if parts is not None:
            markdown += f"{parts.caption}\n\n{table.markdown(parts)}\n"
            console.print(parts)
    if enumerable(s) and policies:
        world, trained = enumerated(run, models.reference), policies[s.method.name]
        found = [
            {"n": n} | exact.figures(_of(trained, n).model, models.reference.model, world, n)
            for n in looked_at(s)
        ]
        if s.method.is_family:
            result["exact_family"] = found
            console.print(tables.exact_family_table(found))
        else:
            result["exact"] = {key: x for key, x in found[0].items() if key != "n"}
            console.print(tables.exact_table(result["exact"]))
    workdir.write_json(workdir.evaluation, result)
    if not processes.first():
        return  # what follows is made of the files
    _write_text(
        workdir.root / "evaluation.md",
        f"{markdown}{tables.samples_table(workdir.root, SAMPLES_SHOWN)}",
    )
    has_policy = s.method.name != methods.BEST_OF_N
    for figure in figures.all_figures(workdir.root, looks(), has_policy):
        log(f"evaluate: {figure}")


def _policies(run: Run) -> dict[str, Sampler | Family]:
    """The exported policy, or family, by its method's name; of an average the last iterate too."""
    name, last = run.config.method.name, run.workdir.last_iterate
    if name == methods.BEST_OF_N:
        return {}
    load = loading.family if run.config.method.is_family else loading.policy
    found: dict[str, Sampler | Family] = {name: load(run)}
    if processes.by_first(last.is_dir):
        found[f"{name}, last iterate"] = load(run, last)
    return found


def _of(policy: Sampler | Family, n: float) -> Sampler:
    """The policy for n."""
    return policy.at(n) if isinstance(policy, Family) else policy


def splits(config: Config) -> tuple[str, ...]:
    """The held-out splits of a run."""
    return ("test", "ood") if config.prompts.ood or config.prompts.ood_path else ("test",)


def protocol(config: Config, m: int) -> Protocol:
    """How the run's splits are measured."""
    return Protocol(
        config.method.top, config.method.estimator, config.method.ties, m,
        config.evaluate.samples_per_prompt, config.sampling.batch_size, config.seed,
    )  # fmt: skip


def open_split(run: Run, models: Models, split: str, temperature: float, m: int) -> HeldOut:
    """What a split is measured with, by files in the workdir that are made where they are not."""
    prompts = loading.prompts(run, split)

    def draw(role: str, reference: Sampler, key: jax.Array) -> list[PromptSamples]:
        path = run.workdir.held_out(role, split, temperature, m)
        samples.write(
            path, reference, key, prompts, range(m), run.config.sampling.batch_size,
            (models.reward, models.evaluator), f"{role} ({split}) at T={temperature:g}",
        )  # fmt: skip
        return sample_files.samples_of(path, prompts, m)

    return heldout.open_split(models, prompts, split, temperature, protocol(run.config, m), draw)


def looked_at(config: Config) -> tuple[float, ...]:
    """The n that is measured: the run's, or several of a family of policies."""
    if not isinstance(config.method.n, tuple):
        return (config.method.n,)
    return config.evaluate.n or family_files.steps(config.method.n)


def _evaluated(
    s: Config, held: HeldOut, policies: dict[str, Sampler | Family]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and sample lines of one split and temperature."""
    reference, each = held.models.reference, s.evaluate.samples_per_prompt

    def fast(row: dict[str, Any], model: Sampler, calls: int, scoring: bool) -> dict[str, Any]:
        responses_a_second, tokens_a_second = held.speed(model, calls, scoring)
        return row | {
            "split": held.split, "responses_per_second": responses_a_second,
            "tokens_per_second": tokens_a_second,
        }  # fmt: skip

    rows = [fast(held.reference(), reference, 1, False)]
    texts = {"reference": [[(x.responses[i], x.rewards[i]) for i in range(each)]
                           for x in held.pool_samples]}  # fmt: skip
    all_n = looked_at(s)
    for n in all_n:
        if not n.is_integer() or n > s.evaluate.m:
            log(
                f"evaluate: n={n:g} is not a whole number of at most evaluate.m={s.evaluate.m}, "
                "so best-of-n itself is not measured"
            )
            continue
        rows.append(fast(held.at(n).bon(int(n)), reference, int(n), True))
        texts["bon"] = held.winners(int(n))  # of the largest

    for name, trained in policies.items():
        for n in all_n:
            policy = _of(trained, n)
            title = f"{name} (n = {n:g}, {held.split}) at T={held.temperature:g}"
            row, drawn = held.at(n).policy(name, n, policy, title)
            rows.append(fast(row, policy, 1, False))
            texts[name] = [[(r.text, r.reward) for r in group] for group in drawn]
    return rows, heldout.sample_lines(held, texts)


def _write_text(path: Path, text: str) -> None:
    if not processes.first():
        return
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text)
        temporary.replace(path)


# --- The tabular world --------------------------------------------------------------------------


def enumerable(config: Config) -> bool:
    """Whether the run's responses can be enumerated."""
    data = config.data
    return data.corpus == "tabular" and not data.path and bool(config.reward.function)


def enumerated(run: Run, reference: Sampler) -> exact.World:
    """The tabular world of a run, over its training prompts."""
    s = run.config
    prompts = loading.prompts(run, "train")
    strings = tabular.strings()
    ids = np.array([tokenizers.encode(reference.tokenizer, text) for text in strings], np.int32)
    order = np.asarray(lf.response_order(ids, np.ones(ids.shape, bool)))
    return exact.World(
        [p.tokens for p in prompts],
        ids,
        np.array([_world_rewards(s.reward.function, p.text, strings) for p in prompts]),
        order if s.method.ties == "order" else None,
        s.sampling.temperature,
    )


def _world_rewards(name: str, prompt: str, strings: Sequence[str]) -> np.ndarray:
    """The reward of every response of the tabular world, float64 [S]."""
    values = function.call(name, function.load(name), [prompt] * len(strings), list(strings))
    return values.astype(np.float64)
