"""A run in shapes: its models, prompts, tables and batches as abstract arrays on a mesh."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.bon import amortised
from vbon_jax.bon.exponential import ExponentialFit
from vbon_jax.bon.references import References
from vbon_jax.config import Config, Reward, RewardPart
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.methods.learning import ValueNetwork
from vbon_jax.models import decoder, encoder, heads, hf, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf import config_files, hub
from vbon_jax.sampling import decode
from vbon_jax.sampling.requests import bucket_length
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.stages import adoption, loading
from vbon_jax.stages.fitting import LABELS, decoder_config
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training.amortised import BINS
from vbon_jax.training.learner import Program


def bytes_of(tree: Any) -> int:
    """Bytes each device holds of a tree of (abstract) arrays with shardings."""

    def one(x: Any) -> int:
        sizes = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return int(np.prod(sizes)) * (8 if key else x.dtype.itemsize)

    return sum(one(x) for x in jax.tree.leaves(tree))


def abstract(tree: Any, mesh: Mesh, prefix: str = "", dtype: str | None = None) -> Any:
    """``tree`` (of shapes) on the mesh by the table, floats in ``dtype`` where one is given."""

    def one(x: Any, place: Any) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if cast else x.dtype, sharding=place)

    return jax.tree.map(one, tree, sharding.shardings(tree, mesh, prefix))


def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
    """An abstract array of no particular place."""
    return jax.ShapeDtypeStruct(sizes, dtype)


@dataclasses.dataclass(frozen=True)
class World:
    """The run in shapes: the reference, and its training prompts."""

    settings: Config
    mesh: Mesh
    workdir: Workdir
    config: DecoderConfig
    reference: Any
    prompts: int
    prompt: int  # columns of a padded prompt
    sent: dict[str, float]  # as in Need
    flops: dict[str, float]  # as in Need

    @property
    def platform(self) -> str:
        """What the programs are compiled for."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def columns(self) -> int:
        """Of prompt and response in one row."""
        return self.prompt + self.settings.sampling.max_new_tokens

    @property
    def on_host(self) -> bool:
        """Whether a device's memory is the host's own, and no accelerator is meant."""
        return self.platform == "cpu" and not self.settings.memory.device_gib

    def packing(self, rows: int) -> int:
        """Bytes that matrix products take to pack an operand, which the compiler does not report.

        On CPU, a chunk of logits of ``rows`` responses or fewer; elsewhere none.
        """
        s = self.settings
        tokens = min(s.memory.chunk, rows * s.sampling.max_new_tokens)
        return 4 * tokens * self.config.vocab_size // self.mesh.size if self.on_host else 0


def world(s: Config, mesh: Mesh, made: Workdir) -> World:
    """The run of a configuration; arguments and errors as of `need.need`."""
    config = _reference_config(s, made)
    tree = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    try:
        tree = jax.eval_shape(
            lambda p: trainable.divide(p, loading.training(s).trained, config.layers), tree
        )
    except ValueError as error:
        raise InputError(f"train.{error}") from error
    reference = {"decoder": abstract(tree, mesh, "decoder", s.memory.frozen_dtype)}
    prompts, longest = _prompts(s, made)
    columns = min(bucket_length(longest), config.positions)
    return World(s, mesh, made, config, reference, prompts, columns, {}, {})


def _done(workdir: Workdir, stage: str) -> bool:
    """Whether a stage's files are there, and of these settings."""
    try:
        workdir.require(stage, "")
    except InputError:
        return False
    return True


def _reference_config(s: Config, workdir: Workdir) -> DecoderConfig:
    if s.reference.path or _done(workdir, "sft"):
        path = hub.resolve(s.reference.path) if s.reference.path else workdir.reference
        config = hf.read_config(path)[1]
        if not isinstance(config, DecoderConfig):
            raise InputError(f"reference.path={s.reference.path!r} is no causal language model")
        return loading.arithmetic(s, config)
    # Not learned yet: its vocabulary has at most so many entries.
    return loading.arithmetic(s, decoder_config(s.reference.model, s.tokenizer.vocab_size))


def _prompts(s: Config, workdir: Workdir) -> tuple[int, int]:
    """The number of training prompts, and the tokens of the longest.

    Both are counted where they can be, else they are the most that the settings allow.
    """
    p = s.prompts
    if _done(workdir, "sample"):
        return _counted(prompt_files.read_jsonl(workdir.prompts("train")))
    known = s.tokenizer.path or s.reference.path

    def tokenizer() -> PreTrainedTokenizerFast:  # where texts are counted: no other plan needs one
        return tokenizers.set_bos(tokenizers.load(hub.resolve(known)), s.tokenizer.add_bos)

    if s.samples.path:
        found = sample_files.read(s.samples.path, scored=False)
        if not known:
            return len(found), p.longest
        return _counted(adoption.prompts_of(s, workdir, found, tokenizer()))
    if p.path and p.format == "text" and known:
        return _counted(prompt_files.read_texts(p.path, tokenizer()))
    if p.path and p.format == "chat":
        return len(chat.read(p.path)), p.longest
    return p.train, p.longest if p.path else p.max_tokens


def _counted(prompts: Sequence[prompt_files.Prompt]) -> tuple[int, int]:
    return len(prompts), max(len(prompt.tokens) for prompt in prompts)


def scores(s: Config) -> dict[str, Reward | RewardPart]:
    """The reward and what is added to it, by their keys."""
    return {"reward": s.reward} | {f"reward.others.{k}": x for k, x in s.reward.others.items()}


def classifier_of(w: World, r: Reward | RewardPart) -> tuple[Any, Any] | None:
    """(configuration, parameters in shapes) of a reward model; None for a callable."""
    s = w.settings
    if r.function:
        return None
    config: Any
    if isinstance(r, Reward) and not r.path and not _done(w.workdir, "reward"):
        config, labels = decoder_config(r.model, w.config.vocab_size), len(LABELS)
    else:
        path = hub.resolve(r.path) if r.path else w.workdir.reward
        _, config, raw = hf.read_config(path)
        labels = len(config_files.labels(raw, str(path / "config.json")).names)
    config = dataclasses.replace(config, compute_dtype=s.memory.compute_dtype)

    def init(key: jax.Array) -> Any:
        if isinstance(config, EncoderConfig):
            return encoder.init(config, labels, key)
        body = decoder.init(config, key)
        body.pop("head", None)  # a classifier has no output matrix
        return {"decoder": body, "score": heads.init_score(config, labels, key)}

    tree = jax.eval_shape(init, jax.random.key(0))
    return config, abstract(tree, w.mesh, dtype=s.memory.frozen_dtype)


def value_network(w: World) -> ValueNetwork:
    """(configuration, parameters in shapes) of values that start as the reward model."""
    found = classifier_of(w, w.settings.reward)
    assert found is not None  # constraints: no callable
    config, params = found
    if not isinstance(config, DecoderConfig):
        raise InputError(
            f"train.value_network=reward: {w.settings.reward.path} is an encoder; values need a "
            "causal model: set head"
        )
    head = {"kernel": shape(config.width, 1, dtype=jnp.float32),
            "bias": shape(1, dtype=jnp.float32)}  # fmt: skip
    return ValueNetwork(
        loading.arithmetic(w.settings, config), {"decoder": params["decoder"], "head": head}
    )


def references_of(w: World) -> References:
    """The table of reference rewards, in shapes."""
    s = w.settings
    rewards = shape(w.prompts, s.samples.m, dtype=jnp.float32)
    order = shape(*rewards.shape, dtype=jnp.uint32) if s.method.ties == "order" else None
    fit = None
    if s.method.estimator == "exponential":
        of_each = shape(w.prompts, dtype=jnp.float32)
        fit = ExponentialFit(of_each, of_each, shape(w.prompts, dtype=bool))
    prior = None
    if s.samples.amortised:
        pool = min((s.samples.prompts or w.prompts) * s.samples.m, amortised.MOST_POOLED)
        edges = BINS + 1
        prior = amortised.Prior(
            shape(pool, dtype=jnp.float32), shape(edges),
            shape(w.prompts, edges, dtype=jnp.float32), shape(dtype=jnp.float32),
        )  # fmt: skip
    m = shape(w.prompts) if s.samples.prompts else shape()
    return References(rewards, order, fit, m, prior)


def batch_of(w: World, rows: int, program: Program) -> ScoredRollout:
    """A scored rollout, in shapes, with the stored samples beside it."""
    new, K = w.settings.sampling.max_new_tokens, program.lookahead

    def scored(rows: int, likeliest: decode.Likeliest | None, trunk: Any = None) -> ScoredRollout:
        def of(*sizes: int, dtype: Any = jnp.int32) -> Any:
            return shape(rows, *sizes, dtype=dtype)

        rollout = decode.Rollout(
            of(new), of(new, dtype=bool), of(new, dtype=jnp.float32), of(dtype=bool), likeliest,
            trunk,
        )  # fmt: skip
        return ScoredRollout(
            of(w.prompt), of(w.prompt, dtype=bool), rollout, of(dtype=jnp.float32), of(),
            w.settings.sampling.temperature,
            of(new, dtype=jnp.float32) if program.prefixes else None,
            None if likeliest is None else of(new, K, dtype=jnp.float32),
            n_B=of(dtype=jnp.float32) if w.settings.method.is_family else None,
        )  # fmt: skip

    likeliest = trunk = None
    if program.trunk_layers:
        columns = w.prompt + new
        trunk = shape(rows, columns, w.config.width, dtype=w.config.compute_dtype)
    if K:
        dtypes = (jnp.int32, jnp.float32, bool)
        likeliest = decode.Likeliest(*(shape(rows, new, K, dtype=x) for x in dtypes))
    beside = rows // program.group * program.replay
    stored = scored(beside, None) if beside else None
    return dataclasses.replace(scored(rows, likeliest, trunk), stored=stored)
