"""Several rewards as one: a weighted sum, and what a response without an end costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError

MISSING_EOS = ("none", "replace", "subtract")
FOLD = 64  # calls whose counts may wait on the device

# (prompts, prompt ids and mask, response ids and mask) -> rewards [B], or of the real rows alone
Reward = Callable[[Sequence[Prompt], Any, Any, jax.Array, jax.Array], Any]


class Part(NamedTuple):
    """One of the rewards that make a sum: its name in messages and metrics, its factor."""

    name: str
    weight: float
    reward: Reward


class _Call(NamedTuple):
    """What a call leaves to be counted, perhaps still on the device: so many rows are real."""

    real: int
    parts: tuple[Any, ...]
    missing: Any | None


class WeightedReward:
    """The sum of weight x reward in float32, and the penalty on responses that do not end.

    A part that has ``take_counts`` (as ``TextReward`` has) is asked for what it cut. One part of
    weight 1 without a penalty gives its own rewards, untouched.
    """

    def __init__(
        self,
        parts: Sequence[Part | tuple[str, float, Reward]],
        missing_eos: str,
        value: float,
        eos_id: int | None,
        key: str = "reward",
    ):
        """
        Args:
          parts: the first is the reward of the group ``key`` itself, the rest its ``others``.
          missing_eos: what becomes of the sum where a response ends without EOS: "none" leaves it,
            "replace" puts ``value`` in its place, "subtract" takes ``value`` from it.
          eos_id: ends a response; None where responses have a fixed length and none can lack it.
          key: the config group that messages name.

        Raises InputError on no part, two of one name, a weight or value that is not finite, another
        ``missing_eos``, or a negative value to subtract.
        """
        self._parts = [Part(*part) for part in parts]
        names = [part.name for part in self._parts]
        if not names:
            raise InputError(f"{key} has no part: set {key}.path or {key}.function")
        if len(set(names)) < len(names):
            raise InputError(f"{key}.others: the names {', '.join(names)} must differ")
        for i, (name, weight, _) in enumerate(self._parts):
            if not math.isfinite(weight):
                where = f"{key}.others.{name}" if i else key
                raise InputError(f"{where}.weight={weight!r}: give a finite number")
        if missing_eos not in MISSING_EOS:
            raise InputError(
                f"{key}.missing_eos={missing_eos!r}: choose one of {', '.join(MISSING_EOS)}"
            )
        if missing_eos != "none" and not math.isfinite(value):
            raise InputError(f"{key}.missing_eos_value={value!r}: give a finite number")
        if missing_eos == "subtract" and value < 0:
            raise InputError(
                f"{key}.missing_eos_value={value!r}: it is taken away ({key}.missing_eos="
                "'subtract'), so give the penalty as a positive number"
            )
        self._missing_eos = "none" if eos_id is None else missing_eos
        self._value, self._eos_id = np.float32(value), eos_id
        own_limits = [getattr(part.reward, "positions", None) for part in self._parts]
        # The longest prompt and response, in the policy's tokens, that all parts can read.
        self.positions: int | None = min((p for p in own_limits if p is not None), default=None)
        self._calls: list[_Call] = []
        self._sums = np.zeros(2 + len(self._parts))  # responses, missing EOS, each part

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> Any:
        """Float32 rewards, on the device where all parts are, else of the real rows on the host."""
        found: list[Any] = [
            part.reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT)
            for part in self._parts
        ]
        if len(found) == 1 and self._parts[0].weight == 1 and self._missing_eos == "none":
            return found[0]
        on_device = all(isinstance(rewards, jax.Array) for rewards in found)
        if not on_device:
            found = [np.asarray(rewards)[: len(prompts)] for rewards in jax.device_get(found)]
        missing = None
        if self._missing_eos != "none":
            tokens: Any = response_BxT
            mask: Any = response_mask_BxT
            if not on_device:
                tokens, mask = (x[: len(prompts)] for x in jax.device_get((tokens, mask)))
            missing = ~(mask & (tokens == self._eos_id)).any(axis=1)
        if missing is not None or len(found) > 1:
            self._calls.append(_Call(len(prompts), tuple(found), missing))
            if len(self._calls) >= FOLD:
                self._fold()
        return self._penalised(self._sum(found), missing)

    def _sum(self, found: Sequence[Any]) -> Any:
        total = np.float32(self._parts[0].weight) * found[0].astype(np.float32)
        for part, rewards in zip(self._parts[1:], found[1:], strict=True):
            total = total + np.float32(part.weight) * rewards.astype(np.float32)
        return total

    def _penalised(self, total: Any, missing: Any | None) -> Any:
        if missing is None:
            return total
        where = jnp.where if isinstance(total, jax.Array) else np.where
        replaced = self._missing_eos == "replace"
        return where(missing, self._value if replaced else total - self._value, total)

    def _fold(self) -> None:
        """Adds up what the calls left; they are done by now, but for the newest."""
        for real, parts, missing in jax.device_get(self._calls):
            self._sums[0] += real
            if missing is not None:
                self._sums[1] += np.sum(missing[:real])
            self._sums[2:] += [np.sum(part[:real], dtype=np.float64) for part in parts]
        self._calls = []

    def take_counts(self) -> dict[str, float]:
        """What was seen since last asked, by the name of the metric; left out where not counted.

        "responses": how many; "missing_eos": the share without EOS, where that has a penalty;
        "reward/<name>": the mean of each part before its weight, where there are several;
        "reward_truncated": the share a text reward had to cut ("reward_truncated/<name>" where
        there are several such).
        """
        self._fold()
        counts: dict[str, float] = {}
        responses, missing, *sums = self._sums.tolist()
        self._sums[:] = 0
        if responses:
            counts["responses"] = responses
            if self._missing_eos != "none":
                counts["missing_eos"] = missing / responses
            if len(sums) > 1:
                for part, total in zip(self._parts, sums, strict=True):
                    counts[f"reward/{part.name}"] = total / responses
        readers = [part for part in self._parts if hasattr(part.reward, "take_counts")]
        for part in readers:
            own = part.reward.take_counts()  # type: ignore[attr-defined]
            name = "reward_truncated" + (f"/{part.name}" if len(readers) > 1 else "")
            if own:
                counts["responses"] = own["responses"]
                counts[name] = own["reward_truncated"]
        return counts
