"""Responses and how they are drawn: what the engine gives, and what reads it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from vbon_jax.sampling import decode
from vbon_jax.sampling.requests import Prompts, Request


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
      temperature: divides the logits, > 0.
      max_new_tokens: length limit in tokens, EOS included.
      end_ids: each ends a response; none for responses of exactly ``max_new_tokens`` tokens.
      pad_id: fills empty slots; may be the EOS, since masks and not ids say what is real.
      top_k: keeps the k likeliest tokens, for generation only; 0 keeps all.
      top_p: keeps the smallest set of tokens of this mass, for generation only; 1.0 keeps all.
      likeliest: how many of the likeliest tokens at each slot are told beside the one drawn.
      trunk_layers: lower layers whose output is told as well, by ``draw``; 0 for none.
    """

    temperature: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0
    likeliest: int = 0
    trunk_layers: int = 0

    @property
    def limits(self) -> decode.Limits:
        """All but the temperature: what a rollout is compiled for."""
        return decode.Limits(
            self.max_new_tokens, self.end_ids, self.pad_id, self.top_k, self.top_p,
            self.likeliest, self.trunk_layers,
        )  # fmt: skip


class Batch(NamedTuple):
    """Responses of one batch, on the device.

    Attributes:
      requests: the B real rows, which come first.
      prompts: padded prompts, of at least B rows: a last batch is filled up to the common size.
      rollout: the responses, of as many rows.
      temperature: that they were drawn at. Whatever scores a batch reads it from here.
    """

    requests: Sequence[Request]
    prompts: Prompts
    rollout: decode.Rollout
    temperature: float

    @property
    def size(self) -> int:
        """The number of real rows."""
        return len(self.requests)


@dataclasses.dataclass(frozen=True)
class ScoredRollout:
    """A batch of responses with their rewards, as a jitted update reads it: a pytree.

    Attributes:
      prompt_BxP: int32 ids, padded on the left.
      prompt_mask_BxP: bool, True on prompt tokens.
      rollout: the responses, T slots a row.
      reward_B: float32 rewards.
      row_B: int32, the row of each prompt in the training prompts and their reference rewards.
      temperature: of the rollout, static: every log-prob of these responses is taken at it.
      prefix_reward_BxT: float32, at token t the reward of the t tokens before it; None where no
        one asks for it.
      candidate_reward_BxTxK: float32, the reward of those t tokens and each of the likeliest next;
        None likewise.
      stored: rows of the reference's samples that are learned from beside these, a ScoredRollout;
        None without them.
      n_B: float32, the n that each row is drawn and trained for; None where all have one.
    """

    prompt_BxP: Any
    prompt_mask_BxP: Any
    rollout: decode.Rollout
    reward_B: Any
    row_B: Any
    temperature: float
    prefix_reward_BxT: Any = None
    candidate_reward_BxTxK: Any = None
    stored: Any = None
    n_B: Any = None


jax.tree_util.register_dataclass(
    ScoredRollout,
    data_fields=[
        "prompt_BxP", "prompt_mask_BxP", "rollout", "reward_B", "row_B", "prefix_reward_BxT",
        "candidate_reward_BxTxK", "stored", "n_B",
    ],
    meta_fields=["temperature"],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Response:
    """A scored response on the host.

    Attributes:
      request: which response it is.
      tokens: sampled ids, the one that ended the response included.
      text: what they say after the prompt, without that end.
      log_prob: nats, summed over the tokens, at the sampling temperature.
      finished: whether EOS came before the length limit.
      reward: the reward of the text.
      extra: what else was measured on it, by name.
    """

    request: Request
    tokens: tuple[int, ...]
    text: str
    log_prob: float
    finished: bool
    reward: float
    extra: dict[str, float]


# Measures more on a batch of responses: arrays [B] by name.
Measure = Callable[[Batch], dict[str, Any]]
