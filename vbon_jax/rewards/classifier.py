"""A sequence classifier as the reward, scored on the device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, encoder, heads

KINDS = ("prob", "log_odds", "logit", "scalar")

Config = decoder.DecoderConfig | encoder.EncoderConfig


def score_of(logits_BxC: jax.Array, kind: str, label: int) -> jax.Array:
    """What a classifier's logits say of one label, float32 [B].

    Args:
      kind: "prob" (p of the label, as the paper has it; it saturates at 0 and 1 in float32, which
        makes ties), "log_odds" (log p - log(1 - p)), "logit" (the label's own) or "scalar" (the
        only column of a reward model without labels).
      label: index of the label; not looked at by "scalar".

    Raises ValueError on another kind.
    """
    logits_BxC = logits_BxC.astype(jnp.float32)
    if kind == "scalar":
        return logits_BxC[:, 0]
    if kind == "logit":
        return logits_BxC[:, label]
    if kind == "prob":
        return jnp.exp(jax.nn.log_softmax(logits_BxC, axis=-1)[:, label])
    if kind == "log_odds":
        others = jnp.delete(logits_BxC, label, axis=-1, assume_unique_indices=True)
        return logits_BxC[:, label] - jax.nn.logsumexp(others, axis=-1)
    raise ValueError(f"kind is {kind!r}: give one of {', '.join(KINDS)}")


def logits(params: Any, config: Config, tokens_BxS: jax.Array, mask_BxS: jax.Array) -> jax.Array:
    """The classifier's logits of each row, float32 [B, C]: the one place that knows its kinds."""
    if isinstance(config, encoder.EncoderConfig):
        return encoder.score(params, config, tokens_BxS, mask_BxS)
    hidden = decoder.hidden(params["decoder"], config, tokens_BxS, mask_BxS)
    return heads.score(params["score"], hidden, mask_BxS)


@partial(jax.jit, static_argnames=("config", "kind", "label"))
def score(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    *,
    config: Config,
    kind: str,
    label: int,
) -> jax.Array:
    """The classifier's score of each row, float32 [B].

    Args:
      params: {"decoder", "score"} or {"encoder", "score"}, as the config says. A decoder scores a
        row at its last real token, an encoder at its first.
      tokens_BxS, mask_BxS: ids and bool mask; padding may stand on either side or in between.
      kind, label: see ``score_of``.
    """
    return score_of(logits(params, config, tokens_BxS, mask_BxS), kind, label)


def label_index(labels: Sequence[str], label: str, kind: str, key: str) -> int:
    """The place of ``label`` among a classifier's labels; 0 for "scalar", which needs none.

    Args:
      key: the config group that messages name.

    Raises InputError on an unknown kind, a label the classifier does not have, or a kind that does
    not go with the number of labels.
    """
    if kind not in KINDS:
        raise InputError(f"{key}.score={kind!r}: choose one of {', '.join(KINDS)}")
    known = ", ".join(labels)
    if kind == "scalar":
        if len(labels) != 1:
            raise InputError(
                f"{key}.score='scalar' is for models with one label, the {key} model has "
                f"{len(labels)} ({known}): choose prob, log_odds or logit and set {key}.label"
            )
        return 0
    if label not in labels:
        raise InputError(f"{key}.label={label!r}: the {key} model knows {known}; name one")
    if len(labels) < 2 and kind != "logit":
        raise InputError(
            f"{key}.score={kind!r} needs two labels, the {key} model has only {known!r}: "
            f"set {key}.score=scalar"
        )
    return list(labels).index(label)


class ClassifierReward:
    """Scores prompt and response read as one text, EOS left out, by the policy's own token ids.

    Leaving EOS out makes the reward a function of the text alone: a response cut at the length
    limit is scored as the text it is.
    """

    def __init__(
        self,
        params: Any,
        config: Config,
        labels: Sequence[str],
        label: str,
        kind: str,
        eos_id: int | None,
        key: str = "reward",
    ):
        """``key``: the config group that messages name.

        Raises InputError as ``label_index`` does."""
        self.positions: int = config.positions  # the longest text it reads, tokens
        self._params, self._config = params, config
        self._label, self._kind = label_index(labels, label, kind, key), kind
        self._eos_id = eos_id

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> jax.Array:
        """Float32 rewards [B] of a padded batch; ``prompts`` (with their texts) are not needed."""
        del prompts
        if self._eos_id is not None:
            response_mask_BxT = response_mask_BxT & (response_BxT != self._eos_id)
        return score(
            self._params,
            jnp.concatenate([prompt_BxP, response_BxT], axis=1),
            jnp.concatenate([prompt_mask_BxP, response_mask_BxT], axis=1),
            config=self._config,
            kind=self._kind,
            label=self._label,
        )
