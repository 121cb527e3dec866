"""The stages of a run: each reads files of the ones before and writes its own into the workdir."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from vbon_jax import inputs, responses, sharding
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import reference as reference_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.evaluation import compare, heldout, measure
from vbon_jax.inputs import Decoder, Run
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.progress import log
from vbon_jax.sampling import engine
from vbon_jax.settings import Fit, Model, as_dict
from vbon_jax.training import loop, ppo, state, supervised
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter

LABELS = ("NEGATIVE", "POSITIVE")  # of label 0 and label 1
SAMPLES_SHOWN = 5  # prompts in evaluation.md, with a response of each policy
INIT = jax.jit(decoder.init, static_argnums=0)


def _decoder_config(model: Model, vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        positions=model.positions,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        mlp_width=4 * model.width,
    )


def _fit(
    run: Run,
    stage: str,
    params: Any,
    loss: supervised.Loss,
    fit: Fit,
    tokens: dict[str, list[tuple[int, ...]]],
    labels: dict[str, list[int]],
    pad_id: int,
) -> tuple[Any, float]:
    """Fits on tokens["train"]; returns (parameters on the host, mean nats on tokens["test"])."""
    plan = supervised.FitPlan(fit.epochs, fit.batch_size, fit.learning_rate, fit.weight_decay)
    checkpointer = Checkpointer(run.workdir.checkpoints(stage), keep=1)
    try:
        params = supervised.fit(
            stage, params, loss, tokens["train"], labels["train"], plan, pad_id, run.mesh,
            run.settings.seed, checkpointer,
        )  # fmt: skip
    finally:
        checkpointer.close()
    held_out = supervised.mean_loss(
        params, loss, tokens["test"], labels["test"], fit.batch_size, pad_id, run.mesh
    )
    return jax.device_get(params), held_out


def sft(run: Run) -> None:
    """Tokenizer and reference model: learned from the texts, or the user's own, checked."""
    s, workdir = run.settings, run.workdir
    own = bool(s.reference.path)
    train, test = ([], []) if own else inputs.texts(run)
    tokenizer = inputs.make_tokenizer(run, train)
    inputs.eos_id(run, tokenizer)  # refuses a tokenizer without EOS before any work
    if own:
        config = hf.load_decoder(s.reference.path)[0]
        if config.vocab_size < len(tokenizer):
            raise InputError(
                f"reference.path={s.reference.path!r} has {config.vocab_size} embeddings, its "
                f"tokenizer {len(tokenizer)} tokens: the directory does not fit together"
            )
        tokenizers.save(tokenizer, workdir.tokenizer)
        return
    fit = s.reference.fit
    _check_positions("reference", fit.max_tokens, s.reference.model.positions)
    config = _decoder_config(s.reference.model, len(tokenizer))
    params = sharding.place({"decoder": INIT(config, run.key("sft"))}, run.mesh)
    tokens = {
        split: inputs.encode_texts(run, tokenizer, examples, fit.max_tokens)
        for split, examples in (("train", train), ("test", test))
    }
    zeros = {split: [0] * len(rows) for split, rows in tokens.items()}
    params, held_out = _fit(
        run, "sft", params, partial(supervised.language_model_loss, config=config), fit, tokens,
        zeros, inputs.pad_id(tokenizer),
    )  # fmt: skip
    tokenizers.save(tokenizer, workdir.tokenizer)
    _save_policy(run, workdir.reference, config, params["decoder"], tokenizer)
    workdir.write_json(
        workdir.reference / "fit.json", {"held_out_nats_per_token": held_out, "texts": len(train)}
    )
    log(
        f"sft: {len(train)} texts, {len(tokenizer)} tokens in the vocabulary; held out "
        f"{held_out:.3f} nats a token (perplexity {np.exp(held_out):.1f})"
    )


def _save_policy(
    run: Run, path: Path, config: DecoderConfig, params: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A Hugging Face directory whose defaults for generation are the distribution of this run."""
    hf.save_decoder(
        path, config, params, bos_id=tokenizer.bos_token_id,
        eos_id=inputs.eos_id(run, tokenizer), pad_id=tokenizer.pad_token_id,
        temperature=run.settings.sampling.temperature,
    )  # fmt: skip
    tokenizers.save(tokenizer, path)


def _check_positions(name: str, max_tokens: int, positions: int) -> None:
    if max_tokens > positions:
        raise InputError(
            f"{name}.fit.max_tokens={max_tokens} is more than {name}.model.positions={positions}"
        )


def reward(run: Run) -> None:
    """The reward model: trained on the labels, or the user's own, checked."""
    s, workdir = run.settings, run.workdir
    tokenizer = inputs.load_tokenizer(run)
    if s.reward.function:
        inputs.load_reward(run, tokenizer)
        return
    if s.reward.path:
        hf.load_classifier(s.reward.path)
        return
    fit = s.reward.fit
    _check_positions("reward", fit.max_tokens, s.reward.model.positions)
    if s.reward.label not in LABELS:
        raise InputError(f"reward.label={s.reward.label!r}: label 0 is NEGATIVE, label 1 POSITIVE")
    end = inputs.eos_id(run, tokenizer)
    splits = dict(zip(("train", "test"), inputs.texts(run), strict=True))
    # The texts of the reference without their EOS: it is part of no reward.
    tokens = {
        split: [
            tuple(t for t in row if t != end)
            for row in inputs.encode_texts(run, tokenizer, examples, fit.max_tokens)
        ]
        for split, examples in splits.items()
    }
    labels = {split: [e.label for e in examples] for split, examples in splits.items()}
    config = _decoder_config(s.reward.model, len(tokenizer))
    body_key, head_key = jax.random.split(run.key("reward"))
    params = sharding.place(
        {"decoder": INIT(config, body_key),
         "score": heads.init_score(config, len(LABELS), head_key)},
        run.mesh,
    )  # fmt: skip
    params, held_out = _fit(
        run, "reward", params, partial(supervised.classifier_loss, config=config), fit, tokens,
        labels, inputs.pad_id(tokenizer),
    )  # fmt: skip
    hf.save_classifier(
        workdir.reward, config, params, LABELS,
        bos_id=tokenizer.bos_token_id, eos_id=end, pad_id=inputs.pad_id(tokenizer),
    )  # fmt: skip
    tokenizers.save(tokenizer, workdir.reward)
    accuracy = supervised.accuracy(
        sharding.place(params, run.mesh), config, tokens["test"], labels["test"], fit.batch_size,
        inputs.pad_id(tokenizer), run.mesh,
    )  # fmt: skip
    workdir.write_json(
        workdir.reward / "fit.json", {"held_out_nats": held_out, "held_out_accuracy": accuracy}
    )
    log(f"reward: held out {held_out:.3f} nats a text, accuracy {accuracy:.3f}")


def sample(run: Run) -> None:
    """Prompts, and m scored reference responses to each training prompt."""
    s, workdir = run.settings, run.workdir
    tokenizer = inputs.load_tokenizer(run)
    reference = inputs.load_reference(run)
    score = inputs.load_reward(run, tokenizer)
    own_prompts = (s.prompts.path or s.samples.path) and s.prompts.test_path
    train, test = ([], []) if own_prompts else inputs.texts(run)
    found = reference_files.read(s.samples.path) if s.samples.path else None
    adopted = None if found is None else inputs.prompts_of(found, tokenizer, s.samples.m)
    prompts = inputs.make_prompts(run, tokenizer, train, test, adopted)
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


def _train_state(
    run: Run, reference: Decoder
) -> tuple[state.TrainState, optax.GradientTransformation, optax.Schedule]:
    """The policy before its first step: the reference's weights and a value head of zeros."""
    t = run.settings.train
    updates = t.iterations * t.ppo_epochs * (t.batch_size // t.minibatch_size)
    schedule = optax.linear_schedule(t.learning_rate, 0.0, updates)
    optimizer = state.adamw(schedule, t.adam_eps, t.weight_decay, t.max_grad_norm)
    key = run.key("train")
    params = {
        "decoder": jax.tree.map(np.array, jax.device_get(reference.params["decoder"])),
        "value": heads.init_value(reference.config, key),
    }
    fresh = state.create(sharding.place(params, run.mesh), optimizer, key)
    return sharding.place(fresh, run.mesh), optimizer, schedule


def train(run: Run) -> None:
    """PPO on the chosen objective, from the newest checkpoint if there is one."""
    s, workdir = run.settings, run.workdir
    tokenizer = inputs.load_tokenizer(run)
    prompts = inputs.load_prompts(run, "train")
    table = reference_files.sorted_rewards_of(workdir.train_samples, prompts, s.samples.m)
    reference = inputs.load_reference(run)
    score = inputs.load_reward(run, tokenizer)
    sampling = inputs.sampling(run, tokenizer)
    t = s.train
    plan = ppo.PPOPlan(
        objective=s.method.objective,
        estimator=s.method.estimator,
        epochs=t.ppo_epochs,
        minibatch_size=t.minibatch_size,
        clip_policy=t.clip_policy,
        clip_value=t.clip_value,
        value_coef=t.value_coef,
        gamma=t.gamma,
        lam=t.lam,
        whiten=t.whiten,
        penalty=t.penalty,
        temperature=s.sampling.temperature,
    )
    fresh, optimizer, schedule = _train_state(run, reference)
    checkpointer = Checkpointer(workdir.checkpoints("train"), t.keep)
    try:
        restored = checkpointer.restore(fresh)
        if restored is not None:
            fresh = restored[0]
            log(f"train: going on after iteration {int(fresh.step)} of {t.iterations}")
        writer = MetricsWriter(workdir.root, int(fresh.step))
        try:
            loop.train(
                fresh,
                reference.params,
                reference.config,
                prompts,
                table,
                score,
                lambda ids: responses.response_text(tokenizer, ids, sampling.eos_id),
                sampling,
                plan,
                loop.LoopPlan(
                    t.iterations, t.batch_size, t.checkpoint_every, s.seed, s.method.n,
                    s.method.beta,
                ),
                optimizer,
                schedule,
                run.mesh,
                run.key("rollout"),
                checkpointer,
                writer,
                {"config": as_dict(s)},
            )  # fmt: skip
        finally:
            writer.close()
    finally:
        checkpointer.close()


def export(run: Run) -> None:
    """``policy/``: the newest checkpoint as a Hugging Face directory that transformers loads."""
    run.workdir.require("train", "a trained policy")
    tokenizer = inputs.load_tokenizer(run)
    reference = inputs.load_reference(run)
    like, _, _ = _train_state(run, reference)
    checkpointer = Checkpointer(run.workdir.checkpoints("train"), run.settings.train.keep)
    try:
        restored = checkpointer.restore(like)
    finally:
        checkpointer.close()
    if restored is None:
        raise InputError(f"no checkpoint in {checkpointer.directory}: run `vbon train` first")
    params = jax.device_get(restored[0].params["decoder"])
    _save_policy(run, run.workdir.policy, reference.config, params, tokenizer)


def evaluate(run: Run) -> None:
    """``evaluation.json`` and ``.md``, samples and figures: reference, best-of-n and policy."""
    from vbon_jax.evaluation import figures, table

    s, workdir = run.settings, run.workdir
    tokenizer = inputs.load_tokenizer(run)
    prompts = inputs.load_prompts(run, "test")
    reference, policy = inputs.load_reference(run), inputs.load_policy(run)
    score = inputs.load_reward(run, tokenizer)
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for temperature in s.evaluate.temperatures:
        new = heldout.evaluate_at(run, temperature, tokenizer, prompts, reference, policy, score)
        for row, measured in new:
            rows.append(row)
            lines += [
                {
                    "policy": row["policy"],
                    "temperature": temperature,
                    "prompt_id": r.request.prompt_id,
                    "prompt": prompts[r.request.prompt_id].text,
                    "response": r.text,
                    "reward": r.reward,
                }
                for group in measured.responses
                for r in group
            ]
    result: dict[str, Any] = {"rows": rows}
    if s.data.corpus == "tabular" and not s.data.path:
        result["exact"] = heldout.enumerate_world(run, tokenizer, reference, policy)
    path = workdir.root / "evaluation_samples.jsonl"
    _write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    workdir.write_json(workdir.evaluation, result)
    _write_text(
        workdir.root / "evaluation.md",
        f"{table.markdown_table(rows)}\n{table.samples_table(workdir.root, SAMPLES_SHOWN)}",
    )
    console = Console()
    console.print(table.results_table(rows))
    if "exact" in result:
        console.print(table.exact_table(result["exact"]))
    for figure in figures.all_figures(workdir.root):
        log(f"evaluate: {figure}")


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


STAGES: dict[str, Callable[[Run], None]] = {
    "sft": sft,
    "reward": reward,
    "sample": sample,
    "train": train,
    "export": export,
    "evaluate": evaluate,
}
REDONE = ("export", "evaluate")  # asked for by name, these overwrite what is there


def perform(run: Run, stage: str, again: bool) -> None:
    """Runs one stage unless it is complete under the same settings.

    Args:
      again: the stage was asked for by name: REDONE stages run even if they are complete, or were
        completed under other settings.
    """
    workdir = run.workdir
    if again and stage in REDONE:
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
