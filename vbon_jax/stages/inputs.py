"""What the stages read: texts, tokenizer, prompts, models and the reward."""

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.bon import log_f
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.config import Evaluator, Reward, RewardPart, Settings, template_arguments
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter, sorted_rewards
from vbon_jax.data.samples import rewards as sample_rewards
from vbon_jax.data.sources import chat, text, tldr
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError
from vbon_jax.models import hf, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.hf import hub, peft
from vbon_jax.models.trainable import Trainable
from vbon_jax.progress import log
from vbon_jax.rewards.classifier import ClassifierReward
from vbon_jax.rewards.combined import Part, WeightedReward
from vbon_jax.rewards.function import FunctionReward
from vbon_jax.rewards.text import TextReward
from vbon_jax.sampling.sampler import Sampling
from vbon_jax.stages.workdir import Workdir

HELD_OUT = 10  # without a test file, every tenth text is held out


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a stage is given."""

    settings: Settings
    workdir: Workdir
    mesh: Mesh

    def key(self, stage: str, seed: int | None = None) -> jax.Array:
        """The random key of a stage: a function of the seed (the run's own unless another is
        given) and the stage's name."""
        return jax.random.fold_in(
            jax.random.key(self.settings.seed if seed is None else seed),
            zlib.crc32(stage.encode()) & 0x7FFFFFFF,
        )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model on the mesh: params {"decoder": ...}."""

    config: DecoderConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class ValueNetwork:
    """What a value network of its own starts from: params {"decoder", "head"}."""

    config: DecoderConfig
    params: Any


def trained(s: Settings) -> Trainable:
    """What of the model is trained."""
    return Trainable(s.train.num_layers_unfrozen, s.lora.rank, s.lora.targets)


class Texts(NamedTuple):
    """Labelled texts: of training, held out, out of distribution (empty where there are none)."""

    train: list[Example]
    test: list[Example]
    ood: list[Example]


def texts(run: Run, seed: int | None = None) -> Texts:
    """The user's labelled texts, or the embedded corpus of the run's seed or another."""
    data, seed = run.settings.data, run.settings.seed if seed is None else seed
    if data.path and data.test_path:
        return Texts(text.read_jsonl(data.path), text.read_jsonl(data.test_path), [])
    if data.path:
        examples = text.read_jsonl(data.path)
        held_out = examples[::HELD_OUT]
        return Texts([e for i, e in enumerate(examples) if i % HELD_OUT], held_out, [])
    if data.tfds:
        from vbon_jax.data.sources import (
            tfds as tfds_text,  # imports tensorflow_datasets, which takes seconds
        )

        train, test = (tfds_text.load(data.tfds, data.tfds_dir, x) for x in ("train", "test"))
        return Texts(train, test, [])
    if data.corpus == "tabular":
        return Texts(tabular.corpus(seed, data.train), tabular.corpus(seed + 1, data.test), [])
    from vbon_jax.data.sources import reviews  # imports tensorflow_datasets, which takes seconds

    return Texts(*reviews.load(run.workdir.data, seed, data.train, data.test, data.ood))


def make_tokenizer(run: Run, train: Sequence[Example]) -> PreTrainedTokenizerFast:
    """The run's tokenizer: the one named, the reference model's own, or one learned here."""
    s = run.settings
    if s.tokenizer.path or s.reference.path:
        return tokenizers.load(hub.resolve(s.tokenizer.path or s.reference.path))
    return tokenizers.build([e.text for e in train], s.tokenizer.kind, s.tokenizer.vocab_size)


def load_tokenizer(run: Run) -> PreTrainedTokenizerFast:
    """The tokenizer stage ``sft`` put into the workdir."""
    run.workdir.require("sft", "the tokenizer")
    return tokenizers.load(run.workdir.tokenizer)


def eos_id(run: Run, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that ends a response; None where responses have a fixed length.

    Raises InputError where one is needed and the tokenizer has none.
    """
    return tokenizers.eos_id(tokenizer) if run.settings.sampling.stop_at_eos else None


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills empty slots: never looked at, since masks say what is real."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode_texts(
    run: Run, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], max_tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of each text, EOS at the end unless the text was cut at ``max_tokens``.

    The one rule for what a text is to the reference; a classifier reads the same without the EOS.
    """
    end = eos_id(run, tokenizer)
    tail = () if end is None else (end,)
    return [(*tokenizers.encode(tokenizer, e.text), *tail)[:max_tokens] for e in examples]


def sampling(
    run: Run, tokenizer: PreTrainedTokenizerFast, temperature: float | None = None
) -> Sampling:
    """How responses are drawn; ``temperature`` defaults to the one of training."""
    s = run.settings.sampling
    return Sampling(
        temperature=s.temperature if temperature is None else temperature,
        max_new_tokens=s.max_new_tokens,
        eos_id=eos_id(run, tokenizer),
        pad_id=pad_id(tokenizer),
    )


def make_prompts(
    run: Run, tokenizer: PreTrainedTokenizerFast, adopted: list[Prompt] | None
) -> dict[str, list[Prompt]]:
    """{"train", "test"} and, where asked for, "ood": the prompts of the run, ids of their own in
    each; ``adopted`` ones, which samples made elsewhere bring along, stand in for the first."""
    p = run.settings.prompts
    if p.format == "tldr":
        prompts = _tldr_prompts(run, tokenizer)
    elif p.format == "chat":
        prompts = _chat_prompts(run, tokenizer)
    else:
        prompts = _text_prompts(run, tokenizer, adopted)
    if adopted:
        prompts["train"] = adopted
    if len(prompts["test"]) < 2:
        raise InputError(
            f"prompts.test_path={p.test_path!r} has {len(prompts['test'])} prompt: intervals are "
            "over prompts and need at least 2"
        )
    return prompts


def _text_prompts(
    run: Run, tokenizer: PreTrainedTokenizerFast, adopted: list[Prompt] | None
) -> dict[str, list[Prompt]]:
    """Prompts of files, or prefixes of the run's texts, which are read only where they are asked
    for."""
    s, p = run.settings, run.settings.prompts
    own = bool(p.path or adopted) and bool(p.test_path) and (bool(p.ood_path) or not p.ood)
    found = Texts([], [], []) if own else texts(run)
    tabular_world = s.data.corpus == "tabular" and not (s.data.path or s.data.tfds)

    def of(
        path: str, examples: Sequence[Example], count: int, seed: int, naming: Sequence[str] = ()
    ) -> list[Prompt]:
        if path:
            return prompt_files.read_texts(path, tokenizer)
        if tabular_world:  # its few prompts are all there are: held out means drawn anew
            letters = tabular.ALPHABET[: p.train]
            return prompt_files.from_texts(
                [letters[i % len(letters)] for i in range(count)], tokenizer
            )
        return prompt_files.prefix_prompts(
            [e.text for e in examples], tokenizer, count, p.min_tokens, p.max_tokens, seed, naming
        )

    prompts = {
        "train": adopted or of(p.path, found.train, p.train, s.seed),
        "test": of(p.test_path, found.test, p.test, s.seed + 1),
    }
    if p.ood_path or p.ood:
        if not p.ood_path and not found.ood:
            raise InputError(
                f"prompts.ood={p.ood}, but there are no out-of-distribution texts: give "
                "prompts.ood_path, or of the embedded reviews data.ood of them"
            )
        from vbon_jax.data.sources import reviews

        prompts["ood"] = of(p.ood_path, found.ood, p.ood, s.seed + 2, reviews.HELD_OUT_GENRES)
    return prompts


def _tldr_prompts(run: Run, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Prompt]]:
    """Posts of ``prompts.subreddits`` from the files; out of distribution are those of all others,
    of the test file unless there is a file for them."""
    p, seed = run.settings.prompts, run.settings.seed
    test, others = tldr.split(tldr.read(p.test_path), p.subreddits)
    posts = {"train": (tldr.split(tldr.read(p.path), p.subreddits)[0], p.train)}
    posts["test"] = (test, p.test)
    if p.ood or p.ood_path:
        posts["ood"] = (tldr.read(p.ood_path) if p.ood_path else others, p.ood)
    prompts = {}
    for i, (split, (found, count)) in enumerate(posts.items()):
        prompts[split], cut = tldr.prompts(found, tokenizer, p.longest, count, seed + i, p.gap)
        log(
            f"sample: {len(prompts[split])} of {len(found)} posts are the {split} prompts, {cut} "
            f"cut to {p.longest} tokens"
        )
    return prompts


def _chat_prompts(run: Run, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Prompt]]:
    """Conversations of the files, by the tokenizer's own chat template."""
    p = run.settings.prompts
    paths = {"train": p.path, "test": p.test_path}
    if p.ood_path:
        paths["ood"] = p.ood_path
    arguments = template_arguments(p.template_arguments)
    return {
        split: chat.prompts(chat.read(path), tokenizer, arguments, p.longest)
        for split, path in paths.items()
    }


def check_lengths(
    run: Run,
    prompts: Sequence[Prompt],
    reference: Decoder,
    score: WeightedReward,
) -> None:
    """Raises InputError where a prompt and its response do not fit the policy or the reward."""
    longest = run.settings.sampling.max_new_tokens
    prompt_files.fits_context(prompts, longest, reference.config.positions)
    if score.positions is not None and score.positions < reference.config.positions:
        try:
            prompt_files.fits_context(prompts, longest, score.positions)
        except InputError as error:
            raise InputError(f"reward model: {error}") from error


def prompts_of(
    found: Sequence[PromptSamples], tokenizer: PreTrainedTokenizerFast, m: int
) -> list[Prompt]:
    """The prompts of samples made elsewhere, under new ids; their own token ids where given."""
    sorted_rewards(found, m)  # refuses fewer than m samples a prompt
    encoded = prompt_files.from_texts([f.prompt for f in found], tokenizer)
    vocabulary = len(tokenizer)
    prompts = []
    for prompt, samples in zip(encoded, found, strict=True):
        tokens = samples.prompt_tokens or prompt.tokens
        # Ids of another tokenizer decode to another text: then the text counts.
        ours = max(tokens) < vocabulary and tokenizer.decode(list(tokens)) == samples.prompt
        prompts.append(dataclasses.replace(prompt, tokens=tuple(tokens) if ours else prompt.tokens))
    return prompts


def copy_samples(target: Path, prompts: Sequence[Prompt], found: Sequence[PromptSamples]) -> None:
    """Writes samples made elsewhere under the ids of ``prompts``."""
    target.unlink(missing_ok=True)
    with SampleWriter(target) as writer:
        for prompt, samples in zip(prompts, found, strict=True):
            writer.append(
                PromptSamples(
                    samples.prompt, samples.responses, samples.rewards, prompt.id, prompt.tokens
                )
            )


def load_prompts(run: Run, split: str) -> list[Prompt]:
    """The prompts stage ``sample`` put into the workdir."""
    run.workdir.require("sample", "the prompts and reference samples")
    return prompt_files.read_jsonl(run.workdir.prompts(split))


def arithmetic(s: Settings, config: DecoderConfig) -> DecoderConfig:
    """A model's configuration with the run's own ways of computing."""
    return dataclasses.replace(
        config,
        compute_dtype=s.memory.compute_dtype,
        remat=s.memory.remat,
        lora_alpha=s.lora.alpha,
    )


def load_decoder(run: Run, path: str | Path, dtype: str = "") -> Decoder:
    """A Hugging Face directory, or a hub name, as a decoder on the mesh; ``dtype``: of its
    parameters, where it is not that of what is frozen."""
    config, params = hf.load_decoder(
        hub.resolve(str(path)),
        place=partial(sharding.sharding_of, run.mesh),
        dtype=dtype or run.settings.memory.frozen_dtype,
    )
    return Decoder(arithmetic(run.settings, config), {"decoder": params})


def policy_of(reference: Decoder, own: Any) -> Decoder:
    """The policy of what was trained, ``params["decoder"]``, over the reference."""
    params = trainable.join(reference.params["decoder"], own)
    return Decoder(reference.config, {"decoder": params})


def reference_path(run: Run) -> Path:
    """Where the reference lies: the user's directory, or what stage ``sft`` trained."""
    run.workdir.require("sft", "the reference model")
    return hub.resolve(run.settings.reference.path or str(run.workdir.reference))


def load_reference(run: Run) -> Decoder:
    """The reference, its upper blocks apart where only these are trained."""
    reference = load_decoder(run, reference_path(run))
    try:
        params = trainable.divide(
            reference.params["decoder"], trained(run.settings), reference.config.layers
        )
    except ValueError as error:
        raise InputError(f"train.{error}") from error
    return Decoder(reference.config, {"decoder": params})


def load_value(run: Run, policy: DecoderConfig) -> ValueNetwork | None:
    """What values of a network of their own start from, the reward model (Huang et al. 2024); None
    where a head on the policy gives them.

    Raises InputError where that model is no decoder, or reads other tokens than the policy.
    """
    s = run.settings
    if s.train.value_network == "head":
        return None
    run.workdir.require("reward", "the reward model")
    path = hub.resolve(s.reward.path or str(run.workdir.reward))
    config, params, labels = hf.load_classifier(
        path, place=partial(sharding.sharding_of, run.mesh), dtype=s.memory.param_dtype
    )
    key = "train.value_network=reward"
    if not isinstance(config, DecoderConfig):
        raise InputError(f"{key}: {path} is an encoder; values need a causal model: set head")
    if config.vocab_size < policy.vocab_size or not tokenizers.same(
        tokenizers.load(path), load_tokenizer(run)
    ):
        raise InputError(
            f"{key}: {path} has another vocabulary than the policy, whose tokens it would read: "
            "set train.value_network=head"
        )
    column = 0 if s.reward.score == "scalar" else labels.index(s.reward.label)
    kernel = params["score"]["kernel"][:, column : column + 1].astype(jnp.float32)
    head = {"kernel": kernel, "bias": jnp.zeros(1)}
    return ValueNetwork(arithmetic(s, config), {"decoder": params["decoder"], "head": head})


def load_policy(run: Run) -> Decoder:
    """The policy stage ``export`` wrote.

    Raises InputError where the method is best-of-n itself, which has none.
    """
    if run.settings.method.name == "bon":
        raise InputError(
            "method.name=bon has no policy: set generate.model=bon or reference, or train a method"
        )
    run.workdir.require("export", "the policy")
    path = run.workdir.policy
    if run.settings.export.form == "model":
        # In the reference's dtype, small steps of what was trained would be rounded away.
        return load_decoder(run, path, run.settings.memory.param_dtype)
    base = load_decoder(run, reference_path(run))
    own, alpha = peft.load(path, base.config, base=reference_path(run))
    own = sharding.place(own, run.mesh)
    return policy_of(Decoder(dataclasses.replace(base.config, lora_alpha=alpha), base.params), own)


def references(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[PromptSamples],
    m: int,
    estimator: str,
) -> References:
    """The first m reference rewards of each prompt as the density of best-of-n is read off them."""
    rewards_PxM = sample_rewards(samples, m)
    by_order = run.settings.method.ties == "order"
    order_PxM = orders(run, tokenizer, samples, m) if by_order else None
    table = bon_references.references(rewards_PxM, estimator, order_PxM)
    if table.fit is not None:
        failed = int(np.sum(~np.asarray(table.fit.converged_P)))
        log(
            f"exponential: {failed} of {len(samples)} prompts have no curve that fits their {m} "
            "rewards and take the smoothed estimate"
        )
    return table


def orders(
    run: Run, tokenizer: PreTrainedTokenizerFast, samples: Sequence[PromptSamples], m: int
) -> np.ndarray:
    """The place of each prompt's first m responses in the total order of responses, uint32 [P, M].

    The order is over token ids; a file without them has its texts encoded.
    """
    end, longest = eos_id(run, tokenizer), run.settings.sampling.max_new_tokens
    tokens = np.zeros((len(samples) * m, longest), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for p, of_prompt in enumerate(samples):
        for i in range(m):
            if of_prompt.response_tokens is not None:
                ids = of_prompt.response_tokens[i]
            else:
                tail = () if end is None else (end,)
                ids = (*tokenizers.encode(tokenizer, of_prompt.responses[i]), *tail)
            ids = ids[:longest]
            tokens[p * m + i, : len(ids)] = ids
            mask[p * m + i, : len(ids)] = True
    return np.asarray(log_f.response_order(tokens, mask)).reshape(len(samples), m)


Score = ClassifierReward | TextReward | FunctionReward


def load_reward(run: Run, tokenizer: PreTrainedTokenizerFast) -> WeightedReward:
    """The reward: a callable, the user's classifier, or what stage ``reward`` trained; with the
    others that are added to it, and the price of a missing EOS."""
    r = run.settings.reward
    own = _load_score(run, tokenizer, "reward", r, run.workdir.reward)
    parts = [Part("main", r.weight, own)]
    for name, other in r.others.items():
        score = _load_score(run, tokenizer, f"reward.others.{name}", other, None)
        parts.append(Part(name, other.weight, score))
    return WeightedReward(parts, r.missing_eos, r.missing_eos_value, eos_id(run, tokenizer))


def load_evaluator(run: Run, tokenizer: PreTrainedTokenizerFast) -> Score | None:
    """The reward that only measures, from where stage ``evaluator`` has it; None without one."""
    e = run.settings.evaluator
    if not (e.train or e.path or e.function):
        return None
    return _load_score(run, tokenizer, "evaluator", e, run.workdir.evaluator)


def _load_score(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    key: str,
    r: Reward | RewardPart | Evaluator,
    made: Path | None,
) -> Score:
    """One reward; ``made``: where stage ``key`` puts the one it trains.

    A model trained here reads the policy's own ids. A user's has a tokenizer of its own, by which
    the text is read anew.
    """
    end = eos_id(run, tokenizer)
    decode = partial(tokenizer.batch_decode, skip_special_tokens=False)
    if r.function:
        return FunctionReward(r.function, decode, end, key)
    if made is not None and not r.path:
        run.workdir.require(key, f"the {key} model")
        config, params, labels = _load_classifier(run, made)
        return ClassifierReward(params, config, labels, r.label, r.score, end, key)
    path = hub.resolve(r.path)
    config, params, labels = _load_classifier(run, path)
    return TextReward(
        params, config, labels, r.label, r.score, tokenizers.load(path), decode, end, run.mesh,
        template=r.template, max_tokens=r.max_tokens, key=key,
    )  # fmt: skip


def _load_classifier(run: Run, path: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """A sequence classifier on the mesh: its configuration, parameters and labels."""
    config, params, labels = hf.load_classifier(
        path,
        place=partial(sharding.sharding_of, run.mesh),
        dtype=run.settings.memory.frozen_dtype,
    )
    compute = run.settings.memory.compute_dtype
    return dataclasses.replace(config, compute_dtype=compute), params, labels
