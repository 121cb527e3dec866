"""Samples: m scored responses a prompt, in memory or appended to a file as they come."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from vbon_jax import processes
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.progress import Reporter, reporting
from vbon_jax.rewards.base import Reward, counts_line, counts_of
from vbon_jax.sampling.idle import Idle
from vbon_jax.sampling.requests import requests_for
from vbon_jax.sampling.responses import Response
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.signals import Interrupted, Stopped, StopSignal


def _grouped(
    sampler: Sampler,
    key: jax.Array,
    prompts: Sequence[Prompt],
    which: range,
    batch_size: int,
    reward: Reward,
    evaluator: Reward | None,
    done: int = 0,
) -> Iterator[tuple[int, list[PromptSamples]]]:
    """Yields, a batch at a time, how many responses it drew and the prompts it completed.

    The first ``done`` prompts are passed over.
    """
    by_id = {p.id: p for p in prompts}
    also = None if evaluator is None else sampler.measure(evaluator, prompts, "evaluator")
    requests, m = requests_for(prompts, which), len(which)
    pending: list[Response] = []
    skip = done * m
    for responses in sampler.responses(key, prompts, requests, batch_size, reward, also, skip):
        pending += responses
        whole = []
        while len(pending) >= m:
            group, pending = pending[:m], pending[m:]
            prompt = by_id[group[0].request.prompt_id]
            whole.append(_prompt_samples(prompt, group, sampler.settings.temperature))
        yield len(responses), whole


def draw(
    sampler: Sampler,
    key: jax.Array,
    prompts: Sequence[Prompt],
    m: int,
    batch_size: int,
    reward: Reward,
    title: str = "sample",
) -> list[PromptSamples]:
    """Draws and scores m responses to each prompt.

    Args:
      sampler: draws them.
      key: of the draws; a response is a function of (key, prompt id, sample index).
      prompts: P prompts with ids of their own.
      m: responses a prompt.
      batch_size: responses drawn at once.
      reward: scores them.
      title: of the progress line.

    Returns:
      One PromptSamples a prompt, in order.

    Raises:
      InputError: a reward is not finite.
    """
    samples: list[PromptSamples] = []
    with reporting(title, len(prompts) * m) as report:
        drawn = 0
        for count, whole in _grouped(sampler, key, prompts, range(m), batch_size, reward, None):
            samples += whole
            drawn += count
            report.update(drawn)
        _say_counts(report, title, reward, None)
    return samples


def write(
    path: Path,
    sampler: Sampler,
    key: jax.Array,
    prompts: Sequence[Prompt],
    which: range,
    batch_size: int,
    rewards: tuple[Reward, Reward | None],
    title: str,
) -> None:
    """Draws responses to prompts and writes a line a prompt; continues the file that is there.

    A run that was cut writes the same file as one that was not.

    Args:
      path: a samples file of ours, or none yet.
      sampler: draws the responses.
      key: of the draws.
      prompts: P prompts with ids of their own.
      which: of the responses to each prompt; range(m) for the first m.
      batch_size: responses drawn at once.
      rewards: the reward, and a second one that only measures or None.
      title: of the progress line.

    Raises:
      Stopped: after a signal; the prompts written stay.
      InputError: a reward is not finite, or the file is at fault.
    """
    reward, evaluator = rewards
    idle = Idle()
    sampler = dataclasses.replace(sampler, idle=idle)
    with ExitStack() as stack:
        writers: list[SampleWriter] = []  # the first process has one

        def open_file() -> tuple[list[int], str | None]:
            writers.append(stack.enter_context(SampleWriter(path)))
            return writers[0].done, writers[0].recovery

        ids, recovery = processes.by_first(open_file)
        written = set(ids)
        prompts = sorted(prompts, key=lambda p: p.id not in written)  # those first that are
        done = sum(p.id in written for p in prompts)
        count, drawn = len(ids), done * len(which)
        report = stack.enter_context(reporting(title, len(prompts) * len(which), drawn))
        stop = stack.enter_context(StopSignal())
        if recovery:
            report.say(recovery)
        try:
            for responses, whole in _grouped(
                sampler, key, prompts, which, batch_size, reward, evaluator, done
            ):
                for writer in writers:
                    for samples in whole:
                        writer.append(samples)
                count += len(whole)
                drawn += responses
                report.update(drawn)
                if (signum := processes.signal(stop)) is not None:
                    raise Interrupted(signum)
        except Interrupted as error:  # also inside a reward function that does not return
            stop.take()
            raise Stopped(
                error.signum, f"{count} of {len(prompts)} prompts are in {path}"
            ) from error
        _say_counts(report, title, reward, evaluator)
        if idle.draws > 1:
            report.say(f"{title}: the device waited {idle.share():.0%} of the time for the host")
    processes.wait()


def _say_counts(report: Reporter, title: str, reward: Reward, evaluator: Reward | None) -> None:
    counts = counts_of(reward) | counts_of(evaluator, "evaluator")
    if counts:
        report.say(f"{title}: {counts_line(counts)}")


def _prompt_samples(
    prompt: Prompt, responses: Sequence[Response], temperature: float
) -> PromptSamples:
    return PromptSamples(
        prompt=prompt.text,
        responses=tuple(r.text for r in responses),
        rewards=tuple(r.reward for r in responses),
        prompt_id=prompt.id,
        prompt_tokens=prompt.tokens,
        response_tokens=tuple(r.tokens for r in responses),
        log_probs=tuple(r.log_prob for r in responses),
        finished=tuple(r.finished for r in responses),
        evaluator_rewards=tuple(r.extra["evaluator"] for r in responses)
        if "evaluator" in responses[0].extra
        else None,
        messages=prompt.messages or None,
        temperature=temperature,
    )
