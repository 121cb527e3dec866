"""Supervised fits of a run: what the stages sft, reward and evaluator share."""

from functools import partial
from pathlib import Path
from typing import Any

import jax

from vbon_jax import sharding
from vbon_jax.config import Evaluator, Model, Reward
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, heads, hf, lm
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.progress import log
from vbon_jax.stages import loading, sources
from vbon_jax.stages.base import Run
from vbon_jax.training import supervised
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.options import Fit
from vbon_jax.training.supervised import Corpus

LABELS = ("NEGATIVE", "POSITIVE")  # of label 0 and label 1
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


def fit(
    run: Run,
    stage: str,
    params: Any,
    loss: supervised.Loss,
    options: Fit,
    data: dict[str, Corpus],
) -> tuple[Any, float]:
    """Fits on data["train"]; returns (parameters on the host, mean nats on data["test"])."""
    checkpointer = Checkpointer(run.workdir.checkpoints(stage), keep=1)
    try:
        params = supervised.fit(
            stage, params, loss, data["train"], options, run.mesh, run.config.seed, checkpointer
        )
    finally:
        checkpointer.close()
    held_out = supervised.mean_loss(params, loss, data["test"], options.batch_size, run.mesh)
    return sharding.fetch(params), held_out


def check_positions(name: str, max_tokens: int, positions: int) -> None:
    """Raises InputError where texts are longer than the model that is to learn them."""
    if max_tokens > positions:
        raise InputError(
            f"{name}.fit.max_tokens={max_tokens} is more than {name}.model.positions={positions}"
        )


def classifier(run: Run, stage: str, r: Reward | Evaluator, path: Path, seed: int) -> None:
    """Trains a classifier of the labels and writes it to ``path``."""
    tokenizer = loading.tokenizer(run)
    options = r.fit
    check_positions(stage, options.max_tokens, r.model.positions)
    if r.label not in LABELS:
        raise InputError(f"{stage}.label={r.label!r}: label 0 is NEGATIVE, label 1 POSITIVE")
    ends, pad = loading.end_ids(run, tokenizer), lm.pad_id(tokenizer)
    found = sources.texts(run, seed)
    # The texts of the reference without their EOS: it is part of no reward.
    data = {
        split: Corpus(
            [
                tuple(t for t in row if t not in ends)
                for row in sources.encode_texts(run, tokenizer, examples, options.max_tokens)
            ],
            [e.label for e in examples],
            pad,
        )
        for split, examples in (("train", found.train), ("test", found.test))
    }
    config = decoder_config(r.model, len(tokenizer))
    body_key, head_key = jax.random.split(run.key(stage))
    params = sharding.place(
        {"decoder": INIT(config, body_key),
         "score": heads.init_score(config, len(LABELS), head_key)},
        run.mesh,
    )  # fmt: skip
    loss = partial(supervised.classifier_loss, config=config)
    params, held_out = fit(run, stage, params, loss, options, data)
    hf.save_classifier(
        path, config, params, LABELS, ids=hf.TokenIds(bos=tokenizer.bos_token_id, eos=ends, pad=pad)
    )
    tokenizers.save(tokenizer, path)
    accuracy = supervised.accuracy(
        sharding.place(params, run.mesh), config, data["test"], options.batch_size, run.mesh
    )
    run.workdir.write_json(
        path / "fit.json", {"held_out_nats": held_out, "held_out_accuracy": accuracy}
    )
    log(f"{stage}: held out {held_out:.3f} nats a text, accuracy {accuracy:.3f}")
