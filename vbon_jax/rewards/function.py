"""A user's Python callable as the reward: texts of prompts and responses in, floats out."""

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vbon_jax import processes, sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.rewards.base import Decode, checked, texts_of
from vbon_jax.signals import interruptible

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


def load(name: str, key: str = "reward") -> RewardFunction:
    """Imports a reward function by name.

    Args:
      name: "module:function".
      key: the config group that messages name.

    Returns:
      The callable.

    Raises:
      InputError: the name has another form, or the module or the function is not there.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"{key}.function={name!r}: write it as module:function")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ours is for results
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
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
    """Calls a reward function and checks what it returns.

    Args:
      name: the function's name, for messages.
      function: the function.
      prompts: texts, at least one.
      responses: as many texts.
      key: the config group that messages name.

    Returns:
      function(prompts, responses) as float32 [B]. What it prints goes to standard error.

    Raises:
      Interrupted: a signal came, and the function did not return.
      InputError: the function raised, or returned another number of values than there are
        responses, a value that is no number, or one that is not finite; names the example.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), interruptible():
            values = list(function(prompts, responses))
    except (Exception, SystemExit) as error:
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
    for i, value in enumerate(values):
        try:
            float(value)
        except OverflowError:
            pass  # a number, which is not finite
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{key}.function={name!r} returned {value!r}, not a number, for "
                f"prompt={prompts[i]!r} response={responses[i]!r}"
            ) from error
    return checked(values, f"{key}.function={name!r} returned", prompts, responses.__getitem__)


class FunctionReward:
    """A reward function behind the call of `base.Reward`: responses are decoded to text."""

    def __init__(
        self,
        function: str | RewardFunction,
        decode: Decode,
        end_ids: Sequence[int],
        key: str = "reward",
    ):
        """Makes the reward of a function.

        Args:
          function: (prompts, responses) -> rewards, or its name, "module:function".
          decode: see `base.Decode`.
          end_ids: the ids that end a response of the policy; none where it has a fixed length.
          key: the config group that messages name.

        Raises:
          InputError: as `load`.
        """
        if isinstance(function, str):
            self._name, self._function = function, load(function, key)
        else:
            self._name = getattr(function, "__qualname__", type(function).__name__)
            self._function = function
        self._decode, self._end_ids, self._key = decode, tuple(end_ids), key

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> np.ndarray:
        """Returns float32 rewards [len(prompts)]; see `base.Reward`.

        Of a run of several processes each calls the function on rows of its own.

        Raises:
          InputError: as `call`.
        """
        del prompt_BxP, prompt_mask_BxP
        tokens, mask = sharding.fetch((response_BxT, response_mask_BxT))

        def score(rows: slice) -> np.ndarray:
            own = prompts[rows]
            responses = texts_of(own, tokens[rows], mask[rows], self._end_ids, self._decode)
            return call(self._name, self._function, [p.text for p in own], responses, self._key)

        return processes.joined(len(prompts), score)
