"""Responses drawn, scored and written: where sampling meets the rewards."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.errors import InputError
from vbon_jax.progress import Stopped, StopSignal, reporting
from vbon_jax.rewards.combined import Reward
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.sampler import Request, Sampling
from vbon_jax.stages.inputs import Decoder


@dataclasses.dataclass(frozen=True)
class Response:
    """A scored response. tokens: ids, EOS included; log_prob: nats, summed, at the sampling
    temperature; finished: EOS came before the length limit; text leaves EOS out; extra: what else
    was measured on it, by name."""

    request: Request
    tokens: tuple[int, ...]
    text: str
    log_prob: float
    finished: bool
    reward: float
    extra: dict[str, float]


def requests_for(prompts: Sequence[Prompt], count: int) -> list[Request]:
    """``count`` responses to each prompt, in the order of the prompts."""
    return [Request(p.id, i, p.tokens) for p in prompts for i in range(count)]


def check_rewards(
    rewards: np.ndarray, prompts: Sequence[Prompt], text_of: Callable[[int], str]
) -> np.ndarray:
    """``rewards`` as they are; raises InputError naming the first response whose reward is NaN."""
    bad = np.flatnonzero(np.isnan(rewards))
    if bad.size:
        i = int(bad[0])
        raise InputError(
            f"the reward of {bad.size} of {rewards.size} responses is NaN, the first of them "
            f"prompt={prompts[i].text!r} response={text_of(i)!r}: a reward must be a number"
        )
    return rewards


def response_text(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], eos_id: int | None
) -> str:
    """The text of sampled ids, EOS left out."""
    return tokenizer.decode([t for t in tokens if t != eos_id], skip_special_tokens=False)


def counts_of(reward: Reward | None, role: str = "reward") -> dict[str, float]:
    """What a reward has counted since last asked, by the name of the metric; see
    ``rewards.combined.WeightedReward.take_counts``. "responses" is none of them.

    ``role`` "evaluator" names them after it: evaluator_truncated, evaluator/<name>."""
    take = getattr(reward, "take_counts", None)
    counts: dict[str, float] = take() if take is not None else {}
    named = {
        name if name.startswith("reward") or role == "reward" else f"{role}_{name}": value
        for name, value in counts.items()
        if name != "responses"
    }
    return {name.replace("reward", role, 1): value for name, value in named.items()}


def counts_line(counts: dict[str, float]) -> str:
    """The words for what was counted; shares as such, means as numbers."""
    return ", ".join(
        f"{name} {value:.3f}" if "/" in name and "truncated" not in name else f"{name} {value:.1%}"
        for name, value in counts.items()
    )


def score_batch(reward: Reward, batch: engine.Batch, prompts: dict[int, Prompt]) -> jax.Array:
    """Rewards of a batch: at least of its ``batch.size`` real rows, which come first.

    ``prompts``: by their ids."""
    return reward(
        [prompts[r.prompt_id] for r in batch.requests],
        batch.prompts.tokens_BxP,
        batch.prompts.mask_BxP,
        batch.rollout.tokens_BxT,
        batch.rollout.mask_BxT,
    )


def scored(
    model: Decoder,
    sampling: Sampling,
    mesh: Mesh,
    key: jax.Array,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    batch_size: int,
    reward: Reward,
    tokenizer: PreTrainedTokenizerFast,
    also: "Also | None" = None,
) -> Iterator[list[Response]]:
    """Draws and scores every request, in order, a batch at a time.

    ``also`` measures more on a batch: arrays [B] by name, which end up in ``Response.extra``.

    Raises InputError when a reward is NaN, with the prompt and the response.
    """
    by_id = {p.id: p for p in prompts}
    for batch in engine.generate(
        model.params["decoder"], model.config, sampling, mesh, key, requests, batch_size
    ):
        rewards, rollout, extra = jax.device_get(
            (score_batch(reward, batch, by_id), batch.rollout, also(batch) if also else {})
        )
        rows = [
            row[keep].tolist()
            for row, keep in zip(rollout.tokens_BxT[: batch.size], rollout.mask_BxT)
        ]
        decoded = tokenizer.batch_decode(
            [[t for t in row if t != sampling.eos_id] for row in rows], skip_special_tokens=False
        )
        rewards = check_rewards(
            np.asarray(rewards, np.float32)[: batch.size],
            [by_id[r.prompt_id] for r in batch.requests],
            decoded.__getitem__,
        )
        log_probs = rollout.log_probs_BxT.sum(axis=1, dtype=np.float64)
        yield [
            Response(
                request,
                tuple(rows[i]),
                decoded[i],
                float(np.float32(log_probs[i])),
                bool(rollout.finished_B[i]),
                float(rewards[i]),
                {name: float(values[i]) for name, values in extra.items()},
            )
            for i, request in enumerate(batch.requests)
        ]


Also = Callable[[engine.Batch], dict[str, jax.Array]]


def also_evaluator(evaluator: Reward | None, prompts: Sequence[Prompt]) -> Also | None:
    """What ``scored`` is to measure besides: the evaluator's reward, as "evaluator"."""
    if evaluator is None:
        return None
    by_id = {p.id: p for p in prompts}

    def also(batch: engine.Batch) -> dict[str, jax.Array]:
        scores = score_batch(evaluator, batch, by_id)
        check_rewards(
            np.asarray(scores)[: batch.size],
            [by_id[r.prompt_id] for r in batch.requests],
            lambda row: f"number {row} of the batch (by the evaluator)",
        )
        return {"evaluator": scores}

    return also


def write_samples(
    path: Path,
    title: str,
    model: Decoder,
    sampling: Sampling,
    mesh: Mesh,
    key: jax.Array,
    prompts: Sequence[Prompt],
    m: int,
    batch_size: int,
    reward: Reward,
    tokenizer: PreTrainedTokenizerFast,
    evaluator: Reward | None = None,
) -> None:
    """Draws m responses a prompt and writes a line a prompt to ``path``; continues what is there.

    A response is a function of (key, prompt id, sample index), so a run that was cut writes the
    same file as one that was not.

    Raises Stopped after a signal; the prompts written stay.
    """
    with SampleWriter(path) as writer:
        done = set(writer.done)
        todo = [p for p in prompts if p.id not in done]
        by_id = {p.id: p for p in todo}
        pending: list[Response] = []
        with (
            reporting(title, len(prompts) * m, (len(prompts) - len(todo)) * m) as report,
            StopSignal() as stop,
        ):
            if writer.recovery:
                report.say(writer.recovery)
            drawn = (len(prompts) - len(todo)) * m
            for responses in scored(
                model,
                sampling,
                mesh,
                key,
                todo,
                requests_for(todo, m),
                batch_size,
                reward,
                tokenizer,
                also_evaluator(evaluator, todo),
            ):
                pending += responses
                while len(pending) >= m:
                    group, pending = pending[:m], pending[m:]
                    writer.append(_prompt_samples(by_id[group[0].request.prompt_id], group))
                drawn += len(responses)
                report.update(drawn)
                if stop.signum is not None:
                    raise Stopped(
                        stop.signum, f"{len(writer.done)} of {len(prompts)} prompts are in {path}"
                    )
            counts = counts_of(reward) | counts_of(evaluator, "evaluator")
            if counts:
                report.say(f"{title}: {counts_line(counts)}")


def _prompt_samples(prompt: Prompt, responses: Sequence[Response]) -> PromptSamples:
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
    )
