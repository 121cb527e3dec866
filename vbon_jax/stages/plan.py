"""What a run will need of each device's memory, told before anything is allocated.

Nothing is loaded and nothing runs: the run's own programs are compiled for abstract arrays with the
shardings they will have, and the compiler says what it would allocate. For a TPU slice it is the
slice's own compiler (``topology``). For another mesh larger than this machine they are compiled for
as many CPU devices (``pretend``), whose temporaries are near those of an accelerator, not equal to
them.

What a runtime and its libraries take for themselves (code, compiled programs, a GPU's context) is
not in the figures: a few hundred MB, whatever the model.
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import clear_backends
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from vbon_jax import compiled, methods, sharding
from vbon_jax.bon.exponential import ExponentialFit
from vbon_jax.bon.references import References
from vbon_jax.config import Config, Reward, RewardPart
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.methods import learning, starting
from vbon_jax.methods.learning import Job, ValueNetwork
from vbon_jax.models import cache, decoder, encoder, heads, hf, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf import config_files, hub
from vbon_jax.progress import log
from vbon_jax.rewards import classifier, text
from vbon_jax.sampling import decode, slots
from vbon_jax.sampling.requests import bucket_length
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.stages import adoption, loading, topology
from vbon_jax.stages.base import refuse_uneven
from vbon_jax.stages.fitting import LABELS, decoder_config
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training import offline
from vbon_jax.training.learner import Program
from vbon_jax.training.options import microbatches

GIB = 2**30
TEXT_ROWS = 32  # rows a text reward scores at once


class Need(NamedTuple):
    """Bytes of each device.

    Attributes:
      held: bytes held throughout stage ``train``, by name.
      phases: peak bytes of each phase beyond those, by name.
      sample: peak bytes of stage ``sample``.
      cache: of the phase "rollout", its keys and values.
      sent: bytes that each device sends to others in a phase, once for each run of it, by name.
    """

    held: dict[str, int]
    phases: dict[str, int]
    sample: int
    cache: int
    sent: dict[str, float]

    @property
    def train(self) -> int:
        """What stage ``train`` holds, and its greediest phase."""
        return sum(self.held.values()) + max(self.phases.values(), default=0)

    @property
    def peak(self) -> int:
        """Of the greedier stage."""
        return max(self.sample, self.train)


def pretend(devices: int) -> None:
    """Lets this machine stand for ``devices`` of them; where it has fewer, they are CPU devices.

    Before any array is made: none outlives a change of devices.
    """
    if len(jax.devices()) < devices:
        clear_backends()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def bytes_of(tree: Any) -> int:
    """Bytes each device holds of a tree of (abstract) arrays with shardings."""

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return int(np.prod(shape)) * (8 if key else x.dtype.itemsize)

    return sum(one(x) for x in jax.tree.leaves(tree))


def _abstract(tree: Any, mesh: Mesh, prefix: str = "", dtype: str | None = None) -> Any:
    """``tree`` (of shapes) on the mesh by the table, floats in ``dtype`` where one is given."""

    def one(x: Any, place: Any) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if cast else x.dtype, sharding=place)

    return jax.tree.map(one, tree, sharding.shardings(tree, mesh, prefix))


def _shape(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _new_bytes(w: "_World", lowered: jax.stages.Lowered, phase: str) -> int:
    """What a program allocates beside its arguments, bytes a device; adds what it sends."""
    # Memory is settled before machine code is made, which on CPU need not be good for this.
    options: Any = {"xla_backend_optimization_level": 0} if w.platform == "cpu" else None
    program = lowered.compile(compiler_options=options)
    if w.mesh.size > 1:
        sent = sum(c.moved * c.times for c in compiled.collectives(program.as_text() or ""))
        w.sent[phase] = w.sent.get(phase, 0.0) + sent
    stats: Any = program.memory_analysis()
    return int(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class _World:
    """The run in shapes: the reference, and its training prompts."""

    settings: Config
    mesh: Mesh
    workdir: Workdir
    config: DecoderConfig
    reference: Any
    prompts: int
    prompt: int  # columns of a padded prompt
    sent: dict[str, float]  # as in Need

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


def _scores(s: Config) -> dict[str, Reward | RewardPart]:
    """The reward and what is added to it, by their keys."""
    return {"reward": s.reward} | {f"reward.others.{k}": x for k, x in s.reward.others.items()}


def _classifier(w: _World, r: Reward | RewardPart) -> tuple[Any, Any] | None:
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
    return config, _abstract(tree, w.mesh, dtype=s.memory.frozen_dtype)


def need(s: Config, mesh: Mesh, made: Workdir) -> Need:
    """Memory of the stages ``sample`` and ``train`` on each device.

    Args:
      s: the configuration.
      mesh: the devices.
      made: the workdir of the run, which need not exist; what is there already (the reference
        learned, the prompts made) is read, nothing is written.

    Raises:
      InputError: the configuration of the reference or of a reward model cannot be read.
    """
    config = _reference_config(s, made)
    shapes = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    try:
        shapes = jax.eval_shape(
            lambda p: trainable.divide(p, loading.training(s).trained, config.layers), shapes
        )
    except ValueError as error:
        raise InputError(f"train.{error}") from error
    reference = {"decoder": _abstract(shapes, mesh, "decoder", s.memory.frozen_dtype)}
    prompts, longest = _prompts(s, made)
    columns = min(bucket_length(longest), config.positions)
    sent: dict[str, float] = {}
    w = _World(s, mesh, made, config, reference, prompts, columns, sent)
    held = {"reference": bytes_of(reference)}
    phases: dict[str, int] = {}
    with jax.set_mesh(mesh):
        sample = _sampling(w, held)
        cached = 0 if s.method.name == methods.BEST_OF_N else _training(w, held, phases)
    return Need(held, phases, sample, cached, sent)


def _sampling(w: _World, held: dict[str, int]) -> int:
    """Adds the rewards to what is held; returns all that stage ``sample`` needs."""
    s = w.settings
    on_top, rows = [0], s.sampling.batch_size
    for name, r in _scores(s).items():
        found = _classifier(w, r)
        if found is not None:
            held[name] = bytes_of(found[1])
            on_top.append(
                0 if s.samples.path else _score_bytes(w, r, *found, rows, f"sample, {name}")
            )
    if not s.samples.path:  # samples made elsewhere are only copied
        params = w.reference["decoder"]
        on_top.append(_slots_bytes(w, params, rows, w.prompts, s.samples.m, "sample, a page")[0])
    return sum(held.values()) + max(on_top)


def _score_bytes(
    w: _World, r: Reward | RewardPart, config: Any, params: Any, rows: int, phase: str
) -> int:
    """Bytes of one call of a reward model.

    A text that is re-tokenized is taken to have as many tokens as the policy's: more is not known.
    """
    length = w.columns
    if r.path:
        rows, length = TEXT_ROWS, text.bucket(length, r.max_tokens or config.positions)
    batch = _abstract((_shape(rows, length), _shape(rows, length, dtype=bool)), w.mesh, "batch")
    lowered = classifier.score.lower(params, *batch, config=config, kind="logit", label=0)
    return _new_bytes(w, lowered, phase)


def _slots_bytes(
    w: _World, params: Any, rows: int, prompts: int, each: int, phase: str
) -> tuple[int, int]:
    """Slots for ``each`` responses to prompts, and a page of them; of that keys and values."""
    s = w.settings
    new, ends = s.sampling.max_new_tokens, (0,) if s.sampling.stop_at_eos else ()
    shape = slots.shape_for(rows, prompts, each, w.prompt, new)
    setup = slots.Setup(w.config, shape, decode.Limits(new, ends, pad_id=0))
    state = _abstract(jax.eval_shape(partial(slots.empty, setup)), w.mesh, "slots")
    page = (_shape(shape.prompts, w.prompt), _shape(shape.prompts, w.prompt, dtype=bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape.responses))
    prompts, keys = _abstract((page, keys), w.mesh, "batch")
    one = np.int32(1)
    lowered = (
        slots.supply.lower(state, params, prompts, keys, one, one, setup=setup),
        slots.draw.lower(state, params, np.float32(1), one, one, setup=setup),
    )
    kept = [(x.k, x.v) for x in (state.store, state.held, state.rows)]
    return bytes_of(state) + max(_new_bytes(w, x, phase) for x in lowered), bytes_of(kept)


def _rollout_bytes(
    w: _World, params: Any, rows: int, each: int, likeliest: int = 0, trunk_layers: int = 0
) -> tuple[int, int]:
    """A rollout of ``each`` rows a prompt; and of that the cache of keys and values."""
    s, prompts = w.settings, rows // each
    shapes = (_shape(prompts, w.prompt), _shape(prompts, w.prompt, dtype=bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    batch = _abstract((*shapes, keys), w.mesh, "batch")
    ends = (0,) if s.sampling.stop_at_eos else ()
    lowered = decode.rollout.lower(
        params, *batch, np.float32(s.sampling.temperature), config=w.config,
        limits=decode.Limits(
            s.sampling.max_new_tokens, ends, pad_id=0, likeliest=likeliest,
            trunk_layers=trunk_layers,
        ),
    )  # fmt: skip
    kept = jax.eval_shape(
        lambda: (
            cache.init(w.config, prompts, w.prompt),
            cache.init(w.config, rows, s.sampling.max_new_tokens),
        )
    )
    kept_bytes = sum(bytes_of(_abstract(x, w.mesh, "cache")) for x in kept)
    return _new_bytes(w, lowered, "rollout"), kept_bytes


def _training(w: _World, held: dict[str, int], phases: dict[str, int]) -> int:
    """Adds what stage ``train`` holds and its phases; returns the cache's bytes."""
    s = w.settings
    method = methods.of_config(s)
    value = _value_network(w) if s.train.value_network == "reward" and method.values else None
    job = Job(method, method.from_config(s), loading.training(s), w.config, w.prompts, value)
    network = None if value is None else value.params
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state = jax.eval_shape(job.make_state(), w.reference["decoder"], network, key)
    except ValueError as error:
        raise InputError(str(error)) from error
    state = _abstract(state, w.mesh)
    table = _abstract(_references(w), w.mesh)
    held["trained"] = bytes_of(state.params)
    held["optimizer"] = bytes_of(state.opt_state)
    held["reference rewards"] = bytes_of(table)
    if w.on_host:  # where a checkpoint waits to be written, in the form it will have
        phases["checkpoint"] = bytes_of(state)
    if not method.online:
        _offline(w, job, state, held, phases)
        return 0
    begin = starting.job(job)
    if begin is not None:
        phases["start"] = _start(w, begin, held["trained"] + held["optimizer"])
    rows = s.train.batch_size
    for name, r in _scores(s).items():
        found = _classifier(w, r)
        if found is not None:
            phase = f"score by {name}"
            phases[phase] = _score_bytes(w, r, *found, rows, phase)
    own = job.program()
    policy = trainable.join(w.reference["decoder"], state.params["decoder"])
    told = (own.lookahead, own.trunk_layers)
    if own.rows:
        rollout, kv = _slots_bytes(w, policy, own.rows, rows // own.group, own.group, "rollout")
    else:
        rollout, kv = _rollout_bytes(w, policy, rows, own.group, *told)
    batch = _abstract(_batch(w, rows, own), w.mesh, "batch")
    batches = tuple(batch for _ in own.sources)
    phases["rollout"] = rollout + bytes_of(batches[1:])
    scalar = _shape(dtype=jnp.float32)
    program = jax.jit(own.update, donate_argnums=0)
    lowered = program.lower(state, w.reference, batches, table, scalar, scalar)
    step = s.train.minibatch_size // microbatches(s.train, s.memory)
    phases["update"] = _new_bytes(w, lowered, "update") + bytes_of(batches) + w.packing(step)
    return kv


def _value_network(w: _World) -> ValueNetwork:
    """(configuration, parameters in shapes) of values that start as the reward model."""
    found = _classifier(w, w.settings.reward)
    assert found is not None  # constraints: no callable
    config, params = found
    if not isinstance(config, DecoderConfig):
        raise InputError(
            f"train.value_network=reward: {w.settings.reward.path} is an encoder; values need a "
            "causal model: set head"
        )
    head = {"kernel": _shape(config.width, 1, dtype=jnp.float32),
            "bias": _shape(1, dtype=jnp.float32)}  # fmt: skip
    return ValueNetwork(
        loading.arithmetic(w.settings, config), {"decoder": params["decoder"], "head": head}
    )


def _references(w: _World) -> References:
    """The table of reference rewards, in shapes."""
    s = w.settings
    rewards = _shape(w.prompts, s.samples.m, dtype=jnp.float32)
    order = _shape(*rewards.shape, dtype=jnp.uint32) if s.method.ties == "order" else None
    fit = None
    if s.method.estimator == "exponential":
        of_each = _shape(w.prompts, dtype=jnp.float32)
        fit = ExponentialFit(of_each, of_each, _shape(w.prompts, dtype=bool))
    return References(rewards, order, fit, _shape())


def _batch(w: _World, rows: int, program: Program) -> ScoredRollout:
    """A scored rollout, in shapes, with the stored samples beside it."""
    new, K = w.settings.sampling.max_new_tokens, program.lookahead

    def scored(rows: int, likeliest: decode.Likeliest | None, trunk: Any = None) -> ScoredRollout:
        def of(*shape: int, dtype: Any = jnp.int32) -> Any:
            return _shape(rows, *shape, dtype=dtype)

        rollout = decode.Rollout(
            of(new), of(new, dtype=bool), of(new, dtype=jnp.float32), of(dtype=bool), likeliest,
            trunk,
        )  # fmt: skip
        return ScoredRollout(
            of(w.prompt), of(w.prompt, dtype=bool), rollout, of(dtype=jnp.float32), of(),
            w.settings.sampling.temperature,
            of(new, dtype=jnp.float32) if program.prefixes else None,
            None if likeliest is None else of(new, K, dtype=jnp.float32),
        )  # fmt: skip

    likeliest = trunk = None
    if program.trunk_layers:
        columns = w.prompt + new
        trunk = _shape(rows, columns, w.config.width, dtype=w.config.compute_dtype)
    if K:
        dtypes = (jnp.int32, jnp.float32, bool)
        likeliest = decode.Likeliest(*(_shape(rows, new, K, dtype=x) for x in dtypes))
    beside = rows // program.group * program.replay
    stored = scored(beside, None) if beside else None
    return dataclasses.replace(scored(rows, likeliest, trunk), stored=stored)


def _start(w: _World, job: Job, after: int) -> int:
    """What the training that a policy starts with takes beyond the ``after`` bytes that follow."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(job.make_state(), w.reference["decoder"], None, key)
    state = _abstract(state, w.mesh)
    held: dict[str, int] = {"state": bytes_of(state)}
    phases: dict[str, int] = {}
    _offline(w, job, state, held, phases)
    return max(0, sum(held.values()) + max(phases.values()) - after)


def _offline(w: _World, job: Job, state: Any, held: dict[str, int], phases: dict[str, int]) -> None:
    """Adds the steps of an offline method, and its pool of samples, which is held."""
    s = w.settings
    rows, new = w.prompts * s.samples.m, s.sampling.max_new_tokens
    pool = offline.Pool(
        _shape(rows, w.columns), _shape(rows, w.columns, dtype=bool), _shape(rows, new, dtype=bool),
        _shape(rows, dtype=jnp.float32), s.sampling.temperature,
    )  # fmt: skip
    pool = _abstract(pool, w.mesh)
    held["pool of samples"] = bytes_of(pool)
    if s.samples.path:  # made elsewhere: they may lack their log pi_ref
        arrays = (pool.tokens_NxS, pool.mask_NxS, pool.response_mask_NxT)
        few = [_shape(s.sampling.batch_size, *x.shape[1:], dtype=x.dtype) for x in arrays]
        scored = jax.jit(
            partial(offline.log_prob, config=w.config, temperature=s.sampling.temperature)
        )
        phases["log pi_ref"] = _new_bytes(w, scored.lower(w.reference, *few), "log pi_ref")
    many = (min(learning.STEPS, job.offline_steps), s.offline.batch_size)
    chosen = offline.Choices(_shape(*many), _shape(*many), _shape(*many, dtype=jnp.float32))
    base = None if job.training.trained.whole else w.reference["decoder"]
    scalar = _shape(dtype=jnp.float32)
    program = jax.jit(partial(offline.steps, setup=job.offline_setup()), donate_argnums=0)
    lowered = program.lower(state, pool, chosen, scalar, scalar, base)
    phases["gradient steps"] = _new_bytes(w, lowered, "gradient steps") + w.packing(
        2 * s.offline.batch_size
    )


def device_bytes(s: Config) -> int:
    """Memory of a device: ``memory.device_gib``, or what this machine's first device reports.

    CPU devices report nothing and share what the machine has.
    """
    if s.memory.device_gib:
        return int(s.memory.device_gib * GIB)
    found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if found is None:
        pages: Callable[[str], int] = os.sysconf
        found = pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES") // jax.device_count()
    return int(found)


SMALLER = {
    "update": "raise memory.accumulate, set memory.remat=full, lower memory.chunk",
    "gradient steps": "lower offline.batch_size, set memory.remat=full, lower memory.chunk",
    "start": "lower offline.batch_size, set memory.remat=full, lower memory.chunk",
    "rollout": "lower train.batch_size, or set memory.rollout_rows",
    "log pi_ref": "lower sampling.batch_size",
    "checkpoint": "train less of it (train.num_layers_unfrozen, lora.rank)",
}


def verdict(found: Need, limit: int) -> str:
    """One sentence: does it fit, and if not, what is too large and what to do."""
    if found.peak <= limit:
        return f"fits: {found.peak / GIB:.2f} of {limit / GIB:.2f} GiB a device"
    held = sum(found.held.values())
    if held > limit:
        what = f"what is held alone ({max(found.held, key=found.held.__getitem__)} most)"
        advice = (
            "split it over more devices (mesh.fsdp, mesh.tensor), store it in bfloat16 (memory.*_"
            "dtype), or train less of it (train.num_layers_unfrozen, lora.rank)"
        )
    elif found.train <= limit:
        what, advice = "stage 'sample'", "lower sampling.batch_size"
    else:
        phase = max(found.phases, key=found.phases.__getitem__)
        what = f"the phase {phase!r}"
        advice = SMALLER.get(phase, "lower reward.max_tokens or train.batch_size")
    return (
        f"does not fit: {found.peak / GIB:.2f} GiB a device are needed and there are "
        f"{limit / GIB:.2f}; {what} is too large: {advice}"
    )


def tables(found: Need, mesh: Mesh, limit: int) -> Sequence[Table]:
    """What ``vbon plan`` prints."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    held = Table(title=f"held by each device ({shape})")
    phases = Table(title="peak beyond that, by phase")
    stages = Table(title=f"all together, of {limit / 2**20:,.0f} MiB a device")

    def add(table: Table, name: str, size: int) -> None:
        table.add_row(name, f"{size / 2**20:,.1f}")

    for table, rows in (
        (held, found.held),
        (phases, found.phases),
        (stages, {"stage sample": found.sample, "stage train": found.train}),
    ):
        table.min_width = len(str(table.title))  # or the title would be broken
        table.add_column("what")
        table.add_column("MiB", justify="right")
        for name, size in rows.items():
            add(table, name, size)
    held.add_section()
    add(held, "together", sum(found.held.values()))
    if found.cache:
        phases.add_section()
        add(phases, "keys and values, in rollout", found.cache)
    if not found.sent:
        return held, phases, stages
    sent = Table(title="sent by each device, once a phase")
    sent.min_width = len(str(sent.title))
    sent.add_column("what")
    sent.add_column("MiB", justify="right")
    for name, moved in found.sent.items():
        add(sent, name, int(moved))
    return held, phases, stages, sent


def run(config: Config, workdir: Workdir, slice_name: str | None = None) -> None:
    """Prints the memory a run needs on each device; touches no workdir.

    Args:
      config: the run's settings.
      workdir: its folder, of which only what is there is read.
      slice_name: a TPU slice to plan for, "v5e:16x16"; None for devices like this machine's.
    """
    m = config.mesh
    wanted = m.data * m.fsdp * m.tensor
    limit: float
    if slice_name is not None:
        there = topology.devices(slice_name)
        mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor, there)
        limit = GIB * (config.memory.device_gib or topology.memory_gib(slice_name, there))
    else:
        if wanted > 1:  # no axis takes the rest: a mesh that need not be here
            pretend(wanted)
        mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor)
        limit = device_bytes(config)
    refuse_uneven(config, mesh)
    began = time.monotonic()
    with warnings.catch_warnings():  # a cache of programs can hold them, not give them back
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        found = need(config, mesh, workdir)
    if slice_name is not None:
        log(f"plan: compiled for {mesh.size} devices in {time.monotonic() - began:.0f} s")
    console = Console()
    for table in tables(found, mesh, int(limit)):
        console.print(table)
    console.print(verdict(found, int(limit)), highlight=False, soft_wrap=True)
