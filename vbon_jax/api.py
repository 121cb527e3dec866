"""The Python API: plain functions over plain objects, without workdir or config file.

They call what the stages call, and the same seed gives the same numbers.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vbon_jax import keys, methods, sharding
from vbon_jax.bon.amortised import Prior
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tokenizer as text_tokens
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.data.sources import chat as chats
from vbon_jax.errors import InputError
from vbon_jax.evaluation import calibration, heldout
from vbon_jax.evaluation.heldout import Models, Protocol
from vbon_jax.methods import learning, starting
from vbon_jax.methods.learning import Job, Training
from vbon_jax.models import hf, lm, trainable
from vbon_jax.models.hf import hub, tokenizers
from vbon_jax.progress import log
from vbon_jax.rewards.base import Decode, Reward, checked
from vbon_jax.rewards.classifier import Classifier
from vbon_jax.rewards.function import FunctionReward
from vbon_jax.rewards.text import TextFormat, TextReward
from vbon_jax.sampling import samples as sampling
from vbon_jax.sampling.family import Family
from vbon_jax.sampling.responses import Sampling
from vbon_jax.sampling.sampler import Sampler, named_key
from vbon_jax.training import amortised, loop, options, policies
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Task
from vbon_jax.training.options import Lora, Memory, Offline, Train
from vbon_jax.training.references import references
from vbon_jax.training.state import TrainState

# (prompts, responses) -> rewards, a float each
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


# --- Models and rewards -------------------------------------------------------------------------


def load_model(
    path: str | os.PathLike[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    stop_at_eos: bool = True,
    end_tokens: Sequence[str] = (),
    mesh: Mesh | None = None,
    dtype: str = "float32",
    **arithmetic: Any,
) -> Sampler:
    """Loads a language model with its tokenizer, ready to respond.

    Args:
      path: a Hugging Face directory, or a name on the hub, "owner/name" or "owner/name@revision".
      temperature: divides the logits, > 0: of the model's responses and of every log-prob.
      max_new_tokens: longest response in tokens, EOS included.
      stop_at_eos: False for responses of exactly ``max_new_tokens`` tokens.
      end_tokens: tokens that end a response, such as "<|im_end|>"; none for the model's own, the
        ``eos_token_id`` of its generation_config.json and its tokenizer's EOS.
      mesh: of ``make_mesh``; None for the first device alone.
      dtype: of the parameters, "float32" or "bfloat16".
      **arithmetic: ``compute_dtype`` ("float32", "bfloat16") and ``remat`` ("none", "dots", "full")
        of the forward pass.

    Returns:
      The model: ``generate(texts)`` responds, ``save(path)`` writes a Hugging Face directory.

    Raises:
      CheckpointError: the directory or the hub gives no model that is supported.
      InputError: it has no tokenizer, or no EOS to stop at.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    model = lm.load(path, place=partial(sharding.sharding_of, mesh), dtype=dtype, **arithmetic)
    own = model.tokenizer
    ends = tokenizers.end_ids(own, hub.resolve(os.fspath(path)), end_tokens) if stop_at_eos else ()
    settings = Sampling(temperature, max_new_tokens, ends, lm.pad_id(own))
    return Sampler(model, mesh, settings)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """A sequence classifier that scores texts; call it with prompts and responses.

    Attributes:
      classifier: the model and the score that is taken of it.
      text_format: its tokenizer and template.
      mesh: of its parameters.
    """

    classifier: Classifier
    text_format: TextFormat
    mesh: Mesh

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Float32 rewards [B] of responses to prompts."""
        return score(self, prompts, responses)

    def reward(self, model: Sampler) -> TextReward:
        """The reward of token ids of a model."""
        decode, ends = _decode(model), model.settings.end_ids
        return TextReward(self.classifier, self.text_format, decode, ends, self.mesh)


def load_reward(
    path: str | os.PathLike[str],
    *,
    label: str = "POSITIVE",
    score: str | None = None,
    template: str = "{prompt}{response}",
    max_tokens: int = 0,
    template_arguments: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> RewardModel:
    """Loads a sequence classifier as a reward.

    Args:
      path: a Hugging Face directory, or a name on the hub.
      label: the label whose score is the reward.
      score: "prob", "log_odds" or "logit" of the label, or "scalar" for a reward model with one
        output; None takes "scalar" where there is one output, else "log_odds" ("logit" of a
        regression). A multi-label classifier has a sigmoid for each label.
      template: the text it reads, of {prompt} and {response}; "chat" for its chat template.
      max_tokens: longer texts are truncated on the left; 0 for the model's context length.
      template_arguments: of its chat template.
      mesh: of ``make_mesh``; None for the first device alone.

    Raises:
      CheckpointError: the directory or the hub gives no classifier that is supported.
      InputError: the label, score or template does not fit it.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    directory = hub.resolve(os.fspath(path))
    config, params, labels = hf.load_classifier(
        directory, place=partial(sharding.sharding_of, mesh)
    )
    kind = score or _default_score(labels)
    found = Classifier(params, config, labels, label, kind)
    found.label_index("load_reward")  # refuses what does not fit
    rendering = chats.Rendering(template_arguments or {})
    text = TextFormat(tokenizers.load(directory), template, max_tokens, rendering)
    return RewardModel(found, text, mesh)


def _default_score(labels: hf.Labels) -> str:
    if len(labels.names) == 1:
        return "scalar"
    return "logit" if labels.problem == "regression" else "log_odds"


def score(
    reward: RewardFunction | RewardModel, prompts: Sequence[str], responses: Sequence[str]
) -> np.ndarray:
    """Float32 rewards [B] of responses to prompts, each a text.

    Raises:
      InputError: a reward is not a finite number.
    """
    if isinstance(reward, RewardModel):
        found = TextReward(
            reward.classifier, reward.text_format, lambda prompts, rows: [], (), reward.mesh
        )
        rows = found.tokenized([Prompt(i, p, ()) for i, p in enumerate(prompts)], responses)
        return checked(found.score_ids(rows), "the reward gave", prompts, responses.__getitem__)
    from vbon_jax.rewards import function

    name = getattr(reward, "__qualname__", type(reward).__name__)
    return function.call(name, reward, list(prompts), list(responses))


def _decode(model: Sampler) -> Decode:
    return partial(text_tokens.continuations, model.tokenizer)


def _reward(reward: Any, model: Sampler) -> Reward:
    """A reward of a model's token ids: those that read texts are given the model's decoding."""
    if isinstance(reward, RewardModel):
        return reward.reward(model)
    if hasattr(reward, "take_counts") or hasattr(reward, "positions"):
        return reward  # it reads ids already
    return FunctionReward(reward, _decode(model), model.settings.end_ids)


# --- Prompts and samples ------------------------------------------------------------------------


def prompts(
    texts: Sequence[Any] | str | os.PathLike[str],
    model: Sampler,
    *,
    chat: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Tokenizes prompts.

    Args:
      texts: prompts, each a text or a conversation, a list of {"role", "content"} that ends with
        the user; or the path of a .jsonl, .csv, .tsv or .parquet file with a column "prompt" (or,
        of a chat, "messages").
      model: whose tokenizer counts.
      chat: texts, also those of a file, are messages of the user, rendered by the tokenizer's chat
        template.
      template_arguments: of the chat template, such as {"enable_thinking": False}.

    Raises:
      InputError: a prompt has no token, or does not fit the model's context with a response.
    """
    tokenizer, rendering = model.tokenizer, chats.Rendering(template_arguments or {})
    if isinstance(texts, str | os.PathLike):
        if chat:
            conversations = chats.read(texts)
            found = chats.prompts(conversations, tokenizer, rendering, chats.NO_LIMIT)
        else:
            found = prompt_files.read_texts(texts, tokenizer)
    else:
        if chat:
            texts = [[{"role": "user", "content": t}] if isinstance(t, str) else t for t in texts]
        found = chats.given(texts, tokenizer, rendering)
    model.check_lengths(found)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Scored responses of a reference model.

    Attributes:
      prompts: P prompts.
      samples: one ``PromptSamples`` a prompt: responses, rewards, token ids and log-probs.
      prior: what a head says of each prompt beside its samples, of ``amortise``; None for none.
    """

    prompts: Sequence[Prompt]
    samples: Sequence[PromptSamples]
    prior: Prior | None = None

    @property
    def rewards(self) -> np.ndarray:
        """Float32 rewards [P, M] in the order drawn."""
        return sample_files.rewards(self.samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a line a prompt, as ``vbon sample`` does."""
        Path(path).unlink(missing_ok=True)
        with sample_files.SampleWriter(path) as writer:
            for samples in self.samples:
                writer.append(samples)


def sample(
    model: Sampler,
    prompts: Sequence[Prompt],
    *,
    m: int,
    reward: RewardFunction | RewardModel,
    seed: int = 0,
    batch_size: int = 64,
) -> Samples:
    """Draws and scores m responses to each prompt.

    Args:
      model: the reference.
      prompts: of ``prompts``.
      m: responses a prompt; log F is estimated from them.
      reward: (prompts, responses) -> floats, or of ``load_reward``.
      seed: of the draws.
      batch_size: responses drawn at once.

    Raises:
      InputError: a reward is not a finite number.
    """
    with jax.set_mesh(model.mesh):
        found = sampling.draw(
            model, named_key(seed, "sample"), prompts, m, batch_size, _reward(reward, model)
        )
    return Samples(prompts, found)


def amortise(
    samples: Samples,
    model: Sampler,
    *,
    reward: RewardFunction | RewardModel,
    seed: int = 0,
) -> Samples:
    """Fits a head on the samples of all prompts, which says what rewards each is likely to get.

    What is trained on the result ranks a response by the head and the prompt's own samples, of
    which few are then enough: F = (c F_0 + k) / (c + m), see ``bon.amortised``.

    Args:
      samples: of at least 5 different prompts, 2 or more each.
      model: the reference model that drew them.
      reward: of the samples.
      seed: of which prompts are held out together.

    Returns:
      The same samples with their ``prior``.

    Raises:
      InputError: there are too few prompts, or the head does not know the rewards of those that it
        has not seen.
    """
    scorer = _reward(reward, model)
    own = None if isinstance(scorer, FunctionReward) else scorer  # it may not score "" at all
    rewards = list(samples.rewards.astype(np.float32))
    with jax.set_mesh(model.mesh):
        known = amortised.features(model, samples.prompts, 64, own)
        fold_P = amortised.folds(samples.prompts, rewards, seed)
        heads = amortised.fit(known, rewards, fold_P, seed)
    prior = heads.prior(known, fold_P)
    figures = calibration.of_prior(prior, rewards, seed)
    log(figures.line(heads.concentration))
    figures.refuse()
    return dataclasses.replace(samples, prior=prior)


# --- Training -----------------------------------------------------------------------------------


def train(
    reference: Sampler,
    samples: Samples,
    *,
    method: Any,
    reward: RewardFunction | RewardModel | None = None,
    seed: int = 0,
    lora: Lora | None = None,
    memory: Memory | None = None,
    offline: Offline | None = None,
    **settings: Any,
) -> Sampler:
    """Fine-tunes a copy of the reference.

    Args:
      reference: the model to start from; it stays as it is.
      samples: its scored responses.
      method: the options of a method: ``VBoN(n=8)``, ``PPO(beta=0.1)``, ``DPO()``, ...
      reward: of responses; not needed by the methods that learn from stored samples.
      seed: of the training.
      lora: low-rank adapters in place of the whole model; they are merged into the policy.
      memory: dtypes, microbatches and rematerialisation.
      offline: the keys under which a method that learns from rollouts starts from the samples, with
        ``start="weighted"`` or ``"replay"``.
      **settings: keys of the config group ``train`` (iterations, batch_size, minibatch_size,
        learning_rate, ...), or of ``offline`` (epochs, pairs, batch_size, learning_rate, ...) for
        the methods that learn from stored samples. ``start``, of the others, may be an
        ``Offline(epochs=4, learning_rate=1e-3, ...)``: "weighted", under these.

    Returns:
      The policy. (After Ctrl-C, the policy so far.)

    Raises:
      InputError: a setting is out of range, or the loss or a reward stops being finite; or n is of
        a family, see ``train_family``.
    """
    training = _training(methods.of_options(method), lora, memory, offline, settings)
    if method.is_family:
        raise InputError(f"{method}: n is of a family of policies: use train_family")
    own = _trained(reference, samples, method, training, reward, seed)
    config = dataclasses.replace(reference.model.config, lora_alpha=training.lora.alpha)
    base = _prepared(reference, training).model.params
    model = dataclasses.replace(reference.model, config=config, params=trainable.join(base, own))
    with jax.set_mesh(reference.mesh):
        return dataclasses.replace(reference, model=model).merged()


def train_family(
    reference: Sampler,
    samples: Samples,
    *,
    method: Any,
    reward: RewardFunction | RewardModel,
    lora: Lora,
    seed: int = 0,
    memory: Memory | None = None,
    **settings: Any,
) -> Family:
    """Trains one policy for every n, by adapters that a gate opens as far as n asks for.

    Args:
      reference: the model to start from; it stays as it is, and is the policy for n = 1.
      samples: its scored responses.
      method: ``VBoN(n=(2, 64))``: n is drawn between the two for each group of responses.
      reward: of responses.
      lora: the adapters, of a rank above 0.
      seed: of the training.
      memory: dtypes, microbatches and rematerialisation.
      **settings: keys of the config group ``train``, as of ``train``.

    Returns:
      The family, whose ``at(n)`` is the policy for an n, as ``train`` would return it.

    Raises:
      InputError: a setting is out of range or of no family, or the loss or a reward stops being
        finite.
    """
    record = methods.of_options(method)
    training = _training(record, lora, memory, None, settings)
    if not method.is_family:
        raise InputError(f"{method}: n is of one policy: use train, or give two, n=(2, 64)")
    options.check_family(method.n, record.name, training.train, training.lora, training.memory)
    own = _trained(reference, samples, method, training, reward, seed)
    return Family(reference, own, method.n, training.lora.alpha)


def _trained(
    reference: Sampler,
    samples: Samples,
    method: Any,
    training: Training,
    reward: RewardFunction | RewardModel | None,
    seed: int,
) -> Any:
    """What is trained of the reference, as ``trainable.join`` takes it."""
    record = methods.of_options(method)
    m = samples.rewards.shape[1]
    member = Member(method.top, getattr(method, "beta", 1.0), seed, m, method.low)
    for wrong in (record.check(method), record.check_n(method.top)):
        if wrong:
            raise InputError(f"{method}: {wrong}")
    of_ranks = record.online and method.ties == "random" and method.estimator != "exponential"
    if samples.prior is not None and not of_ranks:
        raise InputError(
            f"{method} does not go with amortised samples: they are for a method that learns from "
            "rollouts, ties='random' and an estimator of ranks"
        )
    if record.online and reward is None:
        raise InputError(f"reward is not given: {type(method).__name__} learns from rollouts")
    sampler = _prepared(reference, training)
    with jax.set_mesh(reference.mesh):
        scorer: Any = None if reward is None else _reward(reward, sampler)  # None: it is not asked
        table = references(
            samples.samples, m, method.estimator, method.ties, sampler, samples.prior
        )
        task = Task(samples.prompts, table, scorer, sampler)
        job = Job(record, method, training, sampler.model.config, len(samples.prompts))

        def fit(of: Job, members: Sequence[Member], own: Any) -> TrainState:
            state, step = learning.single(of, task, members[0], samples.samples)
            if own is not None:
                state = starting.begun(state, own)
            state = starting.valued(state, of, task, members, samples.samples)
            is_last = of is job
            title = "train" if is_last else "start"
            return loop.run(state, 0, step, loop.Schedule(title, of.iterations, whole=not is_last))

        return policies.policy(starting.trained(job, [member], fit).params)


def _training(
    record: methods.Method,
    lora: Lora | None,
    memory: Memory | None,
    first: Offline | None,
    settings: dict[str, Any],
) -> Training:
    cls: type = Train if record.online else Offline
    given = "offline"
    if record.online and isinstance(settings.get("start"), Offline):
        first, given = settings["start"], "start"
        settings = settings | {"start": options.WEIGHTED}
    if first is not None and not record.online:
        raise InputError(
            f"offline={first}: {record.name} itself learns from stored samples; give its keys as "
            "settings: epochs=4, learning_rate=1e-3, ..."
        )
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - names)
    if unknown:
        raise InputError(
            f"{unknown[0]}={settings[unknown[0]]!r}: {record.name} has no such setting; it has "
            + ", ".join(sorted(names))
        )
    if settings.get("value_network", "head") == "reward":
        raise InputError("value_network='reward' needs a run: vbon run --config=...; set 'head'")
    own = cls(**settings)
    keys.check(own)
    for name, group in (("lora", lora), ("memory", memory)):
        if group is not None:
            keys.check(group, name)
    groups = {"train": own} if record.online else {"offline": own}
    if first is not None:
        keys.check(first, given)
        groups["offline"] = first
    training = Training(**groups, lora=lora or Lora(), memory=memory or Memory())
    options.check(training.train, training.lora, training.memory)
    return training


def _prepared(reference: Sampler, training: Training) -> Sampler:
    """The reference as training reads it: its upper blocks apart where only these are trained."""
    model = reference.model
    try:
        params = trainable.divide(model.params, training.trained, model.config.layers)
    except ValueError as error:
        raise InputError(str(error)) from error
    config = dataclasses.replace(
        model.config, remat=training.memory.remat, lora_alpha=training.lora.alpha
    )
    return dataclasses.replace(
        reference, model=dataclasses.replace(model, config=config, params=params)
    )


# --- Evaluation ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Reference, best-of-n and policy on prompts; prints as a table.

    Attributes:
      rows: a dict of figures each, as in ``evaluation.json``.
    """

    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        """The table of reward, win rate and KLs."""
        from rich.console import Console

        from vbon_jax.report import tables

        text = io.StringIO()
        # In a notebook, rich would display the table itself and leave the text empty.
        console = Console(file=text, width=100, force_jupyter=False)
        console.print(tables.results_table(self.rows))
        return text.getvalue().rstrip()

    def __getitem__(self, policy: str) -> dict[str, Any]:
        """The row of "reference", "bon" or "policy"."""
        return next(row for row in self.rows if row["policy"] == policy)


def evaluate(
    policy: Sampler,
    reference: Sampler,
    prompts: Sequence[Prompt],
    *,
    reward: RewardFunction | RewardModel,
    n: float = 8.0,
    m: int = 64,
    seed: int = 0,
    **protocol: Any,
) -> Evaluation:
    """Measures a policy against the reference and against true best-of-n.

    Fresh responses of the reference, m a prompt, are the opponents; others are the pool that
    best-of-n is read off. The policy is held against both.

    Args:
      policy: the model to measure, at the reference's temperature.
      reference: it was trained from.
      prompts: at least two, better hundreds and none of the training prompts.
      reward: of the comparison.
      n: of best-of-n.
      m: reference responses a prompt, opponents and pool each.
      seed: of the draws.
      **protocol: of ``evaluation.heldout.Protocol``: ``each`` (responses a prompt of the policy),
        ``batch_size``, ``estimator`` and ``ties``.

    Raises:
      InputError: fewer than two prompts, or a reward is not a number.
    """
    if len(prompts) < 2:
        raise InputError(f"{len(prompts)} prompt: intervals are over prompts and need at least 2")
    how = Protocol(n=float(n), m=m, seed=seed, **protocol)
    if how.each > m:
        raise InputError(f"each={how.each} is more than m={m} reference responses a prompt")
    models = Models(reference, _reward(reward, reference))
    temperature = reference.settings.temperature

    def draw(role: str, sampler: Sampler, key: jax.Array) -> list[PromptSamples]:
        return sampling.draw(sampler, key, prompts, m, how.batch_size, models.reward, role)

    with jax.set_mesh(reference.mesh):
        held = heldout.open_split(models, prompts, "test", temperature, how, draw)
        rows = [held.reference()]
        if float(n).is_integer() and n <= m:
            rows.append(held.bon(int(n)))
        rows.append(held.policy("policy", float(n), policy, "policy", seed)[0])
    return Evaluation(rows)
