"""Several rewards as one: a weighted sum, and a penalty on responses without EOS."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import lm
from vbon_jax.rewards.base import Reward

MISSING_EOS = ("none", "replace", "subtract")
FOLD = 64  # calls whose statistics may stay on the device


class Part(NamedTuple):
    """A term of a weighted sum of rewards.

    Attributes:
      name: its name in messages and metrics.
      weight: its factor.
      reward: the reward.
    """

    name: str
    weight: float
    reward: Reward


class _Call(NamedTuple):
    """The statistics of one call, perhaps still on the device; the first `real` rows count."""

    real: int
    parts: tuple[Any, ...]
    missing: Any | None


class WeightedReward:
    """The sum of weight x reward in float32, with a penalty on responses without EOS.

    One part of weight 1 without a penalty returns its own rewards unchanged.

    Attributes:
      positions: the least `positions` of the parts, in the policy's tokens; None where none of them
        limits the length.
    """

    def __init__(
        self,
        parts: Sequence[Part | tuple[str, float, Reward]],
        missing_eos: str,
        value: float,
        end_ids: Sequence[int],
        key: str = "reward",
    ):
        """Makes the sum.

        Args:
          parts: the terms, (name, weight, reward) each: the first is the reward of the config group
            `key` itself, the rest its `others`.
          missing_eos: the reward of a response without EOS: "none", the sum; "replace", `value`;
            "subtract", the sum minus `value`.
          value: see missing_eos.
          end_ids: the ids that end a response of the policy; none where it has a fixed length,
            which turns the penalty off.
          key: the config group that messages name.

        Raises:
          InputError: there is no part, two have one name, a weight or the value is not finite,
            missing_eos is none of the above, or the value to subtract is negative.
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
        self._missing_eos = missing_eos if end_ids else "none"
        self._value, self._end_ids = np.float32(value), tuple(end_ids)
        own_limits = [getattr(part.reward, "positions", None) for part in self._parts]
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
        """Returns float32 rewards; see `base.Reward`.

        They are on the device and [B] where those of all parts are, else on the host and
        [len(prompts)].
        """
        found: list[Any] = [
            part.reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT)
            for part in self._parts
        ]
        if len(found) == 1 and self._parts[0].weight == 1 and self._missing_eos == "none":
            return found[0]
        on_device = all(isinstance(rewards, jax.Array) for rewards in found)
        if not on_device:
            found = [np.asarray(rewards)[: len(prompts)] for rewards in sharding.fetch(found)]
        missing = None
        if self._missing_eos != "none":
            tokens: Any = response_BxT
            mask: Any = response_mask_BxT
            if not on_device:
                tokens, mask = (x[: len(prompts)] for x in sharding.fetch((tokens, mask)))
            missing = ~(mask & lm.is_end(tokens, self._end_ids)).any(axis=1)
        if missing is not None or len(found) > 1:
            self._calls.append(_Call(len(prompts), tuple(found), missing))
            if len(self._calls) >= FOLD:
                self._fold()
        return self._penalised(self._sum(found), missing)

    def of_prefixes(self, prompts: Sequence[Prompt], *rows: Any) -> Any:
        """Returns the rewards before each token, where all parts give theirs at once.

        None as well where responses without EOS are penalised: these are all without.
        """
        return self._at_once("of_prefixes", prompts, *rows)

    def of_candidates(self, prompts: Sequence[Prompt], *rows: Any) -> Any:
        """Returns the rewards with each candidate, where all parts do, as `of_prefixes`."""
        return self._at_once("of_candidates", prompts, *rows)

    def _at_once(self, name: str, *args: Any) -> Any:
        if self._missing_eos != "none":
            return None
        found = []
        for part in self._parts:
            of = getattr(part.reward, name, None)
            values = None if of is None else of(*args)
            if values is None:
                return None
            found.append(values)
        return self._sum(found)

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
        """Adds the statistics of the calls up; all but the newest have been computed by now."""
        for real, parts, missing in sharding.fetch(self._calls):
            self._sums[0] += real
            if missing is not None:
                self._sums[1] += np.sum(missing[:real])
            self._sums[2:] += [np.sum(part[:real], dtype=np.float64) for part in parts]
        self._calls = []

    def take_counts(self) -> dict[str, float]:
        """Takes the statistics since they were last taken.

        Returns:
          Values by metric name, each only where it is collected: "responses", the number of
          responses scored; "missing_eos", the share without EOS, where that is penalized;
          "reward/<name>", the mean of each part before its weight, where there are several;
          "reward_truncated", the share of texts that a reward model's context length truncated
          ("reward_truncated/<name>" where several parts truncate).
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
