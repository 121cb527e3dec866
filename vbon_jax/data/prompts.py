"""Prompts: an id, a text and its token ids. All later stages refer to a prompt by its id."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax import processes
from vbon_jax.data import jsonl, records
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError, writing

TEXT_COLUMN = "prompt"
COLUMN_SETTING = "prompts.column"  # the config key that names another


@dataclass(frozen=True)
class Prompt:
    """A prompt; two prompts may have the same text, their ids differ.

    Attributes:
      id: its number, unique within a split.
      text: what the tokens say, without the BOS that the tokenizer puts in front of a plain text.
      tokens: the token ids that the model is given.
      messages: the (role, content) pairs that a chat template turned into the tokens, in order;
        empty where the prompt is plain text.
    """

    id: int
    text: str
    tokens: tuple[int, ...]
    messages: tuple[tuple[str, str], ...] = ()


def _cut(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    min_tokens: int,
    max_tokens: int,
    wanted: re.Pattern[str] | None,
) -> Prompt | None:
    """The shortest allowed prefix that contains a wanted phrase, with id 0; None if none does."""
    tokens = tokenizers.encode(tokenizer, text)
    end = 0
    if wanted is not None:
        # Looked for in the whole text: a cut may make a word of the first half of another.
        found = wanted.search(tokenizer.decode(tokens))
        if found is None:
            return None
        end = found.end()
    for length in range(min_tokens, min(max_tokens, len(tokens) - 1) + 1):
        cut = tokenizer.decode(tokens[:length])
        splits_character = "\ufffd" in cut and "\ufffd" not in text
        if not splits_character and len(cut) >= end:
            return Prompt(0, cut, tokenizers.begun(tokenizer, tokens[:length]))
    return None


def prefix_prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    min_tokens: int,
    max_tokens: int,
    seed: int,
    must_contain: Sequence[str] = (),
) -> list[Prompt]:
    """Cuts prompts from the beginnings of texts, as the paper does for its sentiment task.

    The texts are taken in random order without replacement, and each prompt has a length drawn
    uniformly from {min_tokens, ..., max_tokens}. A text is skipped when it has no token left after
    the prompt, or when the cut would split a character.

    With must_contain, a prompt is extended beyond its drawn length until it contains one of the
    phrases, and a text is skipped when its first max_tokens tokens contain none.

    Args:
      texts: the held-out texts.
      tokenizer: encodes the texts; what it begins a text with (BOS) comes in front of each prompt
        and does not count in its length.
      count: number of prompts.
      min_tokens: least length in tokens.
      max_tokens: greatest length in tokens, included.
      seed: seed of the choice of texts and lengths.
      must_contain: phrases of which each prompt must contain one, as whole words of the text.

    Returns:
      `count` prompts with ids 0 to count - 1.

    Raises:
      InputError: count or the range of lengths is not positive, or too few texts are long enough.
    """
    if count < 1 or not 1 <= min_tokens <= max_tokens:
        raise InputError(
            f"prompts need count >= 1 and 1 <= min_tokens <= max_tokens, not count = {count}, "
            f"min_tokens = {min_tokens}, max_tokens = {max_tokens}"
        )
    wanted = None
    if must_contain:
        wanted = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, must_contain))})(?!\w)")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts))
    lengths = rng.integers(min_tokens, max_tokens, size=count, endpoint=True)
    prompts: list[Prompt] = []
    for index in order:
        if len(prompts) == count:
            break
        # The length waits for a text that is long enough, so that lengths stay uniform.
        length = int(lengths[len(prompts)])
        longest = length if wanted is None else max_tokens
        prompt = _cut(tokenizer, texts[index], length, longest, wanted)
        if prompt is not None:
            prompts.append(replace(prompt, id=len(prompts)))
    if len(prompts) < count:
        reason = "a text must be longer than its prompt"
        advice = "ask for fewer or shorter prompts, or give more text"
        if must_contain:
            names = ", ".join(map(repr, must_contain))
            reason += f", which must contain one of {names}"
            advice = "ask for fewer prompts, raise max_tokens, or give more text"
        raise InputError(
            f"asked for {count} prompts of {min_tokens} to {max_tokens} tokens, but only "
            f"{len(prompts)} could be cut from the {len(texts)} texts ({reason}); {advice}"
        )
    return prompts


def from_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Makes each text a prompt, uncut.

    Args:
      texts: the prompts.
      tokenizer: encodes them, BOS in front where it begins a text so.

    Returns:
      Prompts with ids 0, 1, ... in order.

    Raises:
      InputError: a text has no token, or one the tokenizer does not know.
    """
    prompts = []
    for index, text in enumerate(texts):
        tokens = tokenizers.begun(tokenizer, tokenizers.encode(tokenizer, text))
        if not tokens:
            raise InputError(f"prompt {index} ({text!r}) has no token; give it at least one")
        prompts.append(Prompt(index, text, tokens))
    return prompts


def fits_context(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> None:
    """Checks that each prompt with its response fits the context length of the model.

    Args:
      prompts: the prompts.
      max_new_tokens: greatest number of tokens of a response.
      positions: the model's context length in tokens.

    Raises:
      InputError: names the first prompt that is too long.
    """
    for prompt in prompts:
        if len(prompt.tokens) + max_new_tokens > positions:
            shown = prompt.text if len(prompt.text) <= 60 else prompt.text[:57] + "..."
            raise InputError(
                f"prompt {prompt.id} ({shown!r}) has {len(prompt.tokens)} tokens; with "
                f"{max_new_tokens} new tokens it needs {len(prompt.tokens) + max_new_tokens} "
                f"positions and the model has {positions}; shorten it or max_new_tokens"
            )


def write_jsonl(path: str | os.PathLike[str], prompts: Sequence[Prompt]) -> None:
    """Writes {"id", "prompt", "tokens"} lines with checksums, atomically.

    A prompt with messages has them as well: "messages", a list of {"role", "content"}.

    Args:
      path: the file; one that exists is replaced.
      prompts: the prompts.
    """
    if not processes.first():
        return
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("wb") as file:
            for prompt in prompts:
                record: dict[str, Any] = {
                    "id": prompt.id, "prompt": prompt.text, "tokens": list(prompt.tokens)
                }  # fmt: skip
                if prompt.messages:
                    record["messages"] = message_records(prompt.messages)
                file.write(jsonl.dump_sealed(record))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def message_records(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The inverse of `parse_messages`."""
    return [{"role": role, "content": content} for role, content in messages]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_messages(value: Any, where: str, column: str = "messages") -> tuple[tuple[str, str], ...]:
    """Parses a list of {"role": str, "content": str}; other keys are ignored.

    Args:
      value: the value of the column.
      where: "file:line", for the message.
      column: its name, for the message.

    Returns:
      (role, content) pairs in order.

    Raises:
      InputError: it is no list, or a message is not an object with two strings.
    """
    if not isinstance(value, list):
        raise InputError(f"{where}: {column!r} must be a list of messages, not {value!r}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise InputError(
                f'{where}: message {number} must be {{"role": ..., "content": ...}}, '
                f"not {message!r}"
            )
        here = f"{where}: message {number}"
        role = jsonl.text_field(message, "role", here)
        messages.append((role, jsonl.text_field(message, "content", here)))
    return tuple(messages)


def read_jsonl(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads the prompts that `write_jsonl` wrote.

    Args:
      path: the file.

    Returns:
      The prompts in file order.

    Raises:
      InputError: the file is missing or empty, a line is malformed, or an id occurs twice; names
        the file and the line.
    """
    prompts: list[Prompt] = []
    seen: set[int] = set()
    for where, record in jsonl.read(path):
        text = jsonl.text_field(record, "prompt", where)
        number = jsonl.field(record, "id", where)
        if not _is_count(number) or number in seen:
            raise InputError(f"{where}: 'id' must be a whole number of its own, not {number!r}")
        tokens = jsonl.field(record, "tokens", where)
        if not isinstance(tokens, list) or not tokens or not all(map(_is_count, tokens)):
            raise InputError(f"{where}: 'tokens' must be a list of token ids, not {tokens!r}")
        messages = parse_messages(record.get("messages", []), where)
        seen.add(number)
        prompts.append(Prompt(number, text, tuple(tokens), messages))
    if not prompts:
        raise InputError(f"{path}: the file is empty; it needs one prompt a line")
    return prompts


def read_texts(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerFast,
    column: str = TEXT_COLUMN,
) -> list[Prompt]:
    """Reads a user's own prompts from a .jsonl, .csv, .tsv or .parquet file.

    Other columns are ignored; see `records.read` for the formats.

    Args:
      path: the file.
      tokenizer: encodes the prompts, BOS in front where it begins a text so.
      column: the column (or JSON key) of the prompts, strings.

    Returns:
      The prompts in file order with ids 0, 1, ...

    Raises:
      InputError: the file cannot be read, holds no record or lacks the column, or a prompt is no
        string or has no token; names the file and the line.
    """
    prompts: list[Prompt] = []
    for where, record in records.read(path, {column: COLUMN_SETTING}):
        text = jsonl.text_field(record, column, where)
        try:
            tokens = tokenizers.begun(tokenizer, tokenizers.encode(tokenizer, text))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not tokens:
            raise InputError(f"{where}: {column!r} {text!r} has no token; give it at least one")
        prompts.append(Prompt(len(prompts), text, tokens))
    if not prompts:
        raise InputError(f"{path}: the file is empty; give it records with a prompt ({column!r})")
    return prompts
