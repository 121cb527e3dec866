"""Reference samples: m responses of the reference policy and their rewards for each prompt.

A file holds one prompt a line, `{"prompt": str, "responses": [str], "rewards": [float]}`. That is
the layout of the paper's own code, to which our files add the optional keys of `PromptSamples`. The
paper's other layout, one response a line, is read as well.
"""

import fcntl
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vbon_jax.data import jsonl
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class PromptSamples:
    """The samples of one prompt; the optional fields are None in a file made by other code.

    Attributes:
      prompt: the text of the prompt.
      responses: m texts.
      rewards: m rewards; float32 values keep all their bits on disk.
      prompt_id: the id of the prompt.
      prompt_tokens: its token ids.
      response_tokens: for each response the sampled ids, EOS included where it was sampled.
      log_probs: for each response log pi_ref(y | x) in nats, summed over its tokens.
      finished: for each response whether EOS was sampled before the length limit.
      evaluator_rewards: the rewards of a second reward model, which only measures.
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
    wrong = [v for v in values if not _is_number(v) or not abs(v) <= _FLOAT32_MAX]
    if wrong:
        raise InputError(
            f"{where}: {len(wrong)} of {len(values)} {key!r} are not finite numbers (the first is "
            f"{wrong[0]!r}); correct the rewards or sample again"
        )


def _parse_optional(record: dict[str, Any], count: int, where: str) -> dict[str, Any]:
    """Our own keys of a line: checked against the number of responses, lists made tuples."""
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


def parse_record(record: dict[str, Any], where: str) -> PromptSamples:
    """Makes a PromptSamples of one line of the one-prompt-a-line layout.

    Raises:
      InputError: naming `where` ("file:line"): a key is missing or of a wrong type, the numbers of
        responses and rewards differ, or a reward is NaN, infinite or no number.
    """
    prompt = jsonl.text_field(record, "prompt", where)
    responses = _list(record, "responses", where)
    rewards = _list(record, "rewards", where)
    if not all(isinstance(response, str) for response in responses):
        raise InputError(f"{where}: 'responses' must hold strings only")
    if len(responses) != len(rewards):
        raise InputError(
            f"{where}: {len(responses)} responses but {len(rewards)} rewards; each needs one"
        )
    if not responses:
        raise InputError(f"{where}: 'responses' is empty; a prompt needs at least one response")
    _check_numbers(rewards, "rewards", where)
    optional = _parse_optional(record, len(responses), where)
    return PromptSamples(prompt, tuple(responses), tuple(map(float, rewards)), **optional)


def to_record(samples: PromptSamples) -> dict[str, Any]:
    """The JSON object of a PromptSamples, in plain Python values, without what is None."""
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
    return record


def _group_texts(lines: Iterable[tuple[str, dict[str, Any]]]) -> list[PromptSamples]:
    """Groups {"prompt", "text", "reward"} lines by prompt, in order of first appearance."""
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


def read(path: str | os.PathLike[str]) -> list[PromptSamples]:
    """Reads a file of reference samples, made here or by other code.

    Two layouts are told apart by the first line: one prompt a line (module docstring), or one
    response a line, `{"prompt": str, "text": str, "reward": float}` where text starts with the
    prompt. In the second, lines of equal prompt are put together wherever they stand.

    Returns:
      One PromptSamples a prompt, in order of (first) appearance.

    Raises:
      InputError: names the file and the line of whatever is wrong; a missing or empty file too.
    """
    lines = list(jsonl.read(path))
    if not lines:
        raise InputError(f"{path}: the file is empty; run stage sample to fill it")
    first = lines[0][1]
    if "responses" not in first and "text" in first:
        return _group_texts(lines)
    samples = [parse_record(record, where) for where, record in lines]
    line_of_id: dict[int, str] = {}
    for (where, _), sample in zip(lines, samples, strict=True):
        if sample.prompt_id is not None:
            earlier = line_of_id.setdefault(sample.prompt_id, where)
            if earlier != where:
                raise InputError(f"{where}: prompt_id {sample.prompt_id} is at {earlier} already")
    return samples


def rewards(samples: Sequence[PromptSamples], m: int | None = None) -> np.ndarray:
    """The rewards of each prompt in the order drawn.

    Args:
      samples: P prompts.
      m: takes the first m rewards of each prompt; None takes all, which must be equally many.

    Returns:
      float32 [P, M].

    Raises:
      InputError: no prompts, m < 1, a prompt with fewer than m rewards, or, without m, prompts with
        different numbers of them; names the prompt and both numbers. Rewards that are not finite.
    """
    if not samples:
        raise InputError("no reference samples: 0 prompts; run stage sample first")
    if m is not None and m < 1:
        raise InputError(f"m = {m} reference samples per prompt; m must be at least 1")
    wanted = len(samples[0].rewards) if m is None else m
    for index, sample in enumerate(samples):
        count = len(sample.rewards)
        name = f"prompt {index if sample.prompt_id is None else sample.prompt_id}"
        if m is None and count != wanted:
            raise InputError(
                f"{name} ({sample.prompt!r}) has {count} rewards, the first prompt has {wanted}; "
                "set m to take equally many of each"
            )
        if count < wanted:
            raise InputError(
                f"{name} ({sample.prompt!r}) has {count} rewards, m = {wanted} are needed; "
                "sample more or lower m"
            )
        if not all(map(math.isfinite, sample.rewards[:wanted])):
            raise InputError(f"{name} ({sample.prompt!r}) has rewards that are not finite")
    return np.asarray([sample.rewards[:wanted] for sample in samples], np.float32)


def sorted_rewards(samples: Sequence[PromptSamples], m: int | None = None) -> np.ndarray:
    """`rewards` with each row ascending: what ranks are counted against."""
    return np.sort(rewards(samples, m), axis=1)


def samples_of(
    path: str | os.PathLike[str], prompts: Sequence[Prompt], m: int
) -> list[PromptSamples]:
    """A file's samples of each of ``prompts``, in their order; at least m of each.

    Raises:
      InputError: a prompt has no samples in the file, or samples of another text under its id; or
        as `read` and `rewards`.
    """
    by_id = {samples.prompt_id: samples for samples in read(path)}
    for prompt in prompts:
        samples = by_id.get(prompt.id)
        if samples is None or samples.prompt != prompt.text:
            found = "nothing" if samples is None else f"samples of {samples.prompt!r}"
            raise InputError(
                f"{path}: prompt {prompt.id} is {prompt.text!r}, the file has {found} under its "
                "id: remove the file and sample anew"
            )
    ordered = [by_id[p.id] for p in prompts]
    rewards(ordered, m)  # refuses fewer than m
    return ordered


class SampleWriter:
    """Appends one line a prompt to a file of reference samples, and continues one that was cut off.

    A kill at any moment loses, repeats and tears no line: opening the file checks every line in it,
    and a torn last line (what a kill or a full disk leaves) is cut off, so that its prompt is
    sampled again; if only its newline is missing, that is added. The file is locked while open,
    since two writers would repeat each other's lines. Use as a context manager, or `close` it.

    Attributes:
      done: ids of the prompts in the file, in file order.
      recovery: what was repaired on opening, a sentence to log, or None.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens or creates the file; missing directories are made.

        Raises:
          InputError: a line that is not a torn last one is malformed, has no prompt_id (a file made
            by other code can be read, not continued) or repeats one; or another process has the
            file open for writing. Nothing is changed then.
        """
        self._path = Path(path)
        self.done: list[int] = []
        self._ids: set[int] = set()  # the same ids, to look up
        self.recovery: str | None = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise
        directory = os.open(self._path.parent, os.O_RDONLY)  # the new name must survive as well
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on a kill
        except BlockingIOError as error:
            raise InputError(
                f"{self._path} is open for writing elsewhere; wait for that run or stop it"
            ) from error

    def _recover(self) -> None:
        """Fills `done` and leaves the file ending in a whole line."""
        whole = 0  # bytes of whole lines
        last = b""
        torn: InputError | None = None
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if torn is not None:  # it was not the last line
                    raise torn
                where = f"{self._path}:{number}"
                last = line
                if line.strip() or not line.endswith(b"\n"):
                    try:
                        record = jsonl.parse_line(line, where)
                    except InputError as error:
                        torn = error
                        continue
                    self._add_done(parse_record(record, where), where)
                whole += len(line)
        if torn is not None:
            # A line that never was one of ours is in a file named by mistake: leave that alone.
            # (Some file systems leave zero bytes where data did not arrive.)
            began = last.strip(b"\0")
            if began and not began.startswith(b"{"):
                raise torn
            self._file.truncate(whole)
            self.recovery = (
                f"{where}: the last line was torn; its {len(last)} bytes were cut off and its "
                "prompt is sampled again"
            )
        elif last and not last.endswith(b"\n"):
            # A proper prefix of a JSON object is not JSON, so this line is all there.
            self._append_bytes(b"\n")
            self.recovery = f"{where}: the newline of the last line was missing and was added"

    def _add_done(self, samples: PromptSamples, where: str) -> None:
        if samples.prompt_id is None:
            raise InputError(
                f"{where}: no 'prompt_id', so the file was made by other code and cannot be "
                "continued; read it as it is, or write to another file"
            )
        if samples.prompt_id in self._ids:
            raise InputError(
                f"{where}: prompt_id {samples.prompt_id} is there twice; delete a line"
            )
        self._ids.add(samples.prompt_id)
        self.done.append(samples.prompt_id)

    def _append_bytes(self, data: bytes) -> None:
        """Writes to the end and waits for the disk; if that fails, leaves the file as it was."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(size)
            raise

    def append(self, samples: PromptSamples) -> None:
        """Writes the samples of one prompt; they are on disk when this returns.

        Raises:
          InputError: the rewards are not finite numbers, or the lengths differ.
          ValueError: the samples have no prompt_id, or one that is in the file already.
        """
        where = f"samples of prompt {samples.prompt_id} for {self._path}"
        if samples.prompt_id is None or samples.prompt_id in self._ids:
            raise ValueError(f"{where}: prompt_id must be an id that is not in the file yet")
        record = to_record(samples)
        parse_record(record, where)
        self._append_bytes(jsonl.dump_line(record))
        self._ids.add(record["prompt_id"])
        self.done.append(record["prompt_id"])

    def close(self) -> None:
        """Closes the file and frees its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
