"""A sequence classifier as the reward, scored on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import cache, decoder, encoder, heads, lm
from vbon_jax.models.hf import Labels

KINDS = ("prob", "log_odds", "logit", "scalar")

Config = decoder.DecoderConfig | encoder.EncoderConfig


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier, and which score of its logits is the reward.

    Attributes:
      params: its parameters, on the mesh: {"decoder", "score"} or {"encoder", "score"}.
      config: its configuration.
      labels: what each logit is: its name, and whether it is one of a softmax or of its own.
      label: the label whose score is the reward; not read where kind is "scalar".
      kind: one of KINDS, see `score_of`.
    """

    params: Any
    config: Config
    labels: Labels
    label: str
    kind: str

    def label_index(self, key: str) -> int:
        """Returns the index of the label, as the function `label_index` does."""
        return label_index(self.labels, self.label, self.kind, key)


def score_of(logits_BxC: jax.Array, kind: str, label: int, independent: bool = False) -> jax.Array:
    """Computes the score of one label from a classifier's logits.

    Args:
      logits_BxC: logits of any float dtype; the score is computed in float32.
      kind: "prob" (the probability p of the label, as in the paper; it saturates at 0 and 1 in
        float32, which makes ties), "log_odds" (log p - log(1 - p)), "logit" (the label's logit) or
        "scalar" (the only output of a reward model without labels).
      label: index of the label; not read where kind is "scalar".
      independent: whether p is the sigmoid of the label's own logit, and not a softmax over all;
        its log odds are then the logit itself.

    Returns:
      float32 [B].

    Raises:
      ValueError: another kind.
    """
    logits_BxC = logits_BxC.astype(jnp.float32)
    if kind == "scalar":
        return logits_BxC[:, 0]
    if kind == "logit" or (kind == "log_odds" and independent):
        return logits_BxC[:, label]
    if kind == "prob" and independent:
        return jax.nn.sigmoid(logits_BxC[:, label])
    if kind == "prob":
        return jnp.exp(jax.nn.log_softmax(logits_BxC, axis=-1)[:, label])
    if kind == "log_odds":
        others = jnp.delete(logits_BxC, label, axis=-1, assume_unique_indices=True)
        return logits_BxC[:, label] - jax.nn.logsumexp(others, axis=-1)
    raise ValueError(f"kind is {kind!r}: give one of {', '.join(KINDS)}")


def logits(params: Any, config: Config, tokens_BxS: jax.Array, mask_BxS: jax.Array) -> jax.Array:
    """Computes the classifier's logits, of a decoder or an encoder.

    Args:
      params: {"decoder", "score"} or {"encoder", "score"}, as the config says.
      config: the classifier's configuration.
      tokens_BxS: int32 token ids.
      mask_BxS: bool mask of the real tokens.

    Returns:
      float32 [B, C].
    """
    if isinstance(config, encoder.EncoderConfig):
        return encoder.score(params, config, tokens_BxS, mask_BxS)
    hidden = decoder.hidden(params["decoder"], config, tokens_BxS, mask_BxS)
    return heads.score(params["score"], hidden, mask_BxS)


@partial(jax.jit, static_argnames=("config", "kind", "label", "independent"))
def score(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    *,
    config: Config,
    kind: str,
    label: int,
    independent: bool = False,
) -> jax.Array:
    """Computes the classifier's score of each row.

    Args:
      params: {"decoder", "score"} or {"encoder", "score"}, as the config says. A decoder is pooled
        at the last real token of a row, an encoder at the first.
      tokens_BxS: int32 token ids.
      mask_BxS: bool mask of the real tokens; padding may be on either side or in between.
      config: the classifier's configuration.
      kind: one of KINDS, see `score_of`.
      label: index of the label, see `score_of`.
      independent: see `score_of`.

    Returns:
      float32 [B].
    """
    return score_of(logits(params, config, tokens_BxS, mask_BxS), kind, label, independent)


@partial(jax.jit, static_argnames=("config", "kind", "label", "independent"))
def scores_before(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    response_BxT: jax.Array,
    *,
    config: decoder.DecoderConfig,
    kind: str,
    label: int,
    independent: bool = False,
) -> jax.Array:
    """Computes the score of what stands before each token of a response, in one pass.

    Args:
      params: {"decoder", "score"}, of a causal model.
      tokens_BxS: int32 ids of prompt and response in one row.
      mask_BxS: bool mask of the real tokens.
      response_BxT: the response's columns of it, the last T.
      config: the classifier's configuration.
      kind: one of KINDS, see `score_of`.
      label: index of the label, see `score_of`.
      independent: see `score_of`.

    Returns:
      float32 [B, T], each what `score` gives for the tokens before.
    """
    hidden = decoder.hidden(params["decoder"], config, tokens_BxS, mask_BxS)
    hidden = _before(hidden, mask_BxS, response_BxT.shape[1])
    return _score_each(params, hidden, kind, label, independent)


@partial(jax.jit, static_argnames=("config", "kind", "label", "independent"))
def scores_with(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    ids_BxTxK: jax.Array,
    *,
    config: decoder.DecoderConfig,
    kind: str,
    label: int,
    independent: bool = False,
) -> jax.Array:
    """Computes the score of what stands before each token of a response with others in its place.

    What stands before is run once for all of them.

    Args:
      params: {"decoder", "score"}, of a causal model.
      tokens_BxS: int32 ids of prompt and response in one row, of which the response are the last T.
      mask_BxS: bool mask of the real tokens.
      ids_BxTxK: int32, the tokens to stand in place of each of the response's; below 0 for none.
      config: the classifier's configuration.
      kind: one of KINDS, see `score_of`.
      label: index of the label, see `score_of`.
      independent: see `score_of`.

    Returns:
      float32 [B, T, K], each what `score` gives for the tokens before and this one.
    """
    (B, S), T = tokens_BxS.shape, ids_BxTxK.shape[1]
    model = params["decoder"]
    kept = cache.init(config, B, S + T)
    hidden, kept = decoder.prefill(model, config, tokens_BxS, mask_BxS, kept)

    def scores(hidden_BxTxD: jax.Array) -> jax.Array:
        return _score_each(params, hidden_BxTxD, kind, label, independent)

    before_BxT = scores(_before(hidden, mask_BxS, T))
    found_KxBxT = jax.lax.map(
        lambda ids_BxT: scores(decoder.instead(model, config, jnp.maximum(ids_BxT, 0), kept)),
        jnp.moveaxis(ids_BxTxK, -1, 0),
    )
    found_BxTxK = jnp.moveaxis(found_KxBxT, 0, -1)
    return jnp.where(ids_BxTxK < 0, before_BxT[..., None], found_BxTxK)


def _before(hidden_BxSxD: jax.Array, mask_BxS: jax.Array, T: int) -> jax.Array:
    """The hidden states [B, T, D] of the last real token before each of the last T columns."""
    at_BxS = jax.lax.cummax(jnp.where(mask_BxS, jnp.arange(mask_BxS.shape[1]), 0), axis=1)
    last_BxT = at_BxS[:, -T - 1 : -1]
    return jnp.take_along_axis(hidden_BxSxD, last_BxT[..., None], axis=1)


def _score_each(
    params: Any, hidden_BxTxD: jax.Array, kind: str, label: int, independent: bool
) -> jax.Array:
    """The score [B, T] of each hidden state by itself."""
    rows = hidden_BxTxD.reshape(-1, 1, hidden_BxTxD.shape[-1])
    found = heads.score(params["score"], rows, jnp.ones(rows.shape[:2], bool))
    return score_of(found, kind, label, independent).reshape(hidden_BxTxD.shape[:-1])


def label_index(labels: Labels, label: str, kind: str, key: str) -> int:
    """Finds the index of a label among a classifier's labels.

    Args:
      labels: the classifier's labels.
      label: one of them; not read where kind is "scalar".
      kind: one of KINDS.
      key: the config group that messages name.

    Returns:
      The index; 0 where kind is "scalar".

    Raises:
      InputError: the kind is unknown or does not fit the number of labels, or the classifier does
        not have the label.
    """
    if kind not in KINDS:
        raise InputError(f"{key}.score={kind!r}: choose one of {', '.join(KINDS)}")
    names, known = labels.names, ", ".join(labels.names)
    if kind == "scalar":
        if len(names) != 1:
            raise InputError(
                f"{key}.score='scalar' is for models with one label, the {key} model has "
                f"{len(names)} ({known}): choose prob, log_odds or logit and set {key}.label to one"
                " of them"
            )
        return 0
    if label not in names:
        raise InputError(f"{key}.label={label!r}: the {key} model knows {known}; name one")
    if kind == "logit" or labels.independent:
        return names.index(label)
    if len(names) < 2:
        raise InputError(
            f"{key}.score={kind!r} needs two labels, the {key} model has only {known!r}: "
            f"set {key}.score=scalar"
        )
    if labels.problem == "regression":
        raise InputError(
            f"{key}.score={kind!r} needs probabilities, and the problem_type of the {key} model is "
            f"regression: set {key}.score=logit, which is the output itself"
        )
    return names.index(label)


class ClassifierReward:
    """Scores prompt and response as one sequence of the policy's own token ids, without EOS.

    Without EOS the reward is a function of the text alone: a response truncated at the length limit
    has the score of its text.

    Attributes:
      positions: the context length of the classifier, in tokens.
    """

    def __init__(self, model: Classifier, end_ids: Sequence[int], key: str = "reward"):
        """Makes the reward of a classifier that has the policy's vocabulary.

        Args:
          model: the classifier.
          end_ids: the ids that end a response of the policy; none where it has a fixed length.
          key: the config group that messages name.

        Raises:
          InputError: as `label_index`.
        """
        self.positions: int = model.config.positions
        self._model, self._label = model, model.label_index(key)
        self._end_ids = tuple(end_ids)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> jax.Array:
        """Returns float32 rewards [B]; see `base.Reward`. The prompts' texts are not read."""
        del prompts
        rows = self._rows(prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT)
        return score(*rows, **self._settings)

    def of_prefixes(self, prompts: Sequence[Prompt], *rows: jax.Array) -> jax.Array | None:
        """Returns the rewards before each token, [B, T]; None of an encoder: see `base.Reward`."""
        del prompts
        if not self._causal:
            return None
        return scores_before(*self._rows(*rows), rows[2], **self._settings)

    def of_candidates(self, prompts: Sequence[Prompt], *rows: jax.Array) -> jax.Array | None:
        """Returns the rewards with other tokens, [B, T, K]; None of an encoder: see `base.Reward`.

        An id that ends a response leaves the reward as it is before.
        """
        del prompts
        if not self._causal:
            return None
        *own, ids_BxTxK = rows
        ids_BxTxK = jnp.where(lm.is_end(ids_BxTxK, self._end_ids), -1, ids_BxTxK)
        return scores_with(*self._rows(*own), ids_BxTxK, **self._settings)

    @property
    def _causal(self) -> bool:
        return isinstance(self._model.config, decoder.DecoderConfig)

    @property
    def _settings(self) -> dict[str, Any]:
        model = self._model
        return {
            "config": model.config, "kind": model.kind, "label": self._label,
            "independent": model.labels.independent,
        }  # fmt: skip

    def _rows(
        self,
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """The parameters, prompts and responses in one row, and what of it is read."""
        rows = _whole(
            prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT, end_ids=self._end_ids
        )
        return self._model.params, *rows


@partial(jax.jit, static_argnames="end_ids")
def _whole(
    prompt_BxP: jax.Array,
    prompt_mask_BxP: jax.Array,
    response_BxT: jax.Array,
    response_mask_BxT: jax.Array,
    *,
    end_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Prompts and responses in one row, [B, P + T], and all of it but what ends a response."""
    response_mask_BxT &= ~lm.is_end(response_BxT, end_ids)
    return (
        jnp.concatenate([prompt_BxP, response_BxT], axis=1),
        jnp.concatenate([prompt_mask_BxP, response_mask_BxT], axis=1),
    )
