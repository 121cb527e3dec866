"""Maximum likelihood: the reference model on texts, the reward classifier on labels."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vbon_jax import processes, sharding
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, heads
from vbon_jax.progress import reporting
from vbon_jax.rewards import classifier
from vbon_jax.signals import Stopped, StopSignal
from vbon_jax.training import state as train_state
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.options import Fit

BUCKET = 16  # texts are padded to a multiple of this: one compile a bucket
SAVE_SECONDS = 120.0  # between checkpoints


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of labelled texts.

    Attributes:
      texts: ids of each text, at least two tokens each.
      labels: one a text.
      pad_id: fills empty slots.
    """

    texts: Sequence[Sequence[int]]
    labels: Sequence[int]
    pad_id: int


class TextBatch(NamedTuple):
    """A batch of texts padded on the right; a row that only fills it has an empty mask.

    Attributes:
      tokens_BxT: int32 ids.
      mask_BxT: bool, True on tokens of the text.
      label_B: int32.
    """

    tokens_BxT: Any
    mask_BxT: Any
    label_B: Any


Loss = Callable[[Any, TextBatch], tuple[jax.Array, jax.Array]]


def language_model_loss(
    params: Any, batch: TextBatch, *, config: decoder.DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(token | those before) in nats over tokens 1..T-1, and their number."""
    hidden = decoder.hidden(params["decoder"], config, batch.tokens_BxT, batch.mask_BxT)
    logits = decoder.logits(params["decoder"], config, hidden[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens_BxT[:, 1:])
    mask = batch.mask_BxT[:, 1:] & batch.mask_BxT[:, :-1]
    return jnp.sum(jnp.where(mask, nats, 0.0)), jnp.sum(mask)


def classifier_loss(
    params: Any, batch: TextBatch, *, config: decoder.DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label | text) in nats over the batch, and the number of texts.

    Only the label after the last token counts, as at scoring time.
    """
    hidden = decoder.hidden(params["decoder"], config, batch.tokens_BxT, batch.mask_BxT)
    logits = heads.score(params["score"], hidden, batch.mask_BxT)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label_B)
    real = jnp.any(batch.mask_BxT, axis=-1)
    return jnp.sum(jnp.where(real, nats, 0.0)), jnp.sum(real)


def epoch_batches(
    data: Corpus, batch_size: int, rng: np.random.Generator | None
) -> Iterator[TextBatch]:
    """Every text once, in batches of like length; shuffled by ``rng``, or in order of length.

    Padded lengths are multiples of BUCKET, and the last batch is filled with empty rows, so the
    number of compiled shapes is the number of buckets.
    """
    texts, labels = data.texts, data.labels
    lengths = np.array([-(-len(t) // BUCKET) * BUCKET for t in texts])
    batches = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if rng is not None:
            rng.shuffle(rows)
        batches += [(length, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    for length, rows in batches:
        tokens = np.full((batch_size, length), data.pad_id, np.int32)
        mask = np.zeros((batch_size, length), bool)
        label = np.zeros(batch_size, np.int32)
        for i, row in enumerate(rows.tolist()):
            tokens[i, : len(texts[row])] = texts[row]
            mask[i, : len(texts[row])] = True
            label[i] = labels[row]
        yield TextBatch(tokens, mask, label)


def steps_per_epoch(texts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Number of batches ``epoch_batches`` yields, without padding them."""
    _, counts = np.unique([-(-len(t) // BUCKET) for t in texts], return_counts=True)
    return int(np.sum(-(-counts // batch_size)))


def fit(
    title: str,
    params: Any,
    loss: Loss,
    data: Corpus,
    options: Fit,
    mesh: Mesh,
    seed: int,
    checkpointer: Checkpointer,
) -> Any:
    """Maximum likelihood by AdamW, from the newest checkpoint if there is one.

    Args:
      title: of the progress line.
      params: initial parameters on ``mesh``; donated.
      loss: (params, batch) -> (sum of nats, number of terms).
      data: the training texts.
      options: epochs, batch size, learning rate and weight decay.
      mesh: the device mesh.
      seed: of the order of texts.
      checkpointer: where the state goes every SAVE_SECONDS, at a signal, and is looked for first.

    Returns:
      Parameters after ``options.epochs`` passes.

    Raises:
      Stopped: after a signal.
      InputError: the loss stops being finite.
    """
    total = options.epochs * steps_per_epoch(data.texts, options.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(1, total // 20), max(2, total), 0.0
    )
    optimizer = train_state.adamw(schedule, 1e-8, options.weight_decay, 1.0)
    state = sharding.place(train_state.create(params, optimizer, jax.random.key(seed)), mesh)
    restored = checkpointer.restore(state)
    if restored is not None:
        state = restored[0]

    @partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        def mean_loss(params):
            nats, count = loss(params, batch)
            return nats / jnp.maximum(count, 1)

        value, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return sharding.constrain(new_state, ""), value

    done = int(state.step)
    step, saved_at = 0, time.monotonic()
    recent: list[float] = []
    with reporting(title, total, done) as report, StopSignal() as stop:
        for epoch in range(options.epochs):
            rng = np.random.default_rng((seed, epoch))
            for batch in epoch_batches(data, options.batch_size, rng):
                step += 1
                if step <= done:
                    continue
                state, value = update(state, sharding.place(batch, mesh, "batch"))
                recent = [*recent[-19:], float(value)]
                if not np.isfinite(recent[-1]):
                    first = step == done + 1 and done > 0
                    raise InputError(
                        f"{title}: the loss is {recent[-1]} at step {step} (step of the last "
                        f"checkpoint in {checkpointer.directory}: {checkpointer.latest_step}"
                        + (", which was restored just before: remove it to begin anew" * first)
                        + f"): lower {title}'s learning rate"
                    )
                report.update(step, f"loss {np.mean(recent):.3f} nats")
                signum = processes.signal(stop)
                due = processes.most(time.monotonic() - saved_at > SAVE_SECONDS)
                if due or signum is not None:
                    checkpointer.save(step, state, {})
                    saved_at = time.monotonic()
                if signum is not None:
                    stop.take()
                    checkpointer.wait()
                    raise Stopped(signum, f"{title} is saved at step {step}")
    return state.params


def mean_loss(params: Any, loss: Loss, data: Corpus, batch_size: int, mesh: Mesh) -> float:
    """Mean nats a term over held-out texts."""
    jitted = jax.jit(loss)
    sums = np.zeros(2)
    for batch in epoch_batches(data, batch_size, None):
        found = sharding.fetch(jitted(params, sharding.place(batch, mesh, "batch")))
        sums += np.array(found, np.float64)
    return float(sums[0] / sums[1])


def accuracy(
    params: Any, config: decoder.DecoderConfig, data: Corpus, batch_size: int, mesh: Mesh
) -> float:
    """Share of texts to which a two-label classifier gives its own label the higher score."""
    score = partial(classifier.score, config=config, kind="log_odds", label=1)
    right = 0.0
    for batch in epoch_batches(data, batch_size, None):
        on_device = sharding.place(batch, mesh, "batch")
        log_odds = sharding.fetch(score(params, on_device.tokens_BxT, on_device.mask_BxT))
        real = batch.mask_BxT.any(axis=1)
        right += float(np.sum((log_odds > 0)[real] == batch.label_B[real]))
    return right / len(data.texts)
