"""Statistics of a policy against the reference: pure functions of NumPy arrays."""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over prompts and its 95% interval (low, high)."""

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        """The 95% interval, [low, high]."""
        return [self.low, self.high]


def over_prompts(values_PxS: np.ndarray) -> Estimate:
    """Mean over prompts of the mean over a prompt's samples, with mean +- 1.96 standard errors.

    The prompt is the unit of sampling: responses to one prompt are not independent draws of the
    task, so the interval comes from the spread between prompts.

    Args:
      values_PxS: P prompts (at least 2) with S samples each; a vector [P] is one sample each.

    Raises ValueError for fewer than two prompts: one has no spread.
    """
    values = np.asarray(values_PxS, np.float64)
    per_prompt = values.reshape(len(values), -1).mean(axis=1)
    if per_prompt.size < 2:
        raise ValueError(f"{per_prompt.size} prompts: an interval over prompts needs at least 2")
    mean = float(per_prompt.mean())
    half = 1.96 * float(per_prompt.std(ddof=1)) / np.sqrt(per_prompt.size)
    return Estimate(mean, mean - half, mean + half)


def win_rates(rewards_PxS: np.ndarray, sorted_rewards_PxM: np.ndarray) -> np.ndarray:
    """P(reward beats a reference reward of the same prompt), ties counted half, over all m of them.

    Args:
      rewards_PxS: rewards of the policy's responses.
      sorted_rewards_PxM: reference rewards of each prompt, ascending.

    Returns:
      float64 [P, S], each in [0, 1].
    """
    out = np.empty(np.shape(rewards_PxS), np.float64)
    for row, (rewards, references) in enumerate(zip(rewards_PxS, sorted_rewards_PxM, strict=True)):
        below = np.searchsorted(references, rewards, side="left")
        up_to = np.searchsorted(references, rewards, side="right")
        out[row] = (below + up_to) / (2 * len(references))
    return out


def best_of(rewards_PxK: np.ndarray, n: int) -> np.ndarray:
    """Columns of the best-of-n winners: the argmax of each group of n consecutive samples.

    Samples of a prompt are exchangeable, so taking the first of equals breaks ties at random.

    Args:
      rewards_PxK: K = S * n rewards per prompt.
      n: of best-of-n.

    Returns:
      int [P, S]: indices into the K columns.
    """
    prompts, columns = np.shape(rewards_PxK)
    if n < 1 or columns % n:
        raise ValueError(f"{columns} samples a prompt do not make groups of n={n}")
    groups = np.asarray(rewards_PxK).reshape(prompts, columns // n, n)
    return groups.argmax(axis=2) + np.arange(columns // n) * n
