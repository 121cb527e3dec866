"""What a run will need of each device: the bytes its own programs hold, allocate and send.

Nothing is loaded and nothing runs: the programs are compiled for the abstract arrays of ``shapes``
with the shardings they will have, and the compiler says what it would allocate.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vbon_jax import compiled, methods, sharding
from vbon_jax.config import Config, Reward, RewardPart
from vbon_jax.errors import InputError
from vbon_jax.methods import learning, starting
from vbon_jax.methods.learning import Job
from vbon_jax.models import cache, trainable
from vbon_jax.rewards import classifier, text
from vbon_jax.sampling import decode, pages, slots
from vbon_jax.stages import flops, loading, shapes
from vbon_jax.stages.shapes import World, abstract, bytes_of, shape
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training import offline
from vbon_jax.training.learner import Program
from vbon_jax.training.options import microbatches

TEXT_ROWS = 32  # rows a text reward scores at once


class Need(NamedTuple):
    """What each device needs: bytes of memory and of what it sends, operations.

    Attributes:
      held: bytes held throughout stage ``train``, by name.
      phases: peak bytes of each phase beyond those, by name.
      sample: peak bytes of stage ``sample``.
      cache: of the phase "rollout", its keys and values.
      sent: bytes that each device sends to others in a phase, once for each run of it, by name.
      flops: floating-point operations of each device by the formulas of ``flops``, if all devices
        share the work evenly: of stage ``sample`` and of an iteration of stage ``train``.
    """

    held: dict[str, int]
    phases: dict[str, int]
    sample: int
    cache: int
    sent: dict[str, float]
    flops: dict[str, float]

    @property
    def train(self) -> int:
        """What stage ``train`` holds, and its greediest phase."""
        return sum(self.held.values()) + max(self.phases.values(), default=0)

    @property
    def peak(self) -> int:
        """Of the greedier stage."""
        return max(self.sample, self.train)


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
    w = shapes.world(s, mesh, made)
    held = {"reference": bytes_of(w.reference)}
    phases: dict[str, int] = {}
    with jax.set_mesh(mesh):
        sample = _sampling(w, held)
        cached = 0 if s.method.name == methods.BEST_OF_N else _training(w, held, phases)
    return Need(held, phases, sample, cached, w.sent, w.flops)


def _sampling(w: World, held: dict[str, int]) -> int:
    """Adds the rewards to what is held; returns all that stage ``sample`` needs."""
    s = w.settings
    on_top, rows = [0], s.sampling.batch_size
    for name, r in shapes.scores(s).items():
        found = shapes.classifier_of(w, r)
        if found is not None:
            held[name] = bytes_of(found[1])
            on_top.append(
                0 if s.samples.path else _score_bytes(w, r, *found, rows, f"sample, {name}")
            )
    if not s.samples.path:  # samples made elsewhere are only copied
        params = w.reference["decoder"]
        asked = min(s.samples.prompts or w.prompts, w.prompts)
        on_top.append(_slots_bytes(w, params, rows, asked, s.samples.m, "sample, a page")[0])
        work = flops.draw(w.config, asked, s.samples.m, w.prompt, s.sampling.max_new_tokens)
        w.flops["stage sample, all of it"] = sum(work.values()) / w.mesh.size
    return sum(held.values()) + max(on_top)


def _score_bytes(
    w: World, r: Reward | RewardPart, config: Any, params: Any, rows: int, phase: str
) -> int:
    """Bytes of one call of a reward model.

    A text that is re-tokenized is taken to have as many tokens as the policy's: more is not known.
    """
    length = w.columns
    if r.path:
        rows, length = TEXT_ROWS, text.bucket(length, r.max_tokens or config.positions)
    batch = abstract((shape(rows, length), shape(rows, length, dtype=bool)), w.mesh, "batch")
    traced = classifier.score.trace(params, *batch, config=config, kind="logit", label=0)
    return _new_bytes(w, traced, phase)


def _slots_bytes(
    w: World, params: Any, rows: int, prompts: int, each: int, phase: str
) -> tuple[int, int]:
    """Slots for ``each`` responses to prompts, and a page of them; of that keys and values."""
    s = w.settings
    new, ends = s.sampling.max_new_tokens, (0,) if s.sampling.stop_at_eos else ()
    ways = sharding.ways(w.mesh)
    slotted = pages.shape_for(rows, prompts, each, w.prompt, new, ways)
    setup = slots.Setup(w.config, slotted, decode.Limits(new, ends, pad_id=0))
    state = abstract(jax.eval_shape(partial(slots.empty, setup)), w.mesh, "slots")
    many = ways * slotted.prompts
    page = (shape(many, w.prompt), shape(many, w.prompt, dtype=bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), slotted.page))
    prompts, keys, real = abstract((page, keys, shape(ways, dtype=jnp.int32)), w.mesh, "batch")
    one = np.int32(1)
    traced = (
        slots.supply.trace(state, params, prompts, keys, one, real, setup=setup),
        slots.draw.trace(state, params, np.float32(1), one, one, setup=setup),
    )
    kept = [(x.k, x.v) for x in (state.store, state.held, state.rows)]
    return bytes_of(state) + max(_new_bytes(w, x, phase) for x in traced), bytes_of(kept)


def _rollout_bytes(
    w: World, params: Any, rows: int, each: int, likeliest: int = 0, trunk_layers: int = 0
) -> tuple[int, int]:
    """A rollout of ``each`` rows a prompt; and of that the cache of keys and values."""
    s, prompts = w.settings, rows // each
    page = (shape(prompts, w.prompt), shape(prompts, w.prompt, dtype=bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    batch = abstract((*page, keys), w.mesh, "batch")
    ends = (0,) if s.sampling.stop_at_eos else ()
    traced = decode.rollout.trace(
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
    kept_bytes = sum(bytes_of(abstract(x, w.mesh, "cache")) for x in kept)
    return _new_bytes(w, traced, "rollout"), kept_bytes


def _training(w: World, held: dict[str, int], phases: dict[str, int]) -> int:
    """Adds what stage ``train`` holds and its phases; returns the cache's bytes."""
    s = w.settings
    method = methods.of_config(s)
    value = shapes.value_network(w) if s.train.value_network == "reward" and method.values else None
    job = Job(method, method.from_config(s), loading.training(s), w.config, w.prompts, value)
    network = None if value is None else value.params
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state = jax.eval_shape(job.make_state(), w.reference["decoder"], network, key)
    except ValueError as error:
        raise InputError(str(error)) from error
    state = abstract(state, w.mesh)
    table = abstract(shapes.references_of(w), w.mesh)
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
    for name, r in shapes.scores(s).items():
        found = shapes.classifier_of(w, r)
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
    _operations(w, job, own)
    batch = abstract(shapes.batch_of(w, rows, own), w.mesh, "batch")
    batches = tuple(batch for _ in own.sources)
    phases["rollout"] = rollout + bytes_of(batches[1:])
    scalar = shape(dtype=jnp.float32)
    program = jax.jit(own.update, donate_argnums=0)
    traced = program.trace(state, w.reference, batches, table, scalar, scalar)
    step = s.train.minibatch_size // microbatches(s.train, s.memory)
    phases["update"] = _new_bytes(w, traced, "update") + bytes_of(batches) + w.packing(step)
    return kv


def _operations(w: World, job: Job, program: Program) -> None:
    """Adds those of an iteration; of an update only where there is a formula for it."""
    new, sources = w.settings.sampling.max_new_tokens, len(program.sources)
    prompts = program.batch_size // program.group
    work = flops.draw(w.config, prompts, program.group, w.prompt, new)
    parts = {f"rollout, {name}": sources * count for name, count in work.items()}
    if job.objective:
        parts |= {f"update, {x}": count for x, count in flops.update(job, w.prompt, new).items()}
    w.flops.update({name: count / w.mesh.size for name, count in parts.items()})


def _start(w: World, job: Job, after: int) -> int:
    """What the training that a policy starts with takes beyond the ``after`` bytes that follow."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(job.make_state(), w.reference["decoder"], None, key)
    state = abstract(state, w.mesh)
    held: dict[str, int] = {"state": bytes_of(state)}
    phases: dict[str, int] = {}
    _offline(w, job, state, held, phases)
    return max(0, sum(held.values()) + max(phases.values()) - after)


def _offline(w: World, job: Job, state: Any, held: dict[str, int], phases: dict[str, int]) -> None:
    """Adds the steps of an offline method, and its pool of samples, which is held."""
    s = w.settings
    rows, new = w.prompts * s.samples.m, s.sampling.max_new_tokens
    pool = offline.Pool(
        shape(rows, w.columns), shape(rows, w.columns, dtype=bool), shape(rows, new, dtype=bool),
        shape(rows, dtype=jnp.float32), s.sampling.temperature,
    )  # fmt: skip
    pool = abstract(pool, w.mesh)
    held["pool of samples"] = bytes_of(pool)
    if s.samples.path:  # made elsewhere: they may lack their log pi_ref
        arrays = (pool.tokens_NxS, pool.mask_NxS, pool.response_mask_NxT)
        few = [shape(s.sampling.batch_size, *x.shape[1:], dtype=x.dtype) for x in arrays]
        scored = jax.jit(
            partial(offline.log_prob, config=w.config, temperature=s.sampling.temperature)
        )
        phases["log pi_ref"] = _new_bytes(w, scored.trace(w.reference, *few), "log pi_ref")
    many = (min(learning.STEPS, job.offline_steps), s.offline.batch_size)
    chosen = offline.Choices(shape(*many), shape(*many), shape(*many, dtype=jnp.float32))
    base = None if job.training.trained.whole else w.reference["decoder"]
    scalar = shape(dtype=jnp.float32)
    program = jax.jit(partial(offline.steps, setup=job.offline_setup()), donate_argnums=0)
    traced = program.trace(state, pool, chosen, scalar, scalar, base)
    phases["gradient steps"] = _new_bytes(w, traced, "gradient steps") + w.packing(
        2 * s.offline.batch_size
    )


def _new_bytes(w: World, traced: jax.stages.Traced, phase: str) -> int:
    """What a program allocates beside its arguments, bytes a device; adds what it sends."""
    # Memory is settled before machine code is made, which on CPU need not be good for this.
    options: Any = {"xla_backend_optimization_level": 0} if w.platform == "cpu" else None
    program = traced.lower().compile(compiler_options=options)
    if w.mesh.size > 1:
        sent = sum(c.moved * c.times for c in compiled.collectives(program.as_text() or ""))
        w.sent[phase] = w.sent.get(phase, 0.0) + sent
    stats: Any = program.memory_analysis()
    return int(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)
