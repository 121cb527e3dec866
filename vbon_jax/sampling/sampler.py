"""The host side of sampling: padding, buckets, batches, and responses told apart by identity."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vbon_jax import sharding
from vbon_jax.errors import InputError
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.sampling import decode

BUCKET = 8  # longer prompts are padded up to a multiple of this: one compile a bucket


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    temperature: divides the logits, > 0.
    max_new_tokens: length limit in tokens, EOS included.
    eos_id: ends a response; None for responses of exactly ``max_new_tokens`` tokens.
    pad_id: fills empty slots; may be the EOS, since masks and not ids say what is real.
    top_k, top_p: filters for generation; 0 and 1.0 leave the distribution whole.
    """

    temperature: float
    max_new_tokens: int
    eos_id: int | None
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0


class Prompts(NamedTuple):
    """A left-padded batch of prompts: int32 ids and a bool mask, both [B, P], of NumPy or JAX."""

    tokens_BxP: Any
    mask_BxP: Any


@dataclasses.dataclass(frozen=True)
class Request:
    """One response to draw: the ``sample``-th of prompt ``prompt_id``."""

    prompt_id: int
    sample: int
    tokens: tuple[int, ...]


class Batch(NamedTuple):
    """What ``generate`` yields: the requests of a batch, the padded rows, and how many are real."""

    requests: Sequence[Request]
    prompts: Prompts
    rollout: decode.Rollout

    @property
    def size(self) -> int:
        return len(self.requests)


def bucket_length(length: int) -> int:
    """``length`` rounded up: to a power of two below BUCKET, to a multiple of it above."""
    return 1 << (length - 1).bit_length() if length < BUCKET else -(-length // BUCKET) * BUCKET


def pad_left(prompts: Sequence[Sequence[int]], length: int, pad_id: int) -> Prompts:
    """Prompts padded on the left to ``length`` tokens.

    Raises InputError on an empty prompt: a decoder needs one token to predict the next from.
    """
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(
                f"prompt {row} of the batch has no tokens: give every prompt at least one"
            )
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return Prompts(tokens, mask)


def draw(
    params: Any,
    config: DecoderConfig,
    sampling: Sampling,
    mesh: Mesh,
    key: jax.Array,
    step: int,
    requests: Sequence[Request],
    length: int | None = None,
) -> tuple[Prompts, decode.Rollout]:
    """One batch of responses, left on the device.

    Args:
      params: decoder parameters on ``mesh``.
      key: the stage's key; with (step, prompt id, sample) it fixes a response.
      step: training step, or 0 where there is none.
      requests: the rows; their number and ``length`` decide the compiled shape.
      length: padded prompt length in tokens; None takes the bucket of the longest.

    Returns:
      (prompts on the mesh, Rollout on the mesh).
    """
    if length is None:
        length = bucket_length(max(len(r.tokens) for r in requests))
    prompts = pad_left([r.tokens for r in requests], length, sampling.pad_id)
    ids = np.array([r.prompt_id for r in requests], np.int32)
    samples = np.array([r.sample for r in requests], np.int32)
    prompts, ids, samples = sharding.place((prompts, ids, samples), mesh, "batch")
    keys = decode.identity_keys(key, step, ids, samples)
    rollout = decode.rollout(
        params,
        prompts.tokens_BxP,
        prompts.mask_BxP,
        keys,
        np.float32(sampling.temperature),
        config=config,
        max_new_tokens=sampling.max_new_tokens,
        eos_id=sampling.eos_id,
        pad_id=sampling.pad_id,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    return prompts, rollout


def generate(
    params: Any,
    config: DecoderConfig,
    sampling: Sampling,
    mesh: Mesh,
    key: jax.Array,
    requests: Sequence[Request],
    batch_size: int,
) -> Iterator[Batch]:
    """Responses to all requests in order, ``batch_size`` rows at a time.

    The last batch is filled up with copies of its first row, so every batch has one shape, and
    prompts share one padded length. The next batch is dispatched before the last is handed out, so
    the host's work on one (scoring, writing) overlaps the device's on the other.

    Yields:
      Batch with arrays still on the device, filled rows included; only ``batch.size`` are real.
    """
    if not requests:
        return
    length = bucket_length(max(len(r.tokens) for r in requests))
    ahead: Batch | None = None
    for start in range(0, len(requests), batch_size):
        rows = requests[start : start + batch_size]
        filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
        batch = Batch(rows, *draw(params, config, sampling, mesh, key, 0, filled, length=length))
        if ahead is not None:
            yield ahead
        ahead = batch
    assert ahead is not None
    yield ahead
