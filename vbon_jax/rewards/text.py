"""A reward model with a tokenizer and a template of its own, scored on the device."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.rewards import classifier
from vbon_jax.rewards.base import Decode, texts_of
from vbon_jax.rewards.classifier import Classifier

CHAT = "chat"  # the template that stands for the tokenizer's own
FIELDS = ("prompt", "response")


@dataclass(frozen=True)
class TextFormat:
    """How a prompt and a response become the token ids that a reward model scores.

    Attributes:
      tokenizer: the reward model's own; it adds the special tokens it was trained with.
      template: a format string of {prompt} and {response}, or "chat" for the tokenizer's chat
        template over the prompt's messages and the response as the assistant's answer; a prompt
        without messages is one message of the user.
      max_tokens: longer texts are truncated on the left, leading special tokens excepted, and
        counted; 0 for the model's context length.
      rendering: arguments and date of the chat template.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str = "{prompt}{response}"
    max_tokens: int = 0
    rendering: chat.Rendering = field(default_factory=chat.Rendering)


def check_template(template: str, key: str = "reward") -> str:
    """Checks a template.

    Args:
      template: "chat", or a format string of {prompt} and {response}.
      key: the config group that messages name.

    Returns:
      The template.

    Raises:
      InputError: it is no format string, or has other fields, or none for the response.
    """
    if template == CHAT:
        return template
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"{key}.template={template!r}: {error}; write a brace of the text itself twice"
        ) from error
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    bad = [name for name, spec, conversion in fields if name not in FIELDS or spec or conversion]
    if bad:
        raise InputError(
            f"{key}.template={template!r} has the field {bad[0]!r}: the fields are {{prompt}} and "
            "{response}, with nothing behind them; write a brace of the text itself twice"
        )
    if "response" not in [name for name, *_ in fields]:
        raise InputError(f"{key}.template={template!r} has no {{response}}: put it where it goes")
    return template


def bucket(length: int, longest: int) -> int:
    """Rounds a length up, so that few shapes are compiled.

    Args:
      length: a number of tokens.
      longest: the greatest result.

    Returns:
      16, 32, 64, 128 or a multiple of 128, but no more than `longest`.
    """
    rounded = max(16, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128
    return min(rounded, longest)


def keep_end(ids: Sequence[int], longest: int, specials: frozenset[int]) -> list[int]:
    """Truncates token ids on the left, after leading special tokens.

    Args:
      ids: token ids.
      longest: the greatest number of ids to keep.
      specials: ids of the special tokens.

    Returns:
      The leading special tokens and the end of the text, at most `longest` ids.
    """
    ids = list(ids)
    if len(ids) <= longest:
        return ids
    lead = next((i for i, token in enumerate(ids) if token not in specials), 0)
    lead = min(lead, longest - 1)
    return ids[:lead] + ids[len(ids) - (longest - lead) :]


class TextReward:
    """Scores the text of prompt and response, re-tokenized with the reward model's tokenizer.

    The response is decoded (without EOS), formatted with the template, tokenized and padded on the
    right. The padded length of a row depends on its own text alone and `batch_size` rows are scored
    at a time, so a text has the same score in every batch, and few shapes are compiled.
    """

    def __init__(
        self,
        model: Classifier,
        text_format: TextFormat,
        decode: Decode,
        end_ids: Sequence[int],
        mesh: Mesh,
        batch_size: int = 32,
        key: str = "reward",
    ):
        """Makes the reward of a classifier with a tokenizer of its own.

        Args:
          model: the classifier, its parameters on `mesh`.
          text_format: tokenizer, template and length limit.
          decode: see `base.Decode`.
          end_ids: the ids that end a response of the policy; none where it has a fixed length.
          mesh: the devices.
          batch_size: rows scored at once.
          key: the config group that messages name.

        Raises:
          InputError: as `classifier.label_index` and `check_template`; max_tokens exceeds the
            model's context length; the template is "chat" and the tokenizer has no chat template;
            or batch_size is not positive.
        """
        tokenizer, config = text_format.tokenizer, model.config
        self._label = model.label_index(key)
        self._template = check_template(text_format.template, key)
        if self._template == CHAT and not tokenizer.chat_template:
            raise InputError(
                f"{key}.template='chat': the tokenizer of {key}.path has no chat template; write "
                "one of {prompt} and {response}"
            )
        max_tokens = text_format.max_tokens
        if not 0 <= max_tokens <= config.positions or max_tokens == 1:
            raise InputError(
                f"{key}.max_tokens={max_tokens}: the {key} model has {config.positions} positions; "
                "give at least 2 and at most that, or 0 for all of them"
            )
        if batch_size < 1:
            raise InputError(f"{key}.batch_size={batch_size}: give at least 1")
        self._model, self._tokenizer = model, tokenizer
        self._decode, self._end_ids = decode, tuple(end_ids)
        self._mesh, self._key = mesh, key
        self._rendering = text_format.rendering
        self._longest = max_tokens or config.positions
        self._batch_size = batch_size
        self._begin = tokenizers.begin_ids(tokenizer)
        self._specials = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._texts = self._truncated = 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_BxP: jax.Array,
        prompt_mask_BxP: jax.Array,
        response_BxT: jax.Array,
        response_mask_BxT: jax.Array,
    ) -> np.ndarray:
        """Returns float32 rewards [len(prompts)]; see `base.Reward`.

        Raises:
          InputError: the tokenizer returned an id that the model has no embedding for.
        """
        del prompt_BxP, prompt_mask_BxP
        responses = texts_of(prompts, response_BxT, response_mask_BxT, self._end_ids, self._decode)
        return self.score_ids(self.tokenized(prompts, responses))

    def tokenized(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Tokenizes each prompt with its response, truncates, and counts the truncated.

        Args:
          prompts: the prompts.
          responses: the text of a response to each.

        Returns:
          The token ids of each. A text without tokens becomes the tokenizer's BOS (or, where it has
          none, EOS, padding or id 0).
        """
        if self._template == CHAT:
            whole = self._chat(prompts, responses)
        else:
            texts = [
                self._template.format(prompt=p.text, response=r) for p, r in zip(prompts, responses)
            ]
            # verbose=False: no warning of long texts, which are truncated below.
            whole = self._tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
            # The text of a chat prompt may begin with BOS: the tokenizer's own is then a second.
            n = len(self._begin)
            twice = self._begin * 2
            whole = [ids[n:] if n and tuple(ids[: 2 * n]) == twice else ids for ids in whole]
        self._texts += len(whole)
        self._truncated += sum(len(ids) > self._longest for ids in whole)
        return [keep_end(ids or [self._first()], self._longest, self._specials) for ids in whole]

    def _chat(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Sequence[int]]:
        return [
            chat.render(self._tokenizer, p.messages or (("user", p.text),), r, self._rendering)
            for p, r in zip(prompts, responses)
        ]

    def _first(self) -> int:
        t = self._tokenizer
        known = (i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None)
        return int(next(known, 0))

    def score_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores token ids.

        Args:
          rows: R rows of token ids, without padding.

        Returns:
          float32 [R].

        Raises:
          InputError: an id is not in the model's vocabulary.
        """
        scores = np.zeros(len(rows), np.float32)
        vocabulary = self._model.config.vocab_size
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(rows):
            if max(ids) >= vocabulary:
                raise InputError(
                    f"{self._key}.path: the tokenizer gives id {max(ids)}, the model has only "
                    f"{vocabulary} embeddings: give the tokenizer it was trained with"
                )
            groups.setdefault(bucket(len(ids), self._longest), []).append(i)
        found = [  # all are dispatched before the first is waited for
            (part, self._score([rows[i] for i in part], length))
            for length, group in sorted(groups.items())
            for part in (
                group[start : start + self._batch_size]
                for start in range(0, len(group), self._batch_size)
            )
        ]
        for part, values in found:
            scores[part] = sharding.fetch(values)[: len(part)]
        return scores

    def _score(self, rows: Sequence[Sequence[int]], length: int) -> jax.Array:
        """Scores at most batch_size rows; the result is [batch_size]."""
        # Padded with zeros, whatever the tokenizer's padding is: the mask says what is real.
        tokens = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return classifier.score(
            self._model.params,
            *sharding.place((tokens, mask), self._mesh, "batch"),
            config=self._model.config,
            kind=self._model.kind,
            label=self._label,
            independent=self._model.labels.independent,
        )

    def take_counts(self) -> dict[str, float]:
        """Takes the statistics since they were last taken.

        Returns:
          "responses", the number of texts scored, and "reward_truncated", the share of them that
          was truncated; empty where there were none.
        """
        texts, truncated = self._texts, self._truncated
        self._texts = self._truncated = 0
        return {"responses": float(texts), "reward_truncated": truncated / texts} if texts else {}
