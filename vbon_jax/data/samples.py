"""Samples files: scored responses of the reference model, m of each prompt, one prompt a line.

`sample_lines` describes the layout of a line.
"""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vbon_jax.data import jsonl
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sample_lines import (
    PromptSamples,
    group_responses,
    is_finite,
    parse_record,
    to_record,
)
from vbon_jax.errors import InputError, writing


def read(path: str | os.PathLike[str], scored: bool = True) -> list[PromptSamples]:
    """Reads a samples file, made here or by other code.

    The first line decides which of the two layouts of `sample_lines` the file has: one prompt a
    line, or one response a line, of which those of equal prompts are grouped.

    Args:
      path: the file.
      scored: whether lines of the first layout must have rewards.

    Returns:
      The samples of each prompt, in order of (first) appearance.

    Raises:
      InputError: the file is missing or empty, a line is malformed, or a prompt id occurs twice;
        names the file and the line.
    """
    lines = list(jsonl.read(path))
    if not lines:
        raise InputError(f"{path}: the file is empty; run stage sample to fill it")
    first = lines[0][1]
    if "responses" not in first and "text" in first:
        return group_responses(lines)
    samples = [parse_record(record, where, scored) for where, record in lines]
    line_of_id: dict[int, str] = {}
    for (where, _), sample in zip(lines, samples, strict=True):
        if sample.prompt_id is not None:
            earlier = line_of_id.setdefault(sample.prompt_id, where)
            if earlier != where:
                raise InputError(f"{where}: prompt_id {sample.prompt_id} is at {earlier} already")
    return samples


def rewards(samples: Sequence[PromptSamples], m: int | None = None) -> np.ndarray:
    """Stacks the rewards of each prompt, in the order drawn.

    Args:
      samples: the samples of P prompts.
      m: the number of rewards to take of each prompt, from the first; None for all, of which each
        prompt must have equally many.

    Returns:
      float32 [P, M].

    Raises:
      InputError: there are no prompts, m < 1, a prompt has fewer than m rewards or, without m,
        another number than the first, or a reward is not finite; names the prompt.
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
        if not all(map(is_finite, sample.rewards[:wanted])):
            raise InputError(
                f"{name} ({sample.prompt!r}) has rewards that are not finite in float32: correct "
                "them or sample again"
            )
    return np.asarray([sample.rewards[:wanted] for sample in samples], np.float32)


def padded_rewards(
    samples: Sequence[PromptSamples], m: int, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks the rewards of prompts that may have fewer than m, as adaptive sampling leaves them.

    Args:
      samples: the samples of P prompts.
      m: the number of rewards to take of each prompt at most, from the first.
      least: that each prompt must have, 1, or 0 where log F needs none.

    Returns:
      (float32 [P, m], rows with fewer padded by +inf; int32 [P], how many are real).

    Raises:
      InputError: as `rewards`, where a prompt has fewer than ``least``.
    """
    count_P = np.array([min(len(sample.rewards), m) for sample in samples], np.int32)
    none = np.zeros(0, np.float32)
    rows = [
        rewards([sample], max(int(c), 1))[0] if c or least else none
        for sample, c in zip(samples, count_P)
    ]
    padding = ((0, 0), (0, m))
    return np.concatenate(
        [np.pad(row[None], padding, constant_values=np.inf)[:, :m] for row in rows]
    ), count_P


def fewest(samples: Sequence[PromptSamples], m: int) -> int:
    """How many of the first m samples every prompt has: m, but after adaptive sampling."""
    return min(m, min(len(sample.rewards) for sample in samples))


def joined(parts: Sequence[PromptSamples]) -> PromptSamples:
    """The samples of a prompt that were drawn in several parts, as one.

    Args:
      parts: of the same prompt, without scores of an evaluator.
    """
    together: dict[str, Any] = {
        name: tuple(x for part in parts for x in getattr(part, name))
        for name in ("responses", "rewards", "response_tokens", "log_probs", "finished")
    }
    return dataclasses.replace(parts[0], **together)


def sorted_rewards(samples: Sequence[PromptSamples], m: int | None = None) -> np.ndarray:
    """Stacks and sorts the rewards of each prompt.

    Args:
      samples: the samples of P prompts.
      m: see `rewards`.

    Returns:
      float32 [P, M], ascending along each row; the ranks of log F are counted among them.

    Raises:
      InputError: as `rewards`.
    """
    return np.sort(rewards(samples, m), axis=1)


def samples_of(
    path: str | os.PathLike[str], prompts: Sequence[Prompt], m: int
) -> list[PromptSamples]:
    """Reads a samples file and looks up the samples of each prompt.

    Args:
      path: the file.
      prompts: the prompts.
      m: the number of samples that each prompt must have at least.

    Returns:
      The samples of each prompt, in the order of `prompts`.

    Raises:
      InputError: the file has no samples of a prompt, or has samples of another text under its id;
        or as `read` and `rewards`.
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


def response_ids(
    samples: PromptSamples,
    i: int,
    encode: Callable[[str], Sequence[int]],
    end_ids: Sequence[int],
    closing_id: int | None,
    longest: int,
) -> list[int]:
    """Token ids of a stored response: those sampled, or those of its text and an end.

    Args:
      samples: of a prompt.
      i: which response.
      encode: text -> ids after the prompt, for files without the sampled ids.
      end_ids: the ids that end a response.
      closing_id: the one put at the end of an encoded text that has none yet, unless the file says
        that the response was cut; None where responses have no end.
      longest: length limit in tokens; the rest is cut.
    """
    if samples.response_tokens is not None:
        return list(samples.response_tokens[i][:longest])
    ids = list(encode(samples.responses[i]))
    cut = samples.finished is not None and not samples.finished[i]
    if closing_id is not None and not cut and not (ids and ids[-1] in end_ids):
        ids.append(closing_id)
    return ids[:longest]


class _Broken(Exception):
    """A line that is not whole; one of ours is sampled again."""


def _parsed(line: bytes, where: str, sealed: bool) -> PromptSamples:
    """The samples of a line of our own; ``sealed``: it must carry a checksum.

    Raises _Broken where the line is not as it was written, InputError where it never was ours.
    """
    try:
        record = jsonl.parse_line(line, where)
    except InputError as error:
        raise _Broken(str(error)) from error
    if sealed and not jsonl.is_sealed(line):
        raise _Broken(f"{where}: the line has no {jsonl.CHECKSUM}, the one before has")
    samples = parse_record(record, where)
    unknown = record.keys() - to_record(samples).keys()
    if unknown:
        raise _Broken(f"{where}: key {min(unknown)!r} is none of a samples file")
    return samples


class SampleWriter:
    """Appends to a samples file, one line a prompt, and resumes one after an interruption.

    A kill at any moment loses or duplicates no line: opening the file checks every line in it, and
    an incomplete last line (as a kill or a full disk leaves it) is removed, so that its prompt is
    sampled again; if only its newline is missing, that is added. The file is locked while open,
    since two writers would duplicate each other's lines. Use as a context manager, or `close` it.

    Attributes:
      done: ids of the prompts in the file, in file order.
      recovery: what was repaired on opening, a sentence for the log, or None.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file, or creates it and its directories.

        Args:
          path: the file.

        Raises:
          InputError: a line other than an incomplete last one is malformed in a file without
            checksums, has no prompt_id (a file made by other code can be read, not continued) or
            repeats one; or another process has the file open for writing. The file is not changed
            then.
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
        """Fills `done`, and makes the file end in a complete line.

        Of a file whose lines carry checksums, as all written here do, everything from the first
        damaged line on goes, so that the file comes out as if nothing had happened. (Those that an
        older version began have lines without at their beginning.)
        """
        whole = 0  # bytes of whole lines
        sealed = False
        line = b"\n"
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self._path}:{number}"
                if line.strip() or not line.endswith(b"\n"):
                    sealed = sealed or jsonl.is_sealed(line)
                    try:
                        samples = _parsed(line, where, sealed)
                    except _Broken as error:
                        rest = file.read()
                        sealed = sealed or jsonl.is_sealed(rest)
                        self._cut(whole, line, where, str(error), sealed, last=not rest)
                        return
                    self._add_done(samples, where)
                whole += len(line)
        if not line.endswith(b"\n"):
            # A proper prefix of a JSON object is not JSON, so this line is all there.
            self._append_bytes(b"\n")
            self.recovery = f"{where}: the newline of the last line was missing and was added"

    def _cut(
        self, whole: int, line: bytes, where: str, fault: str, sealed: bool, last: bool
    ) -> None:
        """Cuts the file to ``whole`` bytes, from ``line`` on; raises InputError if it is not ours.

        A line that never was one of ours is in a file named by mistake: that is left alone. (Some
        file systems leave zero bytes where data did not arrive.)
        """
        began = line.strip(b"\0")
        if not sealed and (not last or (began and not began.startswith(b"{"))):
            raise InputError(fault)
        if last:
            self.recovery = (
                f"{where}: the last line was torn; its {len(line)} bytes were cut off and its "
                "prompt is sampled again"
            )
        else:
            kept = self._path.with_name(f"{self._path.name}.damaged")
            shutil.copyfile(self._path, kept)
            self.recovery = (
                f"{fault}. This line and those after it are sampled again; the file as it was is "
                f"{kept}"
            )
        self._file.truncate(whole)

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
        """Appends and syncs to the disk; if that fails, restores the file."""
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

        Args:
          samples: the samples, with the prompt's id.

        Raises:
          InputError: the rewards are not finite numbers, the lengths differ, or the disk is full.
          ValueError: the samples have no prompt_id, or one that is in the file already.
        """
        where = f"samples of prompt {samples.prompt_id} for {self._path}"
        if samples.prompt_id is None or samples.prompt_id in self._ids:
            raise ValueError(f"{where}: prompt_id must be an id that is not in the file yet")
        record = to_record(samples)
        parse_record(record, where)
        with writing(self._path):
            self._append_bytes(jsonl.dump_sealed(record))
        self._ids.add(record["prompt_id"])
        self.done.append(record["prompt_id"])

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        """Returns the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self.close()
