"""The stages of a run: each reads files of the ones before and writes its own into the workdir."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from vbon_jax.config import as_dict
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as reference_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.evaluation import compare, heldout, measure
from vbon_jax.methods import build as methods
from vbon_jax.models import hf, trainable
from vbon_jax.models.hf import peft
from vbon_jax.progress import log
from vbon_jax.sampling import responses
from vbon_jax.sampling import sampler as engine
from vbon_jax.stages import inputs, pretrain, sweep
from vbon_jax.stages.inputs import Decoder, Run
from vbon_jax.training import loop
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter

SAMPLES_SHOWN = 5  # prompts in evaluation.md, with a response of each policy


def sample(run: Run) -> None:
    """Prompts, and m scored reference responses to each training prompt."""
    s, workdir = run.settings, run.workdir
    tokenizer = inputs.load_tokenizer(run)
    reference = inputs.load_reference(run)
    score = inputs.load_reward(run, tokenizer)
    found = reference_files.read(s.samples.path) if s.samples.path else None
    adopted = None if found is None else inputs.prompts_of(found, tokenizer, s.samples.m)
    prompts = inputs.make_prompts(run, tokenizer, adopted)
    for split, chosen in prompts.items():
        inputs.check_lengths(run, chosen, reference, score)
        workdir.prompts(split).parent.mkdir(parents=True, exist_ok=True)
        prompt_files.write_jsonl(workdir.prompts(split), chosen)
    if found is not None:
        inputs.copy_samples(workdir.train_samples, prompts["train"], found)
        log(f"sample: {len(found)} prompts with their samples from {s.samples.path}")
        return
    responses.write_samples(
        workdir.train_samples,
        "sample",
        reference,
        inputs.sampling(run, tokenizer),
        run.mesh,
        run.key("sample"),
        prompts["train"],
        s.samples.m,
        s.sampling.batch_size,
        score,
        tokenizer,
    )


def train(run: Run) -> None:
    """The method's training, from the newest checkpoint if there is one."""
    s, workdir = run.settings, run.workdir
    method = methods.spec(s)
    if method.name == "bon":
        log("train: best-of-n itself (method.name=bon) trains nothing")
        return
    world = methods.world(run, method)
    fresh, step = methods.single(run, world)
    total = methods.iterations(s, method, len(world.prompts))
    checkpointer = Checkpointer(workdir.checkpoints("train"), s.train.keep)
    try:
        start = checkpointer.latest_step or 0
        restored = checkpointer.restore(fresh)
        if restored is not None:
            fresh = restored[0]
            log(f"train: going on after iteration {start} of {total}")
        writer = MetricsWriter(workdir.root, start)
        try:
            loop.run(
                fresh, start, step, loop.LoopPlan("train", total, s.train.checkpoint_every),
                checkpointer, writer, {"config": as_dict(s)},
            )  # fmt: skip
        finally:
            writer.close()
    finally:
        checkpointer.close()


def export(run: Run) -> None:
    """``policy/``: the newest checkpoint as a Hugging Face directory that transformers loads."""
    s = run.settings
    if s.method.name == "bon":
        log("export: best-of-n itself (method.name=bon) has no policy to export")
        return
    run.workdir.require("train", "a trained policy")
    tokenizer = inputs.load_tokenizer(run)
    reference = inputs.load_reference(run)
    prompts = len(inputs.load_prompts(run, "train"))
    method = methods.spec(s)
    value = inputs.load_value(run, reference.config) if methods.has_values(method) else None
    like = methods.first_state(s, method, reference, run.key("train"), prompts, value)
    checkpointer = Checkpointer(run.workdir.checkpoints("train"), s.train.keep)
    try:
        restored = checkpointer.restore(like)
    finally:
        checkpointer.close()
    if restored is None:
        raise InputError(f"no checkpoint in {checkpointer.directory}: run `vbon train` first")
    own = restored[0].params["decoder"]
    shutil.rmtree(run.workdir.policy, ignore_errors=True)  # perhaps of another form
    if s.export.form == "adapter":
        peft.save(
            run.workdir.policy, own, s.lora.alpha, base=str(inputs.reference_path(run)),
            config=reference.config,
        )  # fmt: skip
        tokenizers.save(tokenizer, run.workdir.policy)
        return
    params = trainable.merged(
        trainable.join(reference.params["decoder"], own), reference.config.lora_alpha
    )
    raw = hf.read_config(inputs.reference_path(run))[2]
    pretrain.save_policy(run, run.workdir.policy, reference.config, params, tokenizer, raw)


def evaluate(run: Run) -> None:
    """``evaluation.json`` and ``.md``, samples and figures: reference, best-of-n and policy.

    Where the run has out-of-distribution prompts, the same rows of these are under "ood".
    """
    from vbon_jax.report import figures
    from vbon_jax.report import tables as table

    s, workdir = run.settings, run.workdir
    loaded = heldout.models(run)
    policy = None if s.method.name == "bon" else inputs.load_policy(run)
    console, markdown = Console(), ""
    result: dict[str, Any] = {}
    splits = ("test", "ood") if s.prompts.ood or s.prompts.ood_path else ("test",)
    for split in splits:
        key, suffix = ("rows", "") if split == "test" else (split, f"_{split}")
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for temperature in s.evaluate.temperatures:
            new_rows, new_lines = _evaluated(run, loaded, policy, split, temperature)
            rows += new_rows
            lines += new_lines
        result[key] = rows
        path = workdir.root / f"evaluation_samples{suffix}.jsonl"
        _write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if split != "test":
            markdown += "\nOut of distribution:\n\n"
            console.print("Out of distribution:")
        markdown += f"{table.markdown_table(rows)}\n{table.bon_kls(rows)}\n"
        console.print(table.results_table(rows))
        console.print(table.bon_kls(rows), highlight=False)
    if sweep.tabular(s) and policy is not None:
        result["exact"] = heldout.enumerate_world(run, loaded, policy, s.method.n)
        console.print(table.exact_table(result["exact"]))
    workdir.write_json(workdir.evaluation, result)
    _write_text(
        workdir.root / "evaluation.md",
        f"{markdown}{table.samples_table(workdir.root, SAMPLES_SHOWN)}",
    )
    for figure in figures.all_figures(workdir.root, trained=policy is not None):
        log(f"evaluate: {figure}")


def _evaluated(
    run: Run, loaded: heldout.Models, policy: Decoder | None, split: str, temperature: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and sample lines of one split and temperature."""
    s = run.settings
    n = s.method.n
    held = heldout.open_split(run, loaded, split, temperature, n, s.evaluate.m)

    def fast(row: dict[str, Any], model: Decoder, calls: int, scoring: bool) -> dict[str, Any]:
        responses_a_second, tokens_a_second = held.speed(model, calls, scoring)
        return row | {
            "split": split, "responses_per_second": responses_a_second,
            "tokens_per_second": tokens_a_second,
        }  # fmt: skip

    each = s.evaluate.samples_per_prompt
    rows = [fast(held.reference(), loaded.reference, 1, False)]
    texts = {"reference": [[(x.responses[i], x.rewards[i]) for i in range(each)]
                           for x in held.pool_samples]}  # fmt: skip
    if not n.is_integer() or n > s.evaluate.m:
        log(
            f"evaluate: method.n={n:g} is not a whole number of at most evaluate.m="
            f"{s.evaluate.m}, so best-of-n itself is not measured"
        )
    else:
        rows.append(fast(held.bon(int(n)), loaded.reference, int(n), True))
        texts["bon"] = held.winners(int(n))
    if policy is not None:
        name = s.method.name
        row, drawn = held.policy(name, n, policy, f"{name} ({split}) at T={temperature:g}")
        rows.append(fast(row, policy, 1, False))
        texts[name] = [[(r.text, r.reward) for r in group] for group in drawn]
    lines = heldout.sample_lines(held, texts)
    return rows, lines


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def generate(run: Run, texts: Sequence[str]) -> None:
    """Responses to the given prompts on standard output, one JSON object a line."""
    with jax.set_mesh(run.mesh):
        rows = _generated(run, texts)
    for text, row in zip(texts, rows, strict=True):
        for r in row:
            line = {"prompt": text, "response": r.text, "reward": r.reward}
            print(json.dumps(line, ensure_ascii=False))


def _generated(run: Run, texts: Sequence[str]) -> list[list[responses.Response]]:
    """``generate.count`` responses to each prompt, from the model the config names."""
    s = run.settings
    g = s.generate
    tokenizer = inputs.load_tokenizer(run)
    model = inputs.load_policy(run) if g.model == "policy" else inputs.load_reference(run)
    prompts = prompt_files.from_texts(list(texts), tokenizer)
    score = inputs.load_reward(run, tokenizer)
    inputs.check_lengths(run, prompts, model, score)
    base = inputs.sampling(run, tokenizer, g.temperature)
    sampling = engine.Sampling(
        base.temperature, base.max_new_tokens, base.eos_id, base.pad_id, g.top_k, g.top_p
    )
    bon = g.model == "bon"
    if bon and not float(s.method.n).is_integer():
        raise InputError(f"method.n={s.method.n}: generate.model=bon needs a whole number")
    each = g.count * (int(s.method.n) if bon else 1)
    requests = responses.requests_for(prompts, each)
    drawn: list[responses.Response] = []
    for group in responses.scored(
        model, sampling, run.mesh, run.key("generate"), prompts, requests,
        min(s.sampling.batch_size, len(requests)), score, tokenizer,
    ):  # fmt: skip
        drawn += group
    rows = measure.grouped(drawn, each)
    if bon:
        rewards = np.array([[r.reward for r in row] for row in rows])
        chosen = compare.best_of(rewards, int(s.method.n))
        rows = [[row[i] for i in columns] for row, columns in zip(rows, chosen)]
    return rows


def convergence(run: Run) -> None:
    """``convergence.json``: how many reference samples this task needs (Fig. 3, Table 1)."""
    from vbon_jax.evaluation import convergence as study

    s = run.settings
    c = s.convergence
    loaded = heldout.models(run)
    prompts = inputs.load_prompts(run, "test")[: c.prompts]
    if len(prompts) < c.prompts:
        raise InputError(
            f"convergence.prompts={c.prompts} is more than the {len(prompts)} held-out prompts: "
            "lower it or raise prompts.test"
        )
    path = run.workdir.held_out("convergence", "test", s.sampling.temperature, c.m_full)
    responses.write_samples(
        path, "convergence", loaded.reference, inputs.sampling(run, loaded.tokenizer), run.mesh,
        run.key("convergence"), prompts, c.m_full, s.sampling.batch_size, loaded.reward,
        loaded.tokenizer,
    )  # fmt: skip
    samples = reference_files.samples_of(path, prompts, c.m_full)
    result = study.convergence(
        [p.text for p in prompts], reference_files.rewards(samples, c.m_full), c.m, c.level,
        s.sampling.temperature,
    )  # fmt: skip
    run.workdir.write_json(run.workdir.root / "convergence.json", result)
    Console().print(study.convergence_table(result))
    log(f"convergence: {result['why']}")


def report(run: Run) -> None:
    """``report.html``: everything the workdir holds, on one page that needs no other file."""
    from vbon_jax.report import document as page

    log(f"report: {page.write(run.workdir.root)}")


STAGES: dict[str, Callable[[Run], None]] = {
    "sft": pretrain.sft,
    "reward": pretrain.reward,
    "evaluator": pretrain.evaluator,
    "sample": sample,
    "train": train,
    "export": export,
    "evaluate": evaluate,
    "convergence": convergence,
    "sweep": sweep.sweep,
    "report": report,
}
# Asked for by name, these overwrite what is there.
REDONE = ("export", "evaluate", "convergence", "sweep", "report")
# These look at what is there every time: a sweep leaves alone what is done, a page is quickly made.
ALWAYS = ("sweep", "report")


def perform(run: Run, stage: str, again: bool) -> None:
    """Runs one stage unless it is complete under the same settings.

    Args:
      again: the stage was asked for by name: REDONE stages run even if they are complete, or were
        completed under other settings.
    """
    workdir = run.workdir
    if stage in REDONE and (again or stage in ALWAYS):
        workdir.forget(stage)
    if workdir.begin(stage):
        log(f"{stage}: complete already in {workdir.root}")
        return
    workdir.write_json(workdir.root / "config.json", as_dict(run.settings))
    began = time.monotonic()
    try:
        with jax.set_mesh(run.mesh):
            STAGES[stage](run)
    except (InputError, hf.CheckpointError):
        workdir.abandon(stage)
        raise
    workdir.complete(stage)
    log(f"{stage}: done in {time.monotonic() - began:.1f} s")
