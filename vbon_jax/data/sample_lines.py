"""Scored responses: the samples of one prompt, and the line of a file that holds them.

A line is `{"prompt": str, "responses": [str], "rewards": [float]}`, the layout of the paper's own
code, with the optional fields of `PromptSamples` as further keys. The paper's other layout has one
response a line, `{"prompt": str, "text": str, "reward": float}`, where text starts with the prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vbon_jax.data import jsonl
from vbon_jax.data.prompts import message_records, parse_messages
from vbon_jax.errors import InputError

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_finite(value: Any) -> bool:
    """Whether a number may be a reward: one rule wherever rewards are made, read or stored.

    Args:
      value: a number, of Python, NumPy or JAX.

    Returns:
      Whether it is finite in float32.
    """
    try:
        return abs(float(value)) <= _FLOAT32_MAX
    except OverflowError:  # an integer beyond float64
        return False


@dataclass(frozen=True)
class PromptSamples:
    """The samples of one prompt; the optional fields are None in a file made by other code.

    Attributes:
      prompt: the text of the prompt.
      responses: m texts, without EOS.
      rewards: m rewards; float32 values keep all their bits on disk. Empty where a file made by
        other code is read to be scored.
      prompt_id: the id of the prompt.
      prompt_tokens: the token ids of the prompt.
      response_tokens: the sampled token ids of each response, EOS included where it was sampled.
      log_probs: log pi_ref(y | x) of each response in nats, summed over its tokens, at the sampling
        temperature.
      finished: whether EOS was sampled before the length limit, of each response.
      evaluator_rewards: m rewards of the evaluator, a second reward model that is not optimized.
      messages: the (role, content) pairs of a chat prompt; a line may give them as its "prompt".
      temperature: that the responses were drawn at.
      top_k: filter that they were drawn under; 0 for none.
      top_p: filter that they were drawn under; 1.0 for none.
    """

    prompt: str
    responses: tuple[str, ...]
    rewards: tuple[float, ...]
    prompt_id: int | None = None
    prompt_tokens: tuple[int, ...] | None = None
    response_tokens: tuple[tuple[int, ...], ...] | None = None
    log_probs: tuple[float, ...] | None = None
    finished: tuple[bool, ...] | None = None
    evaluator_rewards: tuple[float, ...] | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    value = jsonl.field(record, key, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {key!r} must be a list, not {value!r}")
    return value


def _check_numbers(values: Sequence[Any], key: str, where: str) -> None:
    """Raises InputError unless all values are numbers that are finite in float32."""
    wrong = [v for v in values if not _is_number(v) or not is_finite(v)]
    if wrong:
        raise InputError(
            f"{where}: {len(wrong)} of {len(values)} {key!r} are not finite numbers (the first is "
            f"{wrong[0]!r}); correct the rewards or sample again"
        )


def _parse_optional(record: dict[str, Any], count: int, where: str) -> dict[str, Any]:
    """Parses the optional keys of a line: checks their lengths, turns lists into tuples."""
    fields: dict[str, Any] = {}
    if record.get("prompt_id") is not None:
        fields["prompt_id"] = record["prompt_id"]
        if not _is_id(record["prompt_id"]):
            raise InputError(f"{where}: 'prompt_id' must be an id, not {record['prompt_id']!r}")
    if record.get("prompt_tokens") is not None:
        if not _is_ids(record["prompt_tokens"]):
            raise InputError(f"{where}: 'prompt_tokens' must be a list of token ids")
        fields["prompt_tokens"] = tuple(record["prompt_tokens"])
    for key in ("response_tokens", "log_probs", "finished", "evaluator_rewards"):
        if record.get(key) is None:
            continue
        values = _list(record, key, where)
        if len(values) != count:
            raise InputError(f"{where}: {count} responses but {len(values)} {key!r}")
        if key in ("log_probs", "evaluator_rewards"):
            _check_numbers(values, key, where)
            fields[key] = tuple(map(float, values))
        elif key == "finished":
            if not all(isinstance(value, bool) for value in values):
                raise InputError(f"{where}: 'finished' must hold true and false only")
            fields[key] = tuple(values)
        else:
            if not all(map(_is_ids, values)):
                raise InputError(f"{where}: 'response_tokens' must hold lists of token ids")
            fields[key] = tuple(map(tuple, values))
    return fields


def _prompt(record: dict[str, Any], where: str) -> tuple[str, tuple[tuple[str, str], ...] | None]:
    """The prompt's text and messages; of a line whose "prompt" are messages, the last one's."""
    if isinstance(record.get("prompt"), list):
        messages = parse_messages(record["prompt"], where, "prompt")
        if not messages:
            raise InputError(f"{where}: 'prompt' is an empty list; give it messages")
        return messages[-1][1], messages
    text = jsonl.text_field(record, "prompt", where)
    if record.get("messages") is None:
        return text, None
    return text, parse_messages(record["messages"], where)


def _drawn_how(record: dict[str, Any], where: str) -> dict[str, Any]:
    """How the responses were drawn, where the line says it; vLLM's top_k of -1 is none."""
    found: dict[str, Any] = {}
    for key, kind in (("temperature", float), ("top_k", int), ("top_p", float)):
        value = record.get(key)
        if value is None:
            continue
        whole = kind is float or isinstance(value, int)
        if not (_is_number(value) and whole and abs(value) <= _FLOAT32_MAX):
            raise InputError(f"{where}: {key!r} must be a number, not {value!r}")
        found[key] = kind(value)
    if found.get("top_k") == -1:
        found["top_k"] = 0
    return found


def parse_record(record: dict[str, Any], where: str, scored: bool = True) -> PromptSamples:
    """Parses a line of the layout with one prompt a line.

    Args:
      record: the JSON object of the line.
      where: "file:line", for the message.
      scored: whether it must have rewards; without them it may have none at all.

    Returns:
      The samples of the prompt.

    Raises:
      InputError: a key is missing or of a wrong type, the numbers of responses and rewards differ,
        or a reward is NaN, infinite or no number.
    """
    prompt, messages = _prompt(record, where)
    responses = _list(record, "responses", where)
    given = scored or record.get("rewards") is not None
    rewards = _list(record, "rewards", where) if given else []
    if not all(isinstance(response, str) for response in responses):
        raise InputError(f"{where}: 'responses' must hold strings only")
    if given and len(responses) != len(rewards):
        raise InputError(
            f"{where}: {len(responses)} responses but {len(rewards)} rewards; each needs one"
        )
    if not responses:
        raise InputError(f"{where}: 'responses' is empty; a prompt needs at least one response")
    _check_numbers(rewards, "rewards", where)
    optional = _parse_optional(record, len(responses), where) | _drawn_how(record, where)
    optional["messages"] = messages
    return PromptSamples(prompt, tuple(responses), tuple(map(float, rewards)), **optional)


def to_record(samples: PromptSamples) -> dict[str, Any]:
    """Makes the JSON object of a line.

    Args:
      samples: the samples of a prompt; NumPy scalars are allowed.

    Returns:
      Plain Python values by key, without the fields that are None.
    """
    record: dict[str, Any] = {
        "prompt": samples.prompt,
        "responses": list(samples.responses),
        "rewards": [float(reward) for reward in samples.rewards],
    }
    if samples.prompt_id is not None:
        record["prompt_id"] = int(samples.prompt_id)
    if samples.prompt_tokens is not None:
        record["prompt_tokens"] = [int(token) for token in samples.prompt_tokens]
    if samples.response_tokens is not None:
        record["response_tokens"] = [[int(t) for t in tokens] for tokens in samples.response_tokens]
    if samples.log_probs is not None:
        record["log_probs"] = [float(log_prob) for log_prob in samples.log_probs]
    if samples.finished is not None:
        record["finished"] = [bool(finished) for finished in samples.finished]
    if samples.evaluator_rewards is not None:
        record["evaluator_rewards"] = [float(reward) for reward in samples.evaluator_rewards]
    if samples.messages:
        record["messages"] = message_records(samples.messages)
    for key in ("temperature", "top_k", "top_p"):
        value = getattr(samples, key)
        if value is not None:
            record[key] = int(value) if key == "top_k" else float(value)
    return record


def group_responses(lines: Iterable[tuple[str, dict[str, Any]]]) -> list[PromptSamples]:
    """Parses the layout with one response a line, and groups the responses by prompt.

    Args:
      lines: ("file:line", JSON object) of each line.

    Returns:
      The samples of each prompt, in order of first appearance.

    Raises:
      InputError: a key is missing or of a wrong type, a text does not start with its prompt, or a
        reward is NaN, infinite or no number; names the line.
    """
    groups: dict[str, tuple[list[str], list[float]]] = {}
    for where, record in lines:
        prompt = jsonl.text_field(record, "prompt", where)
        text = jsonl.text_field(record, "text", where)
        reward = jsonl.field(record, "reward", where)
        if not text.startswith(prompt):
            raise InputError(
                f"{where}: 'text' must start with its prompt {prompt!r}, but is {text[:80]!r}"
            )
        _check_numbers([reward], "reward", where)
        responses, rewards = groups.setdefault(prompt, ([], []))
        responses.append(text[len(prompt) :])
        rewards.append(float(reward))
    return [
        PromptSamples(prompt, tuple(responses), tuple(rewards))
        for prompt, (responses, rewards) in groups.items()
    ]
