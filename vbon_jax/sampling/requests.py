"""What is asked of a model: prompts and how many responses, as padded rows."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError

BUCKET = 8  # longer prompts are padded up to a multiple of this: one compile a bucket


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


def bucket_length(length: int) -> int:
    """``length`` rounded up: to a power of two below BUCKET, to a multiple of it above."""
    return 1 << (length - 1).bit_length() if length < BUCKET else -(-length // BUCKET) * BUCKET


def pad_left(prompts: Sequence[Sequence[int]], length: int, pad_id: int) -> Prompts:
    """Pads prompts on the left to ``length`` tokens.

    Raises:
      InputError: an empty prompt; a decoder needs one token to predict the next from.
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


def requests_for(prompts: Sequence[Prompt], which: int | range) -> list[Request]:
    """The responses ``which``, or that many, to each prompt, in the order of the prompts."""
    samples = range(which) if isinstance(which, int) else which
    return [Request(p.id, i, p.tokens) for p in prompts for i in samples]


def adjacent(requests: Sequence[Request], ways: int = 1) -> int:
    """How many rows next to each other have a prompt in common, everywhere in a batch.

    Args:
      requests: the rows.
      ways: over how many devices they are split; each has whole prompts.

    Returns:
      The largest such number.
    """
    runs = [len(list(run)) for _, run in itertools.groupby(r.tokens for r in requests)]
    shared = math.gcd(*runs)
    whole = [k for k in range(1, shared + 1) if shared % k == 0 and len(requests) // k % ways == 0]
    return max(whole, default=1)


def index(prompts: Sequence[Prompt]) -> tuple[dict[int, Prompt], dict[int, int]]:
    """Each prompt, and its row, by its id."""
    return {p.id: p for p in prompts}, {p.id: i for i, p in enumerate(prompts)}
