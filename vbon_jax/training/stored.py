"""The stored samples of the training prompts, as rows beside a rollout's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.responses import ScoredRollout


@dataclasses.dataclass(frozen=True)
class Stored:
    """M samples of each of P prompts, on the host.

    Attributes:
      tokens_PxMxS: int32, the prompt padded on the left, then the response's slots.
      mask_PxMxS: bool, True on real tokens of both.
      response_mask_PxMxT: bool, True on those of the response.
      rewards_PxM: float32.
      temperature: that they were drawn at.
    """

    tokens_PxMxS: np.ndarray
    mask_PxMxS: np.ndarray
    response_mask_PxMxT: np.ndarray
    rewards_PxM: np.ndarray
    temperature: float

    def beside(self, row_G: np.ndarray, count: int, m: int, seed: int, step: int) -> ScoredRollout:
        """Some samples of each of the prompts of a rollout, drawn without replacement.

        Args:
          row_G: rows of the prompts, one a group.
          count: samples of each.
          m: the first of each that are drawn from.
          seed: of the draw.
          step: the iteration, likewise.

        Returns:
          G * count rows, those of a prompt in a row.
        """
        rng = np.random.default_rng((seed, step))
        column_Gxm = np.tile(np.arange(m), (len(row_G), 1))
        column_GxC = rng.permuted(column_Gxm, axis=1)[:, :count]
        at = (np.repeat(row_G, count), column_GxC.ravel())
        T = self.response_mask_PxMxT.shape[-1]
        tokens, mask, response_mask = (
            x[at] for x in (self.tokens_PxMxS, self.mask_PxMxS, self.response_mask_PxMxT)
        )
        unknown: Any = np.zeros(
            response_mask.shape, np.float32
        )  # their log-probs, which none reads
        ended: Any = np.zeros(len(tokens), bool)
        rollout = Rollout(tokens[:, -T:], response_mask, unknown, ended)
        return ScoredRollout(
            tokens[:, :-T], mask[:, :-T], rollout, self.rewards_PxM[at], at[0].astype(np.int32),
            self.temperature,
        )  # fmt: skip


def joined(batch: ScoredRollout) -> ScoredRollout:
    """The rows of a rollout, then those stored beside it; traceable."""
    stored = batch.stored
    if stored is None:
        return batch
    own = dataclasses.replace(batch, stored=None)
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), own, stored)
    return sharding.constrain(rows, "batch")
