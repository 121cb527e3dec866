"""What a reward is: a callable that scores a batch of responses."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sample_lines import is_finite
from vbon_jax.errors import InputError
from vbon_jax.models import lm

# Ids of prompts, ids of a response to each -> what the responses say after them; the policy's
# tokenizer decides, see ``data.tokenizer.continuations``.
Decode = Callable[[Sequence[Sequence[int]], list[list[int]]], list[str]]


class Reward(Protocol):
    """Scores a padded batch of responses.

    Four attributes are optional: `positions` (int or None), the greatest number of the policy's
    tokens, prompt and response together, that can be scored; `take_counts() -> dict[str, float]`,
    statistics since the last call by metric name (see `combined.WeightedReward`); `of_prefixes`,
    which takes what a call takes and gives float32 [B, T], at token t the reward of the t tokens
    before it as if they were all; and `of_candidates`, which takes int32 ids [B, T, K] besides and
    gives float32 [B, T, K], at token t and id k the reward of the t tokens before it and that id.
    Both give None where they cannot do so at once.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: Any,
        prompt_mask_BxP: Any,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
        /,
    ) -> Any:
        """Returns a reward for each response.

        A row counts where its mask is True; padding may be on either side. The EOS of a response,
        where one was sampled, is part of it.

        Args:
          prompts: the prompt of each row; rows after the last prompt only fill the batch.
          prompt_BxP: int32 token ids of the prompts.
          prompt_mask_BxP: bool mask of the prompts' real tokens.
          response_BxT: int32 token ids of the responses.
          response_mask_BxT: bool mask of the responses' real tokens.

        Returns:
          Rewards on the device or the host: float32 [B], or [len(prompts)], those of the rows that
          have a prompt.
        """
        ...


def checked(
    values: Sequence[Any] | np.ndarray,
    who: str,
    prompts: Sequence[str],
    response_of: Callable[[int], str],
) -> np.ndarray:
    """Returns rewards as float32, after checking that they are finite.

    An infinite reward has no mean and no difference from another, and stands for any number of
    ranks; so it is refused wherever one is made, from the first call on.

    Args:
      values: B numbers.
      who: what gave them, with which the message starts.
      prompts: B texts.
      response_of: the text of a response, by its row.

    Returns:
      float32 [B].

    Raises:
      InputError: a value is NaN, or not finite in float32; names the first with its example.
    """
    bad = [i for i, value in enumerate(values) if not is_finite(value)]
    if bad:
        i = bad[0]
        shown = values[i].item() if isinstance(values[i], np.generic) else values[i]
        raise InputError(
            f"{who} {'NaN' if shown != shown else repr(shown)} for prompt={prompts[i]!r} "
            f"response={response_of(i)!r} ({len(bad)} of {len(values)} in this batch): a reward "
            "must be a number that is finite in float32; clip it, or give such a response a large "
            "finite number, as -100.0"
        )
    return np.asarray(values, np.float32)


def texts_of(
    prompts: Sequence[Prompt],
    response_BxT: jax.Array,
    response_mask_BxT: jax.Array,
    end_ids: Sequence[int],
    decode: Decode,
) -> list[str]:
    """Decodes the responses of a padded batch after their prompts, without their end.

    Args:
      prompts: the prompts of the first rows; the rest only fill the batch.
      response_BxT: int32 token ids.
      response_mask_BxT: bool mask of the real tokens.
      end_ids: the ids that end a response; none where responses have a fixed length.
      decode: (ids of prompts, ids of responses) -> texts.

    Returns:
      A text for each prompt.
    """
    tokens, mask = sharding.fetch((response_BxT, response_mask_BxT))
    tokens, mask = tokens[: len(prompts)], mask[: len(prompts)]
    mask = mask & ~lm.is_end(tokens, end_ids)
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask)]
    return decode([p.tokens for p in prompts], rows)


def counts_of(reward: Reward | None, role: str = "reward") -> dict[str, float]:
    """Takes the statistics that a reward has collected since they were last taken.

    Args:
      reward: the reward; one without `take_counts`, or None, has no statistics.
      role: "reward", or what the metrics are named after instead: of the role "evaluator",
        "reward_truncated" becomes "evaluator_truncated", "missing_eos" "evaluator_missing_eos" and
        "reward/<name>" "evaluator/<name>".

    Returns:
      Values by metric name; the number of responses is left out.
    """
    take = getattr(reward, "take_counts", None)
    counts: dict[str, float] = take() if take is not None else {}
    named = {
        name if name.startswith("reward") or role == "reward" else f"{role}_{name}": value
        for name, value in counts.items()
        if name != "responses"
    }
    return {name.replace("reward", role, 1): value for name, value in named.items()}


def counts_line(counts: dict[str, float]) -> str:
    """Formats the statistics of a reward for the log.

    Args:
      counts: what `counts_of` returned.

    Returns:
      "name value, ...": shares in percent, mean rewards as numbers.
    """
    return ", ".join(
        f"{name} {value:.3f}" if "/" in name and "truncated" not in name else f"{name} {value:.1%}"
        for name, value in counts.items()
    )
