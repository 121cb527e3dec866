"""The models learned before alignment: tokenizer and reference, reward, evaluator."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.config import Evaluator, Fit, Model, Reward
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.hf import hub
from vbon_jax.progress import log
from vbon_jax.stages import inputs
from vbon_jax.stages.inputs import Run
from vbon_jax.training import supervised
from vbon_jax.training.checkpoint import Checkpointer

LABELS = ("NEGATIVE", "POSITIVE")  # of label 0 and label 1
EVALUATOR_SEED = 500_000_000  # added to the run's seed: no other split draws from it
INIT = jax.jit(decoder.init, static_argnums=0)


def decoder_config(model: Model, vocab_size: int) -> DecoderConfig:
    """A GPT-2 of the sizes given."""
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
    train, test, _ = inputs.Texts([], [], []) if own else inputs.texts(run)
    tokenizer = inputs.make_tokenizer(run, train)
    inputs.eos_id(run, tokenizer)  # refuses a tokenizer without EOS before any work
    if own:
        config = hf.read_config(hub.resolve(s.reference.path))[1]
        if config.vocab_size < len(tokenizer):
            raise InputError(
                f"reference.path={s.reference.path!r} has {config.vocab_size} embeddings, its "
                f"tokenizer {len(tokenizer)} tokens: the directory does not fit together"
            )
        tokenizers.save(tokenizer, workdir.tokenizer)
        return
    fit = s.reference.fit
    _check_positions("reference", fit.max_tokens, s.reference.model.positions)
    config = decoder_config(s.reference.model, len(tokenizer))
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
    save_policy(run, workdir.reference, config, params["decoder"], tokenizer)
    workdir.write_json(
        workdir.reference / "fit.json", {"held_out_nats_per_token": held_out, "texts": len(train)}
    )
    log(
        f"sft: {len(train)} texts, {len(tokenizer)} tokens in the vocabulary; held out "
        f"{held_out:.3f} nats a token (perplexity {np.exp(held_out):.1f})"
    )


def save_policy(
    run: Run,
    path: Path,
    config: DecoderConfig,
    params: Any,
    tokenizer: PreTrainedTokenizerFast,
    like: dict[str, Any] | None = None,
) -> None:
    """A Hugging Face directory whose defaults for generation are the distribution of this run;
    ``like``: the config.json of the model it comes from."""
    hf.save_decoder(
        path, config, params, bos_id=tokenizer.bos_token_id,
        eos_id=inputs.eos_id(run, tokenizer), pad_id=tokenizer.pad_token_id,
        temperature=run.settings.sampling.temperature, like=like,
    )  # fmt: skip
    tokenizers.save(tokenizer, path)


def _check_positions(name: str, max_tokens: int, positions: int) -> None:
    if max_tokens > positions:
        raise InputError(
            f"{name}.fit.max_tokens={max_tokens} is more than {name}.model.positions={positions}"
        )


def reward(run: Run) -> None:
    """The reward model: trained on the labels, or the user's own, checked."""
    r = run.settings.reward
    if r.function or r.path:
        inputs.load_reward(run, inputs.load_tokenizer(run))
    else:
        _classifier(run, "reward", r, run.workdir.reward, run.settings.seed)


def evaluator(run: Run) -> None:
    """The reward that only measures: trained apart from the first, or the user's own, checked.

    Of the embedded reviews it reads texts of a seed of its own. A user's labelled texts serve both.
    """
    e = run.settings.evaluator
    if e.function or e.path:
        inputs.load_evaluator(run, inputs.load_tokenizer(run))
    elif e.train:
        _classifier(run, "evaluator", e, run.workdir.evaluator, run.settings.seed + EVALUATOR_SEED)
    else:
        log("evaluator: none (evaluator.train=False, no path, no function)")


def _classifier(run: Run, stage: str, r: Reward | Evaluator, path: Path, seed: int) -> None:
    """Trains a classifier of the labels and writes it to ``path``."""
    tokenizer = inputs.load_tokenizer(run)
    fit = r.fit
    _check_positions(stage, fit.max_tokens, r.model.positions)
    if r.label not in LABELS:
        raise InputError(f"{stage}.label={r.label!r}: label 0 is NEGATIVE, label 1 POSITIVE")
    end = inputs.eos_id(run, tokenizer)
    found = inputs.texts(run, seed)
    splits = {"train": found.train, "test": found.test}
    # The texts of the reference without their EOS: it is part of no reward.
    tokens = {
        split: [
            tuple(t for t in row if t != end)
            for row in inputs.encode_texts(run, tokenizer, examples, fit.max_tokens)
        ]
        for split, examples in splits.items()
    }
    labels = {split: [e.label for e in examples] for split, examples in splits.items()}
    config = decoder_config(r.model, len(tokenizer))
    body_key, head_key = jax.random.split(run.key(stage))
    params = sharding.place(
        {"decoder": INIT(config, body_key),
         "score": heads.init_score(config, len(LABELS), head_key)},
        run.mesh,
    )  # fmt: skip
    params, held_out = _fit(
        run, stage, params, partial(supervised.classifier_loss, config=config), fit, tokens,
        labels, inputs.pad_id(tokenizer),
    )  # fmt: skip
    hf.save_classifier(
        path, config, params, LABELS,
        bos_id=tokenizer.bos_token_id, eos_id=end, pad_id=inputs.pad_id(tokenizer),
    )  # fmt: skip
    tokenizers.save(tokenizer, path)
    accuracy = supervised.accuracy(
        sharding.place(params, run.mesh), config, tokens["test"], labels["test"], fit.batch_size,
        inputs.pad_id(tokenizer), run.mesh,
    )  # fmt: skip
    run.workdir.write_json(
        path / "fit.json", {"held_out_nats": held_out, "held_out_accuracy": accuracy}
    )
    log(f"{stage}: held out {held_out:.3f} nats a text, accuracy {accuracy:.3f}")
