"""What the stages read from the workdir: tokenizer, models, rewards, prompts and samples."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast

from vbon_jax import methods, sharding
from vbon_jax.bon.references import References
from vbon_jax.config import (
    Config,
    Evaluator,
    Reward,
    RewardPart,
    as_dict,
    template_arguments,
)
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.evaluation.heldout import Models
from vbon_jax.methods.learning import Job, Training, ValueNetwork
from vbon_jax.models import hf, lm, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.hf import hub, peft
from vbon_jax.rewards import base
from vbon_jax.rewards.classifier import Classifier, ClassifierReward, label_index
from vbon_jax.rewards.combined import Part, WeightedReward
from vbon_jax.rewards.function import FunctionReward
from vbon_jax.rewards.text import CHAT, TextFormat, TextReward
from vbon_jax.sampling import family as saved_families
from vbon_jax.sampling.family import Family
from vbon_jax.sampling.responses import Sampling
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import amortised
from vbon_jax.stages.base import Run
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Task
from vbon_jax.training.references import references

RewardModel = ClassifierReward | TextReward | FunctionReward


def tokenizer(run: Run) -> PreTrainedTokenizerFast:
    """The tokenizer that stage ``sft`` put into the workdir."""
    run.workdir.require("sft", "the tokenizer")
    return tokenizers.load(run.workdir.tokenizer)


def end_ids(run: Run, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that end a response; none where it has a fixed length.

    Of a reference that is trained here it is the tokenizer's EOS.

    Raises:
      InputError: there is none to stop at.
    """
    s, path = run.config.sampling, run.config.reference.path
    if not s.stop_at_eos:
        return ()
    return tokenizers.end_ids(tokenizer, hub.resolve(path) if path else None, s.end_tokens)


def sampling(run: Run, tokenizer: PreTrainedTokenizerFast) -> Sampling:
    """How responses are drawn in training."""
    s = run.config.sampling
    return Sampling(
        temperature=s.temperature,
        max_new_tokens=s.max_new_tokens,
        end_ids=end_ids(run, tokenizer),
        pad_id=lm.pad_id(tokenizer),
    )


def training(config: Config) -> Training:
    """How policies are trained, whatever the method."""
    return Training(
        config.train, config.offline, config.lora, config.memory, config.sampling.batch_size
    )


# --- Models -----------------------------------------------------------------------------------


def arithmetic(config: Config, model: DecoderConfig) -> DecoderConfig:
    """A model's configuration with the run's own ways of computing."""
    return dataclasses.replace(
        model,
        compute_dtype=config.memory.compute_dtype,
        remat=config.memory.remat,
        lora_alpha=config.lora.alpha,
    )


def language_model(run: Run, path: str | Path, dtype: str = "") -> Sampler:
    """A Hugging Face directory, or a hub name, on the mesh under the run's sampling settings.

    Args:
      run: the run.
      path: the directory or name.
      dtype: of the parameters; that of what is frozen where it is empty.
    """
    c, own = run.config, tokenizer(run)
    model = lm.load(
        path,
        tokenizer=own,
        place=partial(sharding.sharding_of, run.mesh),
        dtype=dtype or c.memory.frozen_dtype,
        compute_dtype=c.memory.compute_dtype,
        remat=c.memory.remat,
        lora_alpha=c.lora.alpha,
    )
    return Sampler(model, run.mesh, sampling(run, own))


def reference_path(run: Run) -> Path:
    """Where the reference lies: the user's directory, or what stage ``sft`` trained."""
    run.workdir.require("sft", "the reference model")
    return hub.resolve(run.config.reference.path or str(run.workdir.reference))


def reference(run: Run) -> Sampler:
    """The reference, its upper blocks apart where only these are trained."""
    found = language_model(run, reference_path(run))
    what = training(run.config).trained
    try:
        params = trainable.divide(found.model.params, what, found.model.config.layers)
    except ValueError as error:
        raise InputError(f"train.{error}") from error
    return found.with_params(params)


def policy_of(reference: Sampler, own: Any) -> Sampler:
    """The policy of what was trained, ``params["decoder"]``, over the reference."""
    return reference.with_params(trainable.join(reference.model.params, own))


def policy(run: Run, folder: Path | None = None) -> Sampler:
    """The policy that stage ``export`` wrote, or what it wrote in another ``folder``.

    Raises:
      InputError: the method is best-of-n itself, which has none.
    """
    c = run.config
    if c.method.name == methods.BEST_OF_N:
        raise InputError(
            "method.name=bon has no policy: set generate.model=bon or reference, or train a method"
        )
    run.workdir.require("export", "the policy")
    folder = folder or run.workdir.policy
    if c.export.form == "model":
        return _exported_model(run, folder)
    base = language_model(run, reference_path(run))
    own, alpha = peft.load(folder, base.model.config, base=reference_path(run))
    model = dataclasses.replace(base.model.config, lora_alpha=alpha)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, config=model))
    return policy_of(base, sharding.place(own, run.mesh))


def family(run: Run, folder: Path | None = None) -> Family:
    """The family of policies that stage ``export`` wrote.

    Args:
      run: the run.
      folder: where it is, if not in the run's ``family/``.

    Raises:
      InputError: the run trains one policy, or nothing was exported.
    """
    if not run.config.method.is_family:
        raise InputError(
            f"--n: method.n={run.config.method.n:g} is of one policy; train one for every n by two "
            "numbers, such as --config.method.n='(2, 64)'"
        )
    run.workdir.require("export", "the family of policies")
    return saved_families.load(
        folder or run.workdir.family, language_model(run, reference_path(run))
    )


def _exported_model(run: Run, folder: Path) -> Sampler:
    """The whole model in ``folder``, in its own dtype: what is measured is what was written."""
    dtype = hf.read_config(folder)[2]["dtype"]
    found = language_model(run, folder, dtype)
    if not run.config.lora.rank or dtype != "float32":
        return found
    # As ``Sampler.merged``: other arithmetic would round the merged update away.
    config = dataclasses.replace(found.model.config, compute_dtype="float32")
    return dataclasses.replace(found, model=dataclasses.replace(found.model, config=config))


def value_network(run: Run, policy: DecoderConfig) -> ValueNetwork | None:
    """What values of a network of their own start from, the reward model (Huang et al., 2024).

    Returns:
      The network; None where a head on the policy gives values, or the method has none.

    Raises:
      InputError: that model is no decoder, or reads other tokens than the policy.
    """
    c = run.config
    if c.train.value_network != "reward" or not methods.of_config(c).values:
        return None
    run.workdir.require("reward", "the reward model")
    path = hub.resolve(c.reward.path or str(run.workdir.reward))
    config, params, labels = hf.load_classifier(
        path, place=partial(sharding.sharding_of, run.mesh), dtype=c.memory.param_dtype
    )
    key = "train.value_network=reward"
    if not isinstance(config, DecoderConfig):
        raise InputError(f"{key}: {path} is an encoder; values need a causal model: set head")
    if config.vocab_size < policy.vocab_size or not tokenizers.same(
        tokenizers.load(path), tokenizer(run)
    ):
        raise InputError(
            f"{key}: {path} has another vocabulary than the policy, whose tokens it would read: "
            "set train.value_network=head"
        )
    column = label_index(labels, c.reward.label, c.reward.score, "reward")
    kernel = params["score"]["kernel"][:, column : column + 1].astype(jnp.float32)
    head = {"kernel": kernel, "bias": jnp.zeros(1)}
    return ValueNetwork(arithmetic(c, config), {"decoder": params["decoder"], "head": head})


# --- Prompts, samples and what is learned from them ---------------------------------------------


def prompts(run: Run, split: str) -> list[Prompt]:
    """The prompts that stage ``sample`` put into the workdir."""
    run.workdir.require("sample", "the prompts and reference samples")
    return prompt_files.read_jsonl(run.workdir.prompts(split))


def samples(run: Run, of: Sequence[Prompt]) -> list[PromptSamples]:
    """The stored samples of each of the training prompts; none of those that are not sampled."""
    s = run.config.samples
    asked = of[: s.prompts or None]
    found = sample_files.samples_of(run.workdir.train_samples, asked, 1 if s.adaptive else s.m)
    rest = [
        PromptSamples(p.text, (), (), p.id, p.tokens, messages=p.messages or None)
        for p in of[len(asked) :]
    ]
    return found + rest


def task(run: Run, estimator: str) -> tuple[Task, list[PromptSamples]]:
    """What training reads from the workdir, and the stored samples it comes from."""
    sampler = reference(run)
    found = prompts(run, "train")
    stored = samples(run, found)
    c = run.config
    score, prior = reward(run, sampler.tokenizer), None
    if c.samples.amortised:
        prior = amortised.of_training(run, Models(sampler, score, None), found, stored)
    table = references(stored, c.samples.m, estimator, c.method.ties, sampler, prior)
    return Task(found, table, score, sampler), stored


def unsampled(run: Run, of: Sequence[Prompt], reference: Sampler, score: base.Reward) -> References:
    """What log F of prompts without samples is read off: the head of ``samples.amortised``."""

    def read() -> tuple[list[Prompt], list[PromptSamples]]:
        found = prompts(run, "train")
        return found, samples(run, found)

    run.workdir.require("sample", "the prompts and reference samples")
    prior = amortised.of_new(run, Models(reference, score, None), of, read)
    none = [PromptSamples(p.text, (), (), p.id, p.tokens) for p in of]
    return references(none, 1, run.config.method.estimator, "random", reference, prior)


def job(run: Run, reference: DecoderConfig, prompts: int) -> Job:
    """The method of ``method.name``, to be trained on so many prompts."""
    c = run.config
    method = methods.of_config(c)
    value = value_network(run, reference)
    return Job(method, method.from_config(c), training(c), reference, prompts, value)


def member(config: Config) -> Member:
    """The one policy of a run."""
    of = config.method
    return Member(of.top, of.beta, config.seed, config.samples.m, of.low)


def wandb_arguments(run: Run) -> dict[str, Any] | None:
    """Arguments of ``wandb.init`` for the run; None where Weights & Biases is not asked for.

    The id follows from the workdir, so a run that goes on is one run there too.
    """
    if not run.config.log.wandb:
        return None
    root = run.workdir.root
    return {
        "project": run.config.log.wandb_project,
        "name": root.name,
        "id": run.workdir.digest({"workdir": str(root)}),
        "resume": "allow",
        "dir": str(root),
        "config": as_dict(run.config),
    }


# --- Rewards ------------------------------------------------------------------------------------


def reward(run: Run, tokenizer: PreTrainedTokenizerFast) -> WeightedReward:
    """The reward: a callable, the user's classifier, or what stage ``reward`` trained.

    With it the others that are added to it, and the penalty on a missing EOS.
    """
    r, ends = run.config.reward, end_ids(run, tokenizer)
    parts = [Part("main", r.weight, _score(run, tokenizer, "reward", r, run.workdir.reward))]
    for name, other in r.others.items():
        score = _score(run, tokenizer, f"reward.others.{name}", other, None)
        parts.append(Part(name, other.weight, score))
    return WeightedReward(parts, r.missing_eos, r.missing_eos_value, ends)


def evaluator(run: Run, tokenizer: PreTrainedTokenizerFast) -> RewardModel | None:
    """The reward that only measures, from where stage ``evaluator`` has it; None without one."""
    e = run.config.evaluator
    if not (e.train or e.path or e.function):
        return None
    return _score(run, tokenizer, "evaluator", e, run.workdir.evaluator)


def models(run: Run) -> Models:
    """What every measurement needs."""
    sampler = reference(run)
    own = sampler.tokenizer
    return Models(sampler, reward(run, own), evaluator(run, own))


def _score(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    key: str,
    r: Reward | RewardPart | Evaluator,
    made: Path | None,
) -> RewardModel:
    """One reward; ``made``: where stage ``key`` puts the one it trains.

    A model trained here reads the policy's own ids. A user's re-tokenizes the text with its own
    tokenizer.
    """
    ends = end_ids(run, tokenizer)
    decode = partial(tokenizers.continuations, tokenizer)
    if r.function:
        return FunctionReward(r.function, decode, ends, key)
    if made is not None and not r.path:
        run.workdir.require(key, f"the {key} model")
        return ClassifierReward(_classifier(run, made, r), ends, key)
    path = hub.resolve(r.path)
    model = _classifier(run, path, r)  # before its tokenizer, which an adapter may lack
    date = run.workdir.date() if r.template == CHAT else None
    rendering = chat.Rendering(template_arguments(r.template_arguments, key), date)
    text = TextFormat(tokenizers.load(path), r.template, r.max_tokens, rendering)
    return TextReward(model, text, decode, ends, run.mesh, key=key)


def _classifier(run: Run, path: Path, r: Reward | RewardPart | Evaluator) -> Classifier:
    """A sequence classifier on the mesh, and the score that is taken of it."""
    c = run.config.memory
    config, params, labels = hf.load_classifier(
        path, place=partial(sharding.sharding_of, run.mesh), dtype=c.frozen_dtype
    )
    config = dataclasses.replace(config, compute_dtype=c.compute_dtype)
    return Classifier(params, config, labels, r.label, r.score)


def check_lengths(run: Run, found: Sequence[Prompt], model: Sampler, score: WeightedReward) -> None:
    """Raises InputError where a prompt and its response do not fit the policy or the reward."""
    model.check_lengths(found)
    if score.positions is not None and score.positions < model.model.config.positions:
        try:
            prompt_files.fits_context(found, run.config.sampling.max_new_tokens, score.positions)
        except InputError as error:
            raise InputError(f"reward model: {error}") from error
