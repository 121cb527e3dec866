"""Every method as the settings describe it: its first state, its optimizer, the step of its loop.

A method is trained alone (``single``) or as a population of its values and seeds (``population``);
both go through ``training.loop.run``.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.config import OFFLINE, Settings
from vbon_jax.data import samples as reference_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.errors import InputError
from vbon_jax.models import heads, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.rl import preference
from vbon_jax.sampling import responses
from vbon_jax.sampling import sampler as engine
from vbon_jax.stages import inputs
from vbon_jax.stages.inputs import Decoder, Run
from vbon_jax.training import bond, loop, offline, population, ppo, state
from vbon_jax.training.loop import Step, World
from vbon_jax.training.population import Member

STEPS = 10  # gradient steps of an offline method between two looks at the host
OBJECTIVES = {"ppo": "reward", "bond": "backward"}  # of bon.distribution; vbon chooses its own


class Spec(NamedTuple):
    """A method with what is structure in it: everything but n, beta, m and the seed.

    variant: the objective of vbon, the form of bond; nothing to the others.
    """

    name: str
    variant: str
    estimator: str


class Online(NamedTuple):
    """iteration: (state, reference params, batches, references, n, beta) -> (state, metrics);
    sources: which parameters respond; learning_rate: of an iteration, for the log."""

    iteration: Callable[..., Any]
    sources: tuple[str, ...]
    learning_rate: Callable[[int], float]


def spec(s: Settings) -> Spec:
    """The method of ``method.name``."""
    variant = s.bond.form if s.method.name == "bond" else s.method.objective
    return Spec(s.method.name, variant, s.method.estimator)


def _jeffreys(method: Spec) -> bool:
    return method == ("bond", "jeffreys", method.estimator)


def iterations(s: Settings, method: Spec, prompts: int) -> int:
    """Passes of the loop. What the last one of an offline method does beyond ``offline_steps`` has
    a learning rate of 0."""
    if method.name not in OFFLINE:
        return s.train.iterations
    return -(-offline_steps(s, prompts) // STEPS)


def offline_steps(s: Settings, prompts: int) -> int:
    """Gradient steps of an offline method.

    Raises InputError where a batch is larger than all pairs together.
    """
    pairs = prompts * s.offline.pairs
    if pairs < s.offline.batch_size:
        raise InputError(
            f"offline.batch_size={s.offline.batch_size} is more than the {pairs} pairs of "
            f"{prompts} prompts x offline.pairs={s.offline.pairs}: lower it"
        )
    return s.offline.epochs * (pairs // s.offline.batch_size)


def optimizer(
    s: Settings, method: Spec, prompts: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with a rate that falls linearly to 0 over all gradient steps, and that schedule."""
    t = s.train
    epochs = 1 if _jeffreys(method) else t.ppo_epochs
    updates = t.iterations * epochs * (t.batch_size // t.minibatch_size)
    rate = t.learning_rate
    if method.name in OFFLINE:
        updates, rate = offline_steps(s, prompts), s.offline.learning_rate
    schedule = optax.linear_schedule(rate, 0.0, updates)
    tx = state.adamw(
        schedule, t.adam_eps, t.weight_decay, t.max_grad_norm, s.memory.optimizer_dtype
    )
    return tx, schedule


def has_values(method: Spec) -> bool:
    """Whether a method learns values beside its policy."""
    return method.name not in OFFLINE and not _jeffreys(method)


def first_state(
    s: Settings,
    method: Spec,
    reference: Decoder,
    key: jax.Array,
    prompts: int,
    value: inputs.ValueNetwork | None = None,
) -> state.TrainState:
    """The policy before its first step: of the reference's weights those that are trained, in
    arrays of their own. ``value``: what a value network of its own starts from.

    Raises InputError where the model has not the layers or projections that are to be trained.
    """
    make = maker(s, method, reference.config, prompts)
    network = None if value is None or not has_values(method) else value.params
    base = reference.params["decoder"]
    try:
        like = jax.eval_shape(make, base, network, key)
    except ValueError as error:
        raise InputError(str(error)) from error
    mesh = jax.sharding.get_mesh()
    to = None if mesh.empty else sharding.shardings(like, mesh)
    return jax.jit(make, out_shardings=to)(base, network, key)


def maker(
    s: Settings, method: Spec, config: DecoderConfig, prompts: int
) -> Callable[[Any, Any, jax.Array], state.TrainState]:
    """(the reference's tree, a value network's or None, key) -> the first state; pure."""
    tx, _ = optimizer(s, method, prompts)
    what, dtype = inputs.trained(s), s.memory.param_dtype

    def make(base: Any, network: Any, key: jax.Array) -> state.TrainState:
        params: dict[str, Any] = {"decoder": trainable.start(base, what, key, dtype)}
        if has_values(method):
            params["value"] = {"head": heads.init_value(config, key)}
        if network is not None:
            params["value"] = jax.tree.map(lambda x: jnp.array(x, dtype), network)
        fresh = state.create(params, tx, key)
        if _jeffreys(method):  # the optimizer does not see the anchor
            fresh = fresh._replace(
                params=params | {"anchor": jax.tree.map(jnp.copy, params["decoder"])}
            )
        return fresh

    return make


def world(run: Run, method: Spec) -> World:
    """What training reads from the workdir."""
    s = run.settings
    tokenizer = inputs.load_tokenizer(run)
    prompts = inputs.load_prompts(run, "train")
    reference = inputs.load_reference(run)
    sampling = inputs.sampling(run, tokenizer)
    samples = reference_files.samples_of(run.workdir.train_samples, prompts, s.samples.m)
    return World(
        prompts,
        inputs.references(run, tokenizer, samples, s.samples.m, method.estimator),
        inputs.load_reward(run, tokenizer),
        lambda ids: responses.response_text(tokenizer, ids, sampling.eos_id),
        sampling,
        run.mesh,
        reference.params,
        reference.config,
    )


def online(
    s: Settings, method: Spec, config: Any, prompts: int, value_config: Any = None
) -> Online:
    """An online method's iteration; ``value_config``: of a value network of its own."""
    t = s.train
    tx, schedule = optimizer(s, method, prompts)
    if _jeffreys(method):
        plan = bond.BondPlan(
            s.bond.jeffreys, s.bond.anchor_rate, s.bond.beta, t.minibatch_size,
            s.sampling.temperature, method.estimator, s.memory.chunk,
        )  # fmt: skip

        def iterate_bond(state, reference, batches, references, n, beta):
            del beta  # J-BOND has its own
            return bond.iteration(
                state, reference, batches, references, n, config=config, plan=plan, optimizer=tx
            )

        a_step = t.batch_size // t.minibatch_size
        return Online(iterate_bond, bond.SOURCES, lambda step: float(schedule(step * a_step)))
    ppo_plan = ppo.PPOPlan(
        objective=OBJECTIVES.get(method.name, method.variant),
        estimator=method.estimator,
        epochs=t.ppo_epochs,
        minibatch_size=t.minibatch_size,
        clip_policy=t.clip_policy,
        clip_value=t.clip_value,
        value_coef=t.value_coef,
        gamma=t.gamma,
        lam=t.lam,
        whiten=t.whiten,
        penalty=t.penalty,
        temperature=s.sampling.temperature,
        accumulate=s.memory.accumulate,
        chunk=s.memory.chunk,
    )

    def iterate_ppo(state, reference, batches, references, n, beta):
        return ppo.iteration(
            state, reference, batches[0], references, n, beta,
            config=config, plan=ppo_plan, optimizer=tx, value_config=value_config,
        )  # fmt: skip

    a_step = t.ppo_epochs * (t.batch_size // t.minibatch_size)
    return Online(iterate_ppo, loop.POLICY, lambda step: float(schedule(step * a_step)))


def offline_pass(
    s: Settings, method: Spec, config: DecoderConfig, prompts: int
) -> Callable[..., Any]:
    """An offline method's gradient steps, as of ``offline.steps``: (state, pool, choices, beta,
    alpha, base) -> (state, metrics)."""
    plan = offline.OfflinePlan(method.name, s.sampling.temperature, s.memory.chunk)
    tx, _ = optimizer(s, method, prompts)
    return partial(offline.steps, config=config, plan=plan, optimizer=tx)


def single(run: Run, w: World) -> tuple[state.TrainState, Step]:
    """First state, on the mesh, and step of the one policy of ``method``."""
    s, method = run.settings, spec(run.settings)
    reference = Decoder(w.config, w.reference)
    value = inputs.load_value(run, w.config) if has_values(method) else None
    fresh = first_state(s, method, reference, run.key("train"), len(w.prompts), value)
    if method.name in OFFLINE:
        member = Member(s.method.n, s.method.beta, s.seed, s.samples.m)
        return fresh, _offline_step(run, w, method, [member], alone=True)
    own = online(s, method, w.config, len(w.prompts), None if value is None else value.config)
    table = sharding.place(w.references, run.mesh)
    n, beta = (sharding.place(jnp.float32(v), run.mesh) for v in (s.method.n, s.method.beta))

    def update(state, batches):
        return own.iteration(state, w.reference, batches, table, n, beta)

    return fresh, loop.online(
        w, update, own.sources, s.train.batch_size, s.seed, run.key("rollout"), own.learning_rate
    )


def many(
    run: Run, w: World, method: Spec, members: Sequence[Member], at_once: int
) -> tuple[state.TrainState, Step]:
    """First state and step of a population; see ``training.population``.

    Args:
      w: its references may stand for each member, [K, P, M].
      members: as many as the devices can share evenly.
    """
    s = run.settings
    reference = Decoder(w.config, w.reference)
    keys = jnp.stack([run.key("train", m.seed) for m in members])
    value = inputs.load_value(run, w.config) if has_values(method) else None
    one = first_state(s, method, reference, keys[0], len(w.prompts), value)
    states = population.repeated(one, keys, run.mesh)
    if method.name in OFFLINE:
        return states, _offline_step(run, w, method, members, alone=False, at_once=at_once)
    own = online(s, method, w.config, len(w.prompts), None if value is None else value.config)
    rollout_keys = jnp.stack([run.key("rollout", m.seed) for m in members])
    return states, population.online(
        w, own.iteration, own.sources, members, rollout_keys, s.train.batch_size, at_once,
        own.learning_rate,
    )  # fmt: skip


def _pool(run: Run, w: World) -> tuple[offline.Pool, np.ndarray, np.ndarray | None, np.ndarray]:
    """The stored samples on the mesh; of them on the host, rewards [P, M], places in the total
    order [P, M] (None where ties are broken at random) and log pi_ref [N]."""
    s = run.settings
    tokenizer = inputs.load_tokenizer(run)
    samples = reference_files.samples_of(run.workdir.train_samples, w.prompts, s.samples.m)
    rows = offline.build_pool(
        samples, w.prompts, partial(tokenizers.encode, tokenizer), s.samples.m,
        w.sampling.max_new_tokens, engine.bucket_length(max(len(p.tokens) for p in w.prompts)),
        w.sampling.pad_id, w.sampling.eos_id,
    )  # fmt: skip
    # Of the sampled ids themselves: encoded texts may have others.
    stored = [x.log_probs for x in samples if x.log_probs and x.response_tokens]
    if len(stored) == len(samples):
        log_ref = np.array([row[: s.samples.m] for row in stored], np.float32).ravel()
    else:
        log_ref = offline.log_ref(
            w.reference, *rows, s.sampling.batch_size, config=w.config,
            temperature=s.sampling.temperature,
        )  # fmt: skip
    pool = sharding.place(offline.Pool(*rows, log_ref), run.mesh)
    order = None
    if s.method.ties == "order":
        order = inputs.orders(run, tokenizer, samples, s.samples.m)
    return pool, reference_files.rewards(samples, s.samples.m), order, log_ref


def _offline_step(
    run: Run,
    w: World,
    method: Spec,
    members: Sequence[Member],
    alone: bool,
    at_once: int = 1,
) -> Step:
    """The step of an offline method: STEPS gradient steps on the pairs of each member."""
    s = run.settings
    o, prompts = s.offline, len(w.prompts)
    pool, rewards, order_PxM, log_ref = _pool(run, w)
    one_pass = offline_pass(s, method, w.config, prompts)
    _, schedule = optimizer(s, method, prompts)
    total = offline_steps(s, prompts)
    width = min(STEPS, total)  # one program, also for the last pass
    chosen = [
        offline.choices(
            method.name, rewards, n=int(m.n), pairs=o.pairs, responses=o.responses, labels=o.labels,
            seed=m.seed, order_PxM=order_PxM,
        )
        for m in members
    ]  # fmt: skip
    betas, alphas = [], []
    for m, c in zip(members, chosen):
        beta, alpha = m.beta, 0.0
        if method.name == "bonbon":
            beta = preference.bonbon_beta(int(m.n))
            alpha = preference.bonbon_alpha(float(-np.mean(log_ref[c.best_E])), beta)
        betas.append(beta)
        alphas.append(alpha)
    order = partial(offline.epoch_order, prompts * o.pairs, o.batch_size)
    a_pass = prompts * o.pairs // o.batch_size

    def rows_of(member: int, step: int) -> offline.Choices:
        at = np.arange(step * width, (step + 1) * width)
        orders = {int(e): order(int(e), members[member].seed) for e in set(at // a_pass)}
        examples = np.stack([orders[int(i // a_pass)][i % a_pass] for i in at])
        return offline.Choices(*(x[examples] for x in chosen[member]))

    base = None if inputs.trained(s).whole else w.reference["decoder"]

    def steps(shared, state, choices, beta, alpha):
        pool, base = shared
        return one_pass(state, pool, choices, beta, alpha, base)

    if alone:
        update: Callable[..., Any] = jax.jit(steps, donate_argnums=1)
        scalars = (jnp.float32(betas[0]), jnp.float32(alphas[0]))
    else:

        def guarded(shared, state, choices, beta, alpha):
            new, metrics = steps(shared, state, choices, beta, alpha)
            return population.keep_finite(state, new, metrics)

        update = population.over_members(guarded, run.mesh, at_once, donate=True)
        scalars = sharding.place(
            (np.array(betas, np.float32), np.array(alphas, np.float32)), run.mesh, population.AXIS
        )

    def one(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        began = time.monotonic()
        rows = [rows_of(i, step) for i in range(len(members))]
        if alone:
            choices = rows[0]
        else:
            stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
            choices = sharding.place(stacked, run.mesh, population.AXIS)
        state, metrics = update((pool, base), state, choices, *scalars)
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        values["learning_rate"] = float(schedule(step * width))
        values["seconds_update"] = time.monotonic() - began
        return state, values, f"loss {np.mean(values['loss']):.4f}"

    return one
