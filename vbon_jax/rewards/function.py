"""A user's Python callable as the reward: batches of prompts and responses in, floats out."""

import importlib
import traceback
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
Decode = Callable[[list[list[int]]], list[str]]


def load(name: str, key: str = "reward") -> RewardFunction:
    """The callable named "module:function"; ``key`` is the config group that messages name.

    Raises InputError when the name has another form, or the module or function is not there.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"{key}.function={name!r}: write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a user's module may raise anything
        raise InputError(
            f"{key}.function={name!r}: cannot import {module_name!r} "
            f"({type(error).__name__}: {error}); "
            "put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"{key}.function={name!r}: {module_name} has no callable {attribute!r}")
    return function


def call(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    key: str = "reward",
) -> np.ndarray:
    """function(prompts, responses) as float32 [B].

    Raises InputError, with the example named, when the function raises, returns another number of
    values than it was given, something that is not a number, or NaN.
    """
    try:
        values = list(function(prompts, responses))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{key}.function={name!r} raised {type(error).__name__}: {error} "
            f"({frame.filename}:{frame.lineno}) on a batch of "
            f"{len(prompts)}, the first of it prompt={prompts[0]!r} response={responses[0]!r}"
        ) from error
    if len(values) != len(responses):
        raise InputError(
            f"{key}.function={name!r} returned {len(values)} values for {len(responses)} responses"
        )
    rewards = np.empty(len(values), np.float32)
    for i, value in enumerate(values):
        try:
            rewards[i] = value
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{key}.function={name!r} returned {value!r}, not a number, for "
                f"prompt={prompts[i]!r} response={responses[i]!r}"
            ) from error
        if np.isnan(rewards[i]):
            raise InputError(
                f"{key}.function={name!r} returned NaN for "
                f"prompt={prompts[i]!r} response={responses[i]!r}"
            )
    return rewards


def texts_of(
    response_BxT: jax.Array,
    response_mask_BxT: jax.Array,
    count: int,
    eos_id: int | None,
    decode: Decode,
) -> list[str]:
    """The texts of the first ``count`` responses of a padded batch, EOS left out."""
    tokens, mask = jax.device_get((response_BxT, response_mask_BxT))
    tokens, mask = tokens[:count], mask[:count]
    if eos_id is not None:
        mask = mask & (tokens != eos_id)
    return decode([row[keep].tolist() for row, keep in zip(tokens, mask)])


class FunctionReward:
    """A callable reward behind the same call as ``ClassifierReward``: ids are decoded to text."""

    def __init__(self, name: str, decode: Decode, eos_id: int | None, key: str = "reward"):
        """``decode`` turns lists of ids into texts; ``name`` is "module:function"; ``key`` is the
        config group that messages name."""
        self._name, self._function, self._key = name, load(name, key), key
        self._decode, self._eos_id = decode, eos_id

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> np.ndarray:
        """Float32 rewards, one a prompt; the response's text leaves EOS out.

        ``prompts`` may be fewer than the rows: those that only fill the batch are left alone.
        """
        del prompt_BxP, prompt_mask_BxP
        responses = texts_of(
            response_BxT, response_mask_BxT, len(prompts), self._eos_id, self._decode
        )
        return call(self._name, self._function, [p.text for p in prompts], responses, self._key)
