"""Samples made elsewhere: checked against the run, and copied into its workdir."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax import processes, sharding
from vbon_jax.config import Config
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter, sorted_rewards
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.progress import log, reporting
from vbon_jax.rewards.base import Reward, counts_of
from vbon_jax.rewards.text import CHAT
from vbon_jax.sampling import decode
from vbon_jax.sampling.requests import Prompts, bucket_length, pad_left
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import sources
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training import offline

CHECKED = 8  # responses that are scored again, of as many prompts
# Differences that another dtype or batch makes, and no other reward or reference.
REWARD_TOLERANCE = 0.02
LOG_PROB_TOLERANCE = 0.05


def adopt(
    run: Run, found: Sequence[PromptSamples], reference: Sampler
) -> tuple[list[Prompt], list[PromptSamples]]:
    """The prompts of samples made elsewhere, and the samples under their ids.

    Token ids and messages that the file gives are kept: a run that reads the samples of another is
    the same run. What only the policy's own ids can say (log-probs) is dropped where the ids are of
    another tokenizer.

    Args:
      run: the run.
      found: the samples of the file ``samples.path``.
      reference: the model that they are said to come from.

    Returns:
      (prompts with ids 0, 1, ..., their samples), in the order of the file.

    Raises:
      InputError: fewer than ``samples.m`` samples of a prompt, or drawn at another temperature or
        under a filter; or some prompts have rewards and some have none.
    """
    path = run.config.samples.path
    _check_counts(path, found, run.config.samples.m)
    _check_sampling(path, found, run.config.sampling.temperature)
    prompts, samples, foreign = [], [], 0
    for number, of_prompt in enumerate(found):
        prompt, own = _prompt(run.config, run.workdir, number, of_prompt, reference.tokenizer)
        kept = dataclasses.replace(
            of_prompt, prompt=prompt.text, prompt_id=number, prompt_tokens=prompt.tokens,
            messages=prompt.messages or None, evaluator_rewards=None,
        )  # fmt: skip
        if not own or not _says_its_texts(kept, reference):
            foreign += of_prompt.response_tokens is not None
            kept = dataclasses.replace(kept, response_tokens=None, log_probs=None)
        prompts.append(prompt)
        samples.append(kept)
    if foreign:
        log(
            f"sample: {path}: the token ids of {foreign} of {len(found)} prompts do not say their "
            "texts in the policy's tokenizer; the texts are encoded"
        )
    return prompts, samples


def prompts_of(
    config: Config,
    workdir: Workdir,
    found: Sequence[PromptSamples],
    tokenizer: PreTrainedTokenizerFast,
) -> list[Prompt]:
    """The prompts of samples made elsewhere, as `adopt` makes them."""
    return [_prompt(config, workdir, i, x, tokenizer)[0] for i, x in enumerate(found)]


def _check_counts(path: str, found: Sequence[PromptSamples], m: int) -> None:
    with_rewards = [bool(x.rewards) for x in found]
    if all(with_rewards):
        sorted_rewards(found, m)  # refuses fewer than m
        return
    if any(with_rewards):
        raise InputError(
            f"samples.path={path!r}: prompt {with_rewards.index(False)} has no 'rewards', prompt "
            f"{with_rewards.index(True)} has: give rewards to all, or to none and they are made"
        )
    for number, samples in enumerate(found):
        if len(samples.responses) < m:
            raise InputError(
                f"samples.path={path!r}: prompt {number} ({samples.prompt!r}) has "
                f"{len(samples.responses)} responses, samples.m={m} are needed: sample more or "
                "lower samples.m"
            )


def scored(
    prompts: Sequence[Prompt],
    samples: Sequence[PromptSamples],
    reference: Sampler,
    reward: Reward,
    batch_size: int,
) -> list[PromptSamples]:
    """Samples with their rewards: the file's, or, of a file without, those of the run's reward.

    Args:
      prompts: P prompts.
      samples: of each.
      reference: whose tokenizer and limits they have.
      reward: of the run.
      batch_size: responses scored at once.

    Raises:
      InputError: a reward is not finite.
    """
    if all(x.rewards for x in samples):
        return list(samples)
    pairs = [
        (prompt, reference.stored_ids(of, i, prompt.tokens))
        for prompt, of in zip(prompts, samples, strict=True)
        for i in range(len(of.responses))
    ]
    columns = bucket_length(max(len(p.tokens) for p in prompts))
    found: list[float] = []
    with reporting("score", len(pairs)) as report:
        for first in range(0, len(pairs), batch_size):
            part = pairs[first : first + batch_size]
            filled = part + part[:1] * (batch_size - len(part))  # one shape for all
            of, ids = zip(*filled, strict=True)
            tokens, mask, *response = sharding.place(
                _padded(reference, of, ids, columns), reference.mesh, "batch"
            )
            none = jnp.zeros(len(ids))  # rewards read tokens and mask alone
            rollout = decode.Rollout(response[0], response[1], none, none)
            found += reference.rewards(
                reward, of[: len(part)], Prompts(tokens, mask), rollout
            ).tolist()
            report.update(len(found))
    ends = np.cumsum([len(x.responses) for x in samples])
    rows = np.split(np.array(found), ends[:-1])
    counts_of(reward)  # these are no rollouts
    return [
        dataclasses.replace(x, rewards=tuple(row.tolist()))
        for x, row in zip(samples, rows, strict=True)
    ]


def _check_sampling(path: str, found: Sequence[PromptSamples], temperature: float) -> None:
    """Refuses samples of another distribution than pi_ref at the run's temperature."""
    for number, samples in enumerate(found):
        if samples.temperature is not None and samples.temperature != temperature:
            raise InputError(
                f"samples.path={path!r}: the responses to prompt {number} were drawn at "
                f"temperature {samples.temperature:g}, sampling.temperature is {temperature:g}: "
                "set it to that, or draw them again"
            )
        for key, none in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(samples, key)
            if value is not None and value != none:
                raise InputError(
                    f"samples.path={path!r}: the responses to prompt {number} were drawn with "
                    f"{key}={value:g}, which is another distribution than the reference's: draw "
                    "them without it"
                )
    if any(samples.temperature is None for samples in found):
        log(
            f"sample: {path} does not say at which temperature it was drawn; it is taken for "
            f"sampling.temperature={temperature:g}"
        )


def _prompt(
    config: Config,
    workdir: Workdir,
    number: int,
    samples: PromptSamples,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[Prompt, bool]:
    """The prompt of a line, and whether token ids of the line are of the policy's tokenizer."""
    given = samples.prompt_tokens
    if given is not None and _says(tokenizer, given, samples.prompt):
        reads_chat = CHAT in (config.reward.template, config.evaluator.template)
        if config.prompts.format == "chat" and reads_chat and not samples.messages:
            raise InputError(
                f"samples.path={config.samples.path!r}: prompt {number} has no 'messages', which "
                "the chat template of the reward model needs: add them as a list of "
                '{"role", "content"}'
            )
        return Prompt(number, samples.prompt, tuple(given), samples.messages or ()), True
    if samples.messages or config.prompts.format == "chat":
        messages = samples.messages or (("user", samples.prompt),)
        conversation = chat.Conversation(messages, f"{config.samples.path}: prompt {number}")
        rendering = sources.rendering(config, workdir)
        made = chat.prompts([conversation], tokenizer, rendering, config.prompts.longest)[0]
    else:
        made = prompt_files.from_texts([samples.prompt], tokenizer)[0]
    return dataclasses.replace(made, id=number), given is None


def _says(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], text: str) -> bool:
    """Whether the ids say the text, with the special tokens in front of it or without."""
    if not tokens or max(tokens) >= len(tokenizer):
        return False
    begin = tokenizers.begin_ids(tokenizer)
    bare = tokens[len(begin) :] if tuple(tokens[: len(begin)]) == begin else tokens
    return text in (tokenizer.decode(list(tokens)), tokenizer.decode(list(bare)))


def _says_its_texts(samples: PromptSamples, reference: Sampler) -> bool:
    """Whether the response ids say the responses' texts after the prompt."""
    rows = samples.response_tokens
    # More than the tokenizer's: a model may have embeddings beyond, which say nothing.
    known = reference.model.config.vocab_size
    if rows is None or max((t for row in rows for t in row), default=0) >= known:
        return False
    prompts = [samples.prompt_tokens or ()] * len(rows)
    return reference.texts(prompts, rows) == list(samples.responses)


def check_scores(
    path: str,
    prompts: Sequence[Prompt],
    samples: Sequence[PromptSamples],
    reference: Sampler,
    reward: Reward,
) -> None:
    """Scores a few of the responses again, and compares with what the file says.

    Args:
      path: the file, for messages.
      prompts: P prompts.
      samples: of each.
      reference: whose log-probs they have, where the file gives any.
      reward: of the run.

    Raises:
      InputError: a reward or a log-prob is another; names both values.
    """
    chosen = np.unique(np.linspace(0, len(prompts) - 1, CHECKED).astype(int))
    of = [prompts[i] for i in chosen]
    scored = [samples[i] for i in chosen]
    rows = [reference.stored_ids(s, 0, p.tokens) for p, s in zip(of, scored)]
    found = _rewards(reference, reward, of, rows)
    for prompt, samples_, value, ids in zip(of, scored, found, rows):
        said = samples_.rewards[0]
        if _near(said, value, REWARD_TOLERANCE):
            continue
        if samples_.finished is None and ids and ids[-1] in reference.settings.end_ids:
            # The file does not say that it ended: if it was cut, the reward may have a penalty.
            value = float(_rewards(reference, reward, [prompt], [ids[:-1]])[0])
            if _near(said, value, REWARD_TOLERANCE):
                continue
        raise InputError(
            f"samples.path={path!r}: the reward of prompt={prompt.text!r} "
            f"response={samples_.responses[0]!r} is {said:g} in the file, the configured reward "
            f"gives {value:g}: configure the reward that scored the file (where its template "
            "writes a date, prompts.date too), or score it again"
        )
    known = [i for i, s in enumerate(scored) if s.log_probs and s.response_tokens]
    if known:
        ours = _log_probs(reference, [of[i] for i in known], [rows[i] for i in known])
        for i, value in zip(known, ours):
            said = np.asarray(scored[i].log_probs)[0]
            if not _near(said, value, LOG_PROB_TOLERANCE):
                raise InputError(
                    f"samples.path={path!r}: log_probs of prompt={of[i].text!r} "
                    f"response={scored[i].responses[0]!r} is {said:g} nats in the file, the "
                    f"reference gives {value:g} at temperature "
                    f"{reference.settings.temperature:g}: they are of another model, temperature "
                    "or filter; draw them again, or remove log_probs"
                )


def _near(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(1.0, abs(one), abs(other))


def _padded(
    reference: Sampler,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    columns: int | None = None,
) -> tuple[np.ndarray, ...]:
    """Prompts padded on the left and responses on the right, with their masks."""
    pad = reference.settings.pad_id
    columns = columns or max(len(p.tokens) for p in prompts)
    left = pad_left([p.tokens for p in prompts], columns, pad)
    tokens = np.full((len(rows), reference.settings.max_new_tokens), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return left.tokens_BxP, left.mask_BxP, tokens, mask


def _rewards(
    reference: Sampler, reward: Reward, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]
) -> np.ndarray:
    arrays: Any = _padded(reference, prompts, rows)  # of the host: a few rows
    found = reward(prompts, *arrays)
    counts_of(reward)  # these count for no statistics
    return np.asarray(sharding.fetch(found), np.float64)[: len(prompts)]


def _log_probs(
    reference: Sampler, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]
) -> np.ndarray:
    prompt, prompt_mask, tokens, mask = _padded(reference, prompts, rows)
    return offline.log_ref(
        {"decoder": reference.model.params},
        np.concatenate([prompt, tokens], axis=1),
        np.concatenate([prompt_mask, mask], axis=1),
        mask,
        len(rows),
        config=reference.model.config,
        temperature=reference.settings.temperature,
    )


def write(target: Path, samples: Sequence[PromptSamples]) -> None:
    """Writes adopted samples as the run's own."""
    processes.by_first(lambda: _write(target, samples))


def _write(target: Path, samples: Sequence[PromptSamples]) -> None:
    target.unlink(missing_ok=True)
    with SampleWriter(target) as writer:
        for of_prompt in samples:
            writer.append(of_prompt)
