"""Stage ``sft``: tokenizer and reference model."""

from functools import partial

import numpy as np

from vbon_jax import sharding
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.models import hf, lm
from vbon_jax.models.hf import hub
from vbon_jax.models.lm import LanguageModel
from vbon_jax.progress import log
from vbon_jax.stages import fitting, loading, sources
from vbon_jax.stages.base import Run
from vbon_jax.training import supervised
from vbon_jax.training.supervised import Corpus


def run(run: Run) -> None:
    """Learns tokenizer and reference model from the texts, or checks the user's own."""
    s, workdir = run.config, run.workdir
    own = hf.read_config(hub.resolve(s.reference.path))[1] if s.reference.path else None
    train, test, _ = sources.Texts([], [], []) if own else sources.texts(run)
    tokenizer = sources.make_tokenizer(run, train)
    ends = loading.end_ids(run, tokenizer)  # refuses one without EOS before any work
    if own:
        if own.vocab_size < len(tokenizer):
            raise InputError(
                f"reference.path={s.reference.path!r} has {own.vocab_size} embeddings, its "
                f"tokenizer {len(tokenizer)} tokens: the directory does not fit together"
            )
        tokenizers.save(tokenizer, workdir.tokenizer)
        return
    options = s.reference.fit
    fitting.check_positions("reference", options.max_tokens, s.reference.model.positions)
    config = fitting.decoder_config(s.reference.model, len(tokenizer))
    params = sharding.place({"decoder": fitting.INIT(config, run.key("sft"))}, run.mesh)
    data = {}
    for split, examples in (("train", train), ("test", test)):
        rows = sources.encode_texts(run, tokenizer, examples, options.max_tokens)
        data[split] = Corpus(rows, [0] * len(rows), lm.pad_id(tokenizer))
    loss = partial(supervised.language_model_loss, config=config)
    params, held_out = fitting.fit(run, "sft", params, loss, options, data)
    tokenizers.save(tokenizer, workdir.tokenizer)
    lm.save(
        LanguageModel(config, params["decoder"], tokenizer), workdir.reference,
        temperature=s.sampling.temperature, end_ids=ends,
    )  # fmt: skip
    workdir.write_json(
        workdir.reference / "fit.json", {"held_out_nats_per_token": held_out, "texts": len(train)}
    )
    log(
        f"sft: {len(train)} texts, {len(tokenizer)} tokens in the vocabulary; held out "
        f"{held_out:.3f} nats a token (perplexity {np.exp(held_out):.1f})"
    )
