"""What a run will need of each device's memory, told before anything is allocated.

Nothing is loaded and nothing runs: the run's own programs are compiled for abstract arrays with the
shardings they will have, and the compiler says what it would allocate. For a mesh larger than this
machine they are compiled for as many CPU devices (``pretend``), whose temporaries are near those of
an accelerator, not equal to them.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from vbon_jax import inputs, methods, sharding
from vbon_jax.bon.references import References, references
from vbon_jax.errors import InputError
from vbon_jax.models import cache, decoder, encoder, heads, hf, hub, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.pretrain import LABELS, decoder_config
from vbon_jax.rewards import classifier
from vbon_jax.sampling import decode, engine
from vbon_jax.settings import OFFLINE, Evaluator, Reward, RewardPart, Settings
from vbon_jax.training import offline, ppo

GIB = 2**30
TEXT_ROWS = 32  # rows a text reward scores at once


class Need(NamedTuple):
    """Bytes of each device. held: by name, there all the time. phases: by name, what comes on top
    while that program runs. cache: of a phase's, the keys and values of a rollout."""

    held: dict[str, int]
    phases: dict[str, int]
    cache: int

    @property
    def peak(self) -> int:
        """What is held, and the greediest phase."""
        return sum(self.held.values()) + max(self.phases.values())


def pretend(devices: int) -> None:
    """Lets this machine stand for ``devices`` of them. Before JAX is asked for its devices."""
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


def _shape(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _new_bytes(program: Any) -> int:
    """What a compiled program allocates beside its arguments, bytes a device."""
    stats = program.memory_analysis()
    return int(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class _World:
    """The run in shapes: reference, training state, batch."""

    settings: Settings
    mesh: Mesh
    config: DecoderConfig
    reference: Any
    prompt: int  # columns of a padded prompt


def _reference_config(s: Settings, workdir: Path) -> DecoderConfig:
    if s.reference.path:
        config = hf.read_config(hub.resolve(s.reference.path))[1]
        if not isinstance(config, DecoderConfig):
            raise InputError(f"reference.path={s.reference.path!r} is no causal language model")
        return inputs.arithmetic(s, config)
    made = workdir / "reference"
    if (made / "config.json").exists():
        config = hf.read_config(made)[1]
        assert isinstance(config, DecoderConfig)  # stage sft wrote it
        return inputs.arithmetic(s, config)
    # Not learned yet: its vocabulary has at most so many entries.
    return inputs.arithmetic(s, decoder_config(s.reference.model, s.tokenizer.vocab_size))


def _classifier(
    s: Settings, r: Reward | RewardPart | Evaluator, mesh: Mesh, vocab_size: int
) -> tuple[Any, Any] | None:
    """(configuration, abstract parameters) of a reward model; None for a callable."""
    if r.function:
        return None
    if r.path:
        path = hub.resolve(r.path)
        _, config, raw = hf.read_config(path)
        labels = len(raw.get("id2label") or LABELS)
    elif isinstance(r, RewardPart):
        return None
    else:
        config, labels = decoder_config(r.model, vocab_size), len(LABELS)
    config = dataclasses.replace(config, compute_dtype=s.memory.compute_dtype)

    def init(key: jax.Array) -> Any:
        if isinstance(config, EncoderConfig):
            return encoder.init(config, labels, key)
        body = decoder.init(config, key)
        body.pop("head", None)  # a classifier has no output matrix
        return {"decoder": body, "score": heads.init_score(config, labels, key)}

    tree = jax.eval_shape(init, jax.random.key(0))
    return config, _abstract(tree, mesh, dtype=s.memory.frozen_dtype)


def _longest_prompt(s: Settings) -> int:
    """Columns of the padded prompts; files of whole prompts may be as long as the key allows."""
    whole = bool(s.prompts.path) or s.prompts.format != "text"
    return engine.bucket_length(s.prompts.longest if whole else s.prompts.max_tokens)


def need(s: Settings, mesh: Mesh, workdir: Path) -> Need:
    """Memory of the stages ``sample`` and ``train`` (and what both hold) on each device.

    Raises InputError where the reference or a reward cannot be found out about.
    """
    config = _reference_config(s, workdir)
    shapes = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    try:
        shapes = jax.eval_shape(
            lambda p: trainable.divide(p, inputs.trained(s), config.layers), shapes
        )
    except ValueError as error:
        raise InputError(f"train.{error}") from error
    reference = {"decoder": _abstract(shapes, mesh, "decoder", s.memory.frozen_dtype)}
    w = _World(s, mesh, config, reference, min(_longest_prompt(s), config.positions))
    held = {"reference": bytes_of(reference)}
    phases: dict[str, int] = {}
    scores: dict[str, Reward | RewardPart] = {"reward": s.reward}
    scores |= {f"reward.others.{name}": part for name, part in s.reward.others.items()}
    for name, r in scores.items():
        found = _classifier(s, r, mesh, config.vocab_size)
        if found is not None:
            held[name] = bytes_of(found[1])
            phases[f"score by {name}"] = _score_bytes(w, r, *found)
    with jax.set_mesh(mesh):
        phases["sample"], _ = _rollout_bytes(w, reference["decoder"], s.sampling.batch_size)
        kv = 0
        if s.method.name != "bon":
            kv = _training(w, held, phases)
    return Need(held, phases, kv)


def _score_bytes(w: _World, r: Any, config: Any, params: Any) -> int:
    """One call of a reward model."""
    s = w.settings
    if r.path:  # by text, some rows at a time
        rows, length = TEXT_ROWS, r.max_tokens or config.positions
    else:
        rows, length = s.train.batch_size, w.prompt + s.sampling.max_new_tokens
    batch = _abstract((_shape(rows, length), _shape(rows, length, dtype=bool)), w.mesh, "batch")
    lowered = classifier.score.lower(params, *batch, config=config, kind="logit", label=0)
    return _new_bytes(lowered.compile())


def _rollout_bytes(w: _World, params: Any, rows: int) -> tuple[int, int]:
    """A rollout; and of that the cache of keys and values."""
    s, length = w.settings, w.prompt + w.settings.sampling.max_new_tokens
    shapes = (_shape(rows, w.prompt), _shape(rows, w.prompt, dtype=bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    batch = _abstract((*shapes, keys), w.mesh, "batch")
    lowered = decode.rollout.lower(
        params, *batch, np.float32(s.sampling.temperature), config=w.config,
        max_new_tokens=s.sampling.max_new_tokens, eos_id=0 if s.sampling.stop_at_eos else None,
        pad_id=0,
    )  # fmt: skip
    slots = jax.eval_shape(partial(cache.init, w.config, rows, length))
    return _new_bytes(lowered.compile()), bytes_of(_abstract(slots, w.mesh, "cache"))


def _training(w: _World, held: dict[str, int], phases: dict[str, int]) -> int:
    """Adds what stage ``train`` holds and its phases; returns the cache's bytes."""
    s = w.settings
    method = methods.spec(s)
    network, value_config = None, None
    if s.train.value_network == "reward" and methods.has_values(method):
        found = _classifier(s, s.reward, w.mesh, w.config.vocab_size)
        assert found is not None  # constraints: no callable
        value_config = inputs.arithmetic(s, found[0])
        head = {"kernel": _shape(value_config.width, 1, dtype=jnp.float32),
                "bias": _shape(1, dtype=jnp.float32)}  # fmt: skip
        network = {"decoder": found[1]["decoder"], "head": head}
    make = methods.maker(s, method, w.config, s.prompts.train)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state = jax.eval_shape(make, w.reference["decoder"], network, key)
    except ValueError as error:
        raise InputError(str(error)) from error
    state = _abstract(state, w.mesh)
    held["trained"] = bytes_of(state.params)
    held["optimizer"] = bytes_of(state.opt_state)
    if method.name in OFFLINE:
        phases["gradient steps"] = _offline_bytes(w, method, state, held)
        return 0
    own = methods.online(s, method, w.config, s.prompts.train, value_config)
    rows = s.train.batch_size
    policy = trainable.join(w.reference["decoder"], state.params["decoder"])
    rollout, kv = _rollout_bytes(w, policy, rows)
    table = _abstract(_references(s), w.mesh)
    held["reference rewards"] = bytes_of(table)
    batch = _abstract(_batch(w, rows), w.mesh, "batch")
    batches = tuple(batch for _ in own.sources)
    phases["rollout"] = rollout + bytes_of(batch) * (len(batches) - 1)
    scalar = _shape(dtype=jnp.float32)
    program = jax.jit(own.iteration, donate_argnums=0)
    compiled = program.lower(state, w.reference, batches, table, scalar, scalar).compile()
    phases["update"] = _new_bytes(compiled) + bytes_of(batches)
    return kv


def _references(s: Settings) -> References:
    """The table of reference rewards, in shapes."""
    one = references(
        np.arange(s.samples.m, dtype=np.float32)[None], s.method.estimator,
        np.zeros((1, s.samples.m), np.uint32) if s.method.ties == "order" else None,
    )  # fmt: skip

    def of_all(x: Any) -> jax.ShapeDtypeStruct:
        lead = (s.prompts.train,) if np.ndim(x) else ()
        return jax.ShapeDtypeStruct((*lead, *np.shape(x)[1:]), jnp.result_type(x))

    return jax.tree.map(of_all, one)


def _batch(w: _World, rows: int) -> ppo.RolloutBatch:
    """A scored rollout, in shapes."""
    new = w.settings.sampling.max_new_tokens

    def of(*shape: int, dtype: Any = jnp.int32) -> Any:
        return _shape(rows, *shape, dtype=dtype)

    rollout = decode.Rollout(
        of(new), of(new, dtype=bool), of(new, dtype=jnp.float32), of(dtype=bool)
    )
    return ppo.RolloutBatch(
        of(w.prompt), of(w.prompt, dtype=bool), rollout, of(dtype=jnp.float32), of()
    )


def _offline_bytes(w: _World, method: methods.Spec, state: Any, held: dict[str, int]) -> int:
    """The steps of an offline method; its pool of samples is held."""
    s = w.settings
    new = s.sampling.max_new_tokens
    rows, length = s.prompts.train * s.samples.m, w.prompt + new
    pool = _abstract(
        offline.Pool(
            _shape(rows, length), _shape(rows, length, dtype=bool), _shape(rows, new, dtype=bool),
            _shape(rows, dtype=jnp.float32),
        ),
        w.mesh,
    )  # fmt: skip
    held["pool of samples"] = bytes_of(pool)
    many = (min(methods.STEPS, methods.offline_steps(s, s.prompts.train)), s.offline.batch_size)
    chosen = offline.Choices(_shape(*many), _shape(*many), _shape(*many, dtype=jnp.float32))
    plan = offline.OfflinePlan(method.name, s.sampling.temperature, s.memory.chunk)
    tx, _ = methods.optimizer(s, method, s.prompts.train)
    base = None if inputs.trained(s).whole else w.reference["decoder"]
    step = partial(offline.steps, config=w.config, plan=plan, optimizer=tx)
    scalar = _shape(dtype=jnp.float32)
    program = jax.jit(step, donate_argnums=0)
    return _new_bytes(program.lower(state, pool, chosen, scalar, scalar, base).compile())


def device_bytes(s: Settings) -> int:
    """What a device has: ``memory.device_gib``, or what this machine's first device, or on CPU the
    machine itself, reports."""
    if s.memory.device_gib:
        return int(s.memory.device_gib * GIB)
    stats = jax.devices()[0].memory_stats() or {}
    pages: Callable[[str], int] = os.sysconf
    return int(stats.get("bytes_limit", pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES")))


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
    else:
        phase = max(found.phases, key=found.phases.__getitem__)
        what = f"the phase {phase!r}"
        small = {"sample": "lower sampling.batch_size", "rollout": "lower train.batch_size"}
        advice = small.get(
            phase, "raise memory.accumulate, set memory.remat=full, lower memory.chunk"
        )
    return (
        f"does not fit: {found.peak / GIB:.2f} GiB a device are needed and there are "
        f"{limit / GIB:.2f}; {what} is too large: {advice}"
    )


def tables(found: Need, mesh: Mesh, limit: int) -> Sequence[Table]:
    """What ``vbon plan`` prints."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    held = Table(title=f"held by each device ({shape})")
    phases = Table(title="on top of that, by phase")
    for table, rows in ((held, found.held), (phases, found.phases)):
        table.add_column("what")
        table.add_column("MiB", justify="right")
        for name, size in rows.items():
            table.add_row(name, f"{size / 2**20:,.1f}")
    held.add_section()
    held.add_row("together", f"{sum(found.held.values()) / 2**20:,.1f}")
    if found.cache:
        phases.add_section()
        phases.add_row("keys and values, in rollout", f"{found.cache / 2**20:,.1f}")
    phases.add_section()
    phases.add_row(f"peak of {limit / 2**20:,.0f}", f"{found.peak / 2**20:,.1f}")
    return held, phases
