"""A sequence classifier as the reward, scored on the device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.errors import InputError
from vbon_jax.models import decoder, heads

KINDS = ("logit", "log_odds", "prob")


@partial(jax.jit, static_argnames=("config", "kind", "label"))
def score(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    *,
    config: decoder.DecoderConfig,
    kind: str,
    label: int,
) -> jax.Array:
    """The classifier's score of each row for one label, float32 [B].

    Args:
      params: {"decoder", "score"}.
      tokens_BxS, mask_BxS: ids and bool mask; padding may stand on either side or in between.
      kind: "logit" (the label's own), "log_odds" (log p - log(1 - p)) or "prob" (p, as the paper
        has it; it saturates at 0 and 1 in float32, which makes ties).
      label: index of the label.
    """
    hidden = decoder.hidden(params["decoder"], config, tokens_BxS, mask_BxS)
    logits = heads.score(params["score"], hidden, mask_BxS).astype(jnp.float32)
    if kind == "logit":
        return logits[:, label]
    log_p = jax.nn.log_softmax(logits, axis=-1)[:, label]
    if kind == "prob":
        return jnp.exp(log_p)
    others = jnp.delete(logits, label, axis=-1, assume_unique_indices=True)
    return logits[:, label] - jax.nn.logsumexp(others, axis=-1)


class ClassifierReward:
    """Scores prompt and response read as one text, EOS left out.

    Leaving EOS out makes the reward a function of the text alone: a response cut at the length
    limit is scored as the text it is.
    """

    def __init__(
        self,
        params: Any,
        config: decoder.DecoderConfig,
        labels: Sequence[str],
        label: str,
        kind: str,
        eos_id: int | None,
        key: str = "reward",
    ):
        """``key``: the config group that messages name.

        Raises InputError on a label the classifier does not have, or an unknown kind."""
        if label not in labels:
            raise InputError(
                f"{key}.label={label!r}: the {key} model knows {', '.join(labels)}; name one"
            )
        if kind not in KINDS:
            raise InputError(f"{key}.score={kind!r}: choose one of {', '.join(KINDS)}")
        if len(labels) < 2 and kind != "logit":
            raise InputError(
                f"{key}.score={kind!r} needs two labels, the {key} model has only {labels[0]!r}: "
                f"set {key}.score=logit"
            )
        self.positions = config.positions  # the longest text it reads, tokens
        self._params, self._config = params, config
        self._label, self._kind, self._eos_id = list(labels).index(label), kind, eos_id

    def __call__(
        self,
        prompts: Sequence[str],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> jax.Array:
        """Float32 rewards [B] of a padded batch; ``prompts`` (their texts) are not needed here."""
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
