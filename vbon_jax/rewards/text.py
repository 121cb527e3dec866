"""A reward model that reads text by a tokenizer and a template of its own, scored on the device."""

import string
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.rewards import classifier
from vbon_jax.rewards.function import Decode, texts_of

CHAT = "chat"  # the template that stands for the tokenizer's own
FIELDS = ("prompt", "response")


def check_template(template: str, key: str = "reward") -> str:
    """The template as it is: "chat", or a format string of {prompt} and {response}.

    Raises InputError where it has other fields, or none for the response.
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
    """``length`` rounded up to 16, 32, 64, 128 or a multiple of 128, but to ``longest`` at most."""
    rounded = max(16, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128
    return min(rounded, longest)


def keep_end(ids: Sequence[int], longest: int, specials: frozenset[int]) -> list[int]:
    """At most ``longest`` ids: the special ones that lead the text, and its end."""
    ids = list(ids)
    if len(ids) <= longest:
        return ids
    lead = next((i for i, token in enumerate(ids) if token not in specials), 0)
    lead = min(lead, longest - 1)
    return ids[:lead] + ids[len(ids) - (longest - lead) :]


class TextReward:
    """Scores a text made of prompt and response, in the reward model's own tokens.

    The response is decoded (EOS left out), put into the template, tokenized and padded on the
    right. A row's padded length depends on its own text alone and rows are scored ``batch_size`` at
    a time, so the same text has the same score in whatever company, and shapes are few.
    """

    def __init__(
        self,
        params: Any,
        config: classifier.Config,
        labels: Sequence[str],
        label: str,
        kind: str,
        tokenizer: PreTrainedTokenizerFast,
        decode: Decode,
        eos_id: int | None,
        mesh: Mesh,
        template: str = "{prompt}{response}",
        max_tokens: int = 0,
        batch_size: int = 32,
        key: str = "reward",
    ):
        """
        Args:
          params, config, labels, label, kind: the classifier, on ``mesh``, and the score it gives;
            see ``classifier.score_of``.
          tokenizer: the reward model's own; it adds the special tokens it was trained with.
          decode: lists of the policy's ids -> texts; eos_id: the policy's, None without one.
          template: see ``check_template``; "chat" is the tokenizer's chat template over the
            prompt's messages with the response as the assistant's; a prompt without messages is one
            message of the user.
          max_tokens: longer texts lose what comes first, but for leading special tokens, and are
            counted; 0 for as many as the model has positions.
          batch_size: rows scored at once.
          key: the config group that messages name.

        Raises InputError as ``classifier.label_index`` and ``check_template`` do, on more tokens
        than positions, and on "chat" without a chat template.
        """
        self._label = classifier.label_index(labels, label, kind, key)
        self._template = check_template(template, key)
        if template == CHAT and not tokenizer.chat_template:
            raise InputError(
                f"{key}.template='chat': the tokenizer of {key}.path has no chat template; write "
                "one of {prompt} and {response}"
            )
        if not 0 <= max_tokens <= config.positions or max_tokens == 1:
            raise InputError(
                f"{key}.max_tokens={max_tokens}: the {key} model has {config.positions} positions; "
                "give at least 2 and at most that, or 0 for all of them"
            )
        if batch_size < 1:
            raise InputError(f"{key}.batch_size={batch_size}: give at least 1")
        self._params, self._config, self._kind = params, config, kind
        self._tokenizer, self._decode, self._eos_id = tokenizer, decode, eos_id
        self._mesh, self._key = mesh, key
        self._longest = max_tokens or config.positions
        self._batch_size = batch_size
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
        """Float32 rewards, one a prompt.

        ``prompts`` may be fewer than the rows: those that only fill the batch are left alone.
        Raises InputError where the tokenizer gives an id that the model has no embedding for.
        """
        del prompt_BxP, prompt_mask_BxP
        responses = texts_of(
            response_BxT, response_mask_BxT, len(prompts), self._eos_id, self._decode
        )
        return self.score_ids(self.tokenized(prompts, responses))

    def tokenized(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt with its response, cut to the longest allowed; cuts are counted.

        A text without any token is read as the token that begins texts.
        """
        if self._template == CHAT:
            whole = self._chat(prompts, responses)
        else:
            texts = [
                self._template.format(prompt=p.text, response=r) for p, r in zip(prompts, responses)
            ]
            # verbose=False: lengths are looked after here.
            whole = self._tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        self._texts += len(whole)
        self._truncated += sum(len(ids) > self._longest for ids in whole)
        return [keep_end(ids or [self._first()], self._longest, self._specials) for ids in whole]

    def _chat(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Sequence[int]]:
        return [
            chat.render(self._tokenizer, p.messages or (("user", p.text),), r)
            for p, r in zip(prompts, responses)
        ]

    def _first(self) -> int:
        t = self._tokenizer
        known = (i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None)
        return int(next(known, 0))

    def score_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 scores [R] of rows of ids, each of them its tokens and no padding."""
        scores = np.zeros(len(rows), np.float32)
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(rows):
            if max(ids) >= self._config.vocab_size:
                raise InputError(
                    f"{self._key}.path: the tokenizer gives id {max(ids)}, the model has only "
                    f"{self._config.vocab_size} embeddings: give the tokenizer it was trained with"
                )
            groups.setdefault(bucket(len(ids), self._longest), []).append(i)
        found = [  # all of it is under way before the first is waited for
            (part, self._score([rows[i] for i in part], length))
            for length, group in sorted(groups.items())
            for part in (
                group[start : start + self._batch_size]
                for start in range(0, len(group), self._batch_size)
            )
        ]
        for part, values in found:
            scores[part] = np.asarray(values)[: len(part)]
        return scores

    def _score(self, rows: Sequence[Sequence[int]], length: int) -> jax.Array:
        """Scores [batch_size] of at most so many rows."""
        # Zeros may fill it, the tokenizer's padding or not: the mask says what is real.
        tokens = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return classifier.score(
            self._params,
            *sharding.place((tokens, mask), self._mesh, "batch"),
            config=self._config,
            kind=self._kind,
            label=self._label,
        )

    def take_counts(self) -> dict[str, float]:
        """Since last asked: "responses" scored, "reward_truncated" the share of them that was cut.

        Empty where there were none.
        """
        texts, truncated = self._texts, self._truncated
        self._texts = self._truncated = 0
        return {"responses": float(texts), "reward_truncated": truncated / texts} if texts else {}
