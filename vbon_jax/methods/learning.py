"""Puts a method to work: its optimizer, first state and the step of the loop.

The same functions train one policy and a population of values and seeds, from the command line and
from Python.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.data import samples as sample_files
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import InputError
from vbon_jax.methods import bon_sft, judging
from vbon_jax.methods.base import Method, Offline, Online
from vbon_jax.methods.judging import Judge
from vbon_jax.models import family, heads, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.rl import prefix
from vbon_jax.sampling.sampler import named_key
from vbon_jax.training import loop, offline, options, policies, population, state
from vbon_jax.training.learner import Learner, Member, Program, prompt_length
from vbon_jax.training.loop import Step, Task
from vbon_jax.training.options import MUON, PREFIX, Lora, Memory, Train
from vbon_jax.training.options import Offline as OfflineKeys
from vbon_jax.training.population import PopulationLearner
from vbon_jax.training.references import orders
from vbon_jax.training.scoring import Setup
from vbon_jax.training.stored import Stored

STEPS = 10  # gradient steps of an offline method between two looks at the host
MOST_HELD_OUT = 64  # prompts


@dataclasses.dataclass(frozen=True)
class Training:
    """How a policy is trained, whatever the method.

    Attributes:
      train: hyperparameters of PPO and of the loop.
      offline: of the methods that learn from stored samples.
      lora: adapters.
      memory: dtypes and microbatches.
      score_batch: responses whose log pi_ref is computed at once, where stored samples lack it.
    """

    train: Train = Train()
    offline: OfflineKeys = OfflineKeys()
    lora: Lora = Lora()
    memory: Memory = Memory()
    score_batch: int = 64

    @property
    def trained(self) -> trainable.Trainable:
        """What of the model is trained."""
        return trainable.Trainable(
            self.train.num_layers_unfrozen, self.lora.rank, self.lora.targets
        )


class ValueNetwork(NamedTuple):
    """What a value network of its own starts from, the reward model (Huang et al., 2024).

    Attributes:
      config: its decoder.
      params: {"decoder", "head"}.
    """

    config: DecoderConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """A method to be trained: everything but the data.

    Attributes:
      method: the record.
      options: the method's.
      training: how a policy is trained, whatever the method.
      config: the decoder of policy and reference.
      prompts: number of training prompts.
      value: what a value network of its own starts from; None for a value head or no values.
      from_store: whether an online method learns from stored samples in place of responses.
    """

    method: Method
    options: Any
    training: Training
    config: DecoderConfig
    prompts: int
    value: ValueNetwork | None = None
    from_store: bool = False

    def __post_init__(self) -> None:
        """Raises InputError where an online method lacks what its keys ask for."""
        if self.method.online:
            options.check_lookahead(self.training.train, self.options.ties)
            options.check_stored(self.training.train, self.objective, self.method.name)
            if not self.from_store:
                options.check_forward(self.training.train, self.objective)

    @property
    def iterations(self) -> int:
        """Passes of the loop.

        What the last one of an offline method does beyond ``offline_steps`` has a learning rate of
        0.
        """
        if self.method.online:
            return self.training.train.iterations
        return -(-self.offline_steps // STEPS)

    @property
    def offline_steps(self) -> int:
        """Gradient steps of an offline method.

        Raises:
          InputError: a batch is larger than all pairs together.
        """
        o = self.training.offline
        prompts = self.prompts - self.held_out
        pairs = prompts * o.pairs
        if pairs < o.batch_size:
            raise InputError(
                f"offline.batch_size={o.batch_size} is more than the {pairs} pairs of "
                f"{prompts} prompts x offline.pairs={o.pairs}: lower it"
            )
        return o.epochs * (pairs // o.batch_size)

    @property
    def objective(self) -> str:
        """Whose sequence reward an online method maximises; see ``methods.base.Online``."""
        assert isinstance(self.method.learns, Online)
        return self.method.learns.objective(self.options)

    @property
    def trunk_layers(self) -> int:
        """Frozen lower layers that a rollout runs for its update too.

        Stored samples lack them, and so do responses that take turns.
        """
        unfrozen = self.training.trained.layers
        frozen = unfrozen > 0 and not self.training.trained.rank
        own = not (self.training.train.replay or self.training.memory.rollout_rows)
        drawn = bool(self.objective) and own and not self.from_store
        return max(0, self.config.layers - unfrozen) if frozen and drawn else 0

    @property
    def reads_prefixes(self) -> bool:
        """Whether its values are those of a table by the rewards of prefixes."""
        train = self.training.train
        unread = train.baseline == "group"  # which would be paid for all the same
        return self.method.values and train.value_network == PREFIX and not unread

    @property
    def held_out(self) -> int:
        """Prompts, the last, whose samples judge what is learned from stored ones; 0 if none."""
        learns = self.method.learns
        judged = self.from_store if isinstance(learns, Online) else learns.weights is not None
        if not judged:
            return 0
        return min(self.prompts // 10, MOST_HELD_OUT)

    @property
    def likelihood(self) -> "Job":
        """Maximum likelihood on the best of n of the same samples, under the same training."""
        of = self.options
        own = bon_sft.BoNSFT(n=of.n, estimator=of.estimator, ties=of.ties)
        return dataclasses.replace(
            self, method=bon_sft.METHOD, options=own, value=None, from_store=False
        )

    @property
    def steps_an_iteration(self) -> int:
        """Gradient steps of an iteration of an online method."""
        assert isinstance(self.method.learns, Online)
        t = self.training.train
        rows = t.rows if self.objective else t.batch_size
        return self.method.learns.passes(t) * (rows // t.minibatch_size)

    @property
    def schedule(self) -> optax.Schedule:
        """A learning rate that falls linearly to 0 over all gradient steps, after its warm-up."""
        t, o = self.training.train, self.training.offline
        if self.method.online:
            each = self.steps_an_iteration
            fall = optax.linear_schedule(t.learning_rate, 0.0, (t.iterations - t.warmup) * each)
            rise = optax.linear_schedule(0.0, t.learning_rate, t.warmup * each)
            return optax.join_schedules([rise, fall], [t.warmup * each]) if t.warmup else fall
        return optax.linear_schedule(o.learning_rate, 0.0, self.offline_steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, or of an online method Muon, with that schedule."""
        t = self.training.train
        make = state.muon if t.optimizer == MUON and self.method.online else state.adamw
        return make(
            self.schedule, t.adam_eps, t.weight_decay, t.max_grad_norm,
            self.training.memory.optimizer_dtype,
        )  # fmt: skip

    def setup(self) -> Setup:
        """What an online method's update is compiled for."""
        assert isinstance(self.method.learns, Online)
        return Setup(
            self.config, self.optimizer, self.training.train, self.training.memory, self.objective,
            self.options.estimator, None if self.value is None else self.value.config,
            self.from_store, self.options.top if self.options.is_family else 0.0,
        )  # fmt: skip

    def program(self) -> Program:
        """What an online method computes each iteration."""
        assert isinstance(self.method.learns, Online)
        t, schedule, setup = self.training.train, self.schedule, self.setup()
        each = self.steps_an_iteration
        update = self.method.learns.build(self.options, setup)
        if t.average_half_life:
            update = policies.averaged(update, t.average_half_life)
        return Program(
            update,
            self.method.learns.sources,
            t.batch_size,
            lambda step: float(schedule(step * each)),
            t.group,
            prefixes=self.reads_prefixes,
            lookahead=t.lookahead if self.reads_prefixes else 0,
            replay=t.replay if self.objective else 0,
            trunk_layers=self.trunk_layers,
            from_store=self.prompts - self.held_out if self.from_store else 0,
            rows=self.training.memory.rollout_rows,
        )

    def offline_setup(self) -> offline.OfflineSetup:
        """What an offline method's gradient steps are compiled for."""
        assert isinstance(self.method.learns, Offline)
        return offline.OfflineSetup(
            self.config, self.optimizer, self.method.learns.loss, self.method.learns.pairs,
            self.training.memory.chunk,
        )  # fmt: skip

    def make_state(self) -> Callable[[Any, Any, jax.Array], state.TrainState]:
        """(the reference's tree, a value network's or None, key) -> the first state; pure."""
        tx, learns, training = self.optimizer, self.method.learns, self.training
        values, is_family = self.method.values, self.options.is_family
        width = self.config.width
        what, dtype = training.trained, training.memory.param_dtype

        def make(base: Any, network: Any, key: jax.Array) -> state.TrainState:
            own = trainable.start(base, what, key, dtype)
            params: dict[str, Any] = {"decoder": family.gated(own, width) if is_family else own}
            if values and not self.reads_prefixes:
                params["value"] = {"head": heads.init_value(self.config, key)}
            if network is not None:
                params["value"] = jax.tree.map(lambda x: jnp.array(x, dtype), network)
            fresh = state.create(params, tx, key)  # the optimizer does not see what is added here
            if isinstance(learns, Online) and learns.anchor:
                params = params | {"anchor": jax.tree.map(jnp.copy, params["decoder"])}
            if self.reads_prefixes:
                params = params | {"prefix": prefix.empty()}
            if self.held_out:
                params = params | {policies.BEST: policies.unjudged(params["decoder"])}
            if isinstance(learns, Online) and training.train.average_half_life:
                params = params | {policies.AVERAGE: jax.tree.map(jnp.copy, params["decoder"])}
            return fresh._replace(params=params)

        return make

    def first_state(self, base: Any, key: jax.Array) -> state.TrainState:
        """The policy before its first step, in arrays of its own, on the current mesh.

        Args:
          base: the reference's tree, of which what is trained is copied.
          key: of the run's training.

        Raises:
          InputError: the model has not the layers or projections that are to be trained.
        """
        make = self.make_state()
        network = None if self.value is None or not self.method.values else self.value.params
        try:
            like = jax.eval_shape(make, base, network, key)
        except ValueError as error:
            raise InputError(str(error)) from error
        mesh = jax.sharding.get_mesh()
        to = None if mesh.empty else sharding.shardings(like, mesh)
        return jax.jit(make, out_shardings=to)(base, network, key)


def single(
    job: Job, task: Task, member: Member, samples: Sequence[PromptSamples]
) -> tuple[state.TrainState, Step]:
    """First state, on the mesh, and step of one policy.

    Args:
      job: the method.
      task: what it learns from.
      member: its values and seed.
      samples: one a prompt, which offline methods learn from.
    """
    fresh = job.first_state(task.sampler.model.params, named_key(member.seed, "train"))
    if not job.method.online:
        return fresh, _offline_step(job, task, [member], samples, at_once=None)
    learner = Learner(task, job.program(), member, _stored(job, task, samples))
    return fresh, _online_step(job, learner, _judge(job, task, [member], samples, None))


def many(
    job: Job,
    task: Task,
    members: Sequence[Member],
    samples: Sequence[PromptSamples],
    at_once: int,
) -> tuple[state.TrainState, Step]:
    """First state and step of a population; see ``training.population``.

    Args:
      job: the method.
      task: its references may stand for each member, [K, P, M].
      members: as many as the devices can share evenly.
      samples: as for ``single``.
      at_once: members vmapped side by side on a device; 0 for all.
    """
    keys = jnp.stack([named_key(m.seed, "train") for m in members])
    one = job.first_state(task.sampler.model.params, keys[0])
    states = population.repeated(one, keys, task.sampler.mesh)
    if not job.method.online:
        return states, _offline_step(job, task, members, samples, at_once)
    stored = _stored(job, task, samples)
    learner = PopulationLearner(task, job.program(), members, at_once, stored)
    return states, _online_step(job, learner, _judge(job, task, members, samples, at_once))


def _online_step(job: Job, learner: Learner | PopulationLearner, judge: Judge | None) -> Step:
    assert isinstance(job.method.learns, Online)
    iteration = job.method.learns.iteration

    def one(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        state, values = iteration(learner, state, step)
        words = loop.note(values)
        if judge is not None:
            state, found = judge(state, step)
            values, words = values | found, words + judging.words(found)
        return state, values, words

    return one


def _judge(
    job: Job,
    task: Task,
    members: Sequence[Member],
    samples: Sequence[PromptSamples],
    at_once: int | None,
) -> Judge | None:
    """What ends an online method that learns from stored samples alone."""
    if not job.held_out:
        return None
    pool, log_ref = _pool(job, task, samples)
    m = task.references.rewards_PxM.shape[-1]
    order = orders(samples, m, task.sampler) if job.options.ties == "order" else None
    shared = (pool, None if job.training.trained.whole else task.reference["decoder"])
    rewards = sample_files.rewards(samples, m)
    return Judge(job.likelihood, shared, rewards, order, log_ref, members, at_once, job.iterations)


def _rows(
    task: Task, samples: Sequence[PromptSamples], m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and response mask of the stored samples; see ``offline.build_pool``."""
    sampler, settings = task.sampler, task.sampler.settings
    return offline.build_pool(
        samples, task.prompts, sampler.stored_ids, m, settings.max_new_tokens, prompt_length(task),
        settings.pad_id,
    )  # fmt: skip


def _stored(job: Job, task: Task, samples: Sequence[PromptSamples]) -> Stored | None:
    """The stored samples that an online method learns from beside its rollouts."""
    program, m = job.program(), task.references.rewards_PxM.shape[-1]
    if not program.replay and not program.from_store:
        return None
    key, count = ("group", program.group) if program.from_store else ("replay", program.replay)
    if count > m:
        raise InputError(
            f"train.{key}={count} is more than the m = {m} samples of each prompt: lower it, or "
            "sample more"
        )
    tokens, mask, response_mask = (x.reshape(-1, m, x.shape[-1]) for x in _rows(task, samples, m))
    rewards = sample_files.rewards(samples, m)
    return Stored(tokens, mask, response_mask, rewards, task.sampler.settings.temperature)


def _pool(
    job: Job, task: Task, samples: Sequence[PromptSamples]
) -> tuple[offline.Pool, np.ndarray]:
    """The stored samples on the mesh, and their log pi_ref [N] on the host."""
    sampler, settings = task.sampler, task.sampler.settings
    m = task.references.rewards_PxM.shape[-1]
    rows = _rows(task, samples, m)
    # Of the sampled ids themselves: encoded texts may have others.
    stored = [x.log_probs for x in samples if x.log_probs and x.response_tokens]
    if len(stored) == len(samples):
        log_ref = np.array([row[:m] for row in stored], np.float32).ravel()
    else:
        log_ref = offline.log_ref(
            task.reference, *rows, job.training.score_batch, config=job.config,
            temperature=settings.temperature,
        )  # fmt: skip
    pool = offline.Pool(*rows, log_ref, settings.temperature)
    return sharding.place(pool, sampler.mesh), log_ref


class _Examples:
    """The training examples of each member, in the order its gradient steps take them."""

    def __init__(self, job: Job, chosen: Sequence[offline.Choices], members: Sequence[Member]):
        o = job.training.offline
        self._chosen, self._members = chosen, members
        size = (job.prompts - job.held_out) * o.pairs
        self._order = partial(offline.epoch_order, size, o.batch_size)
        self._a_pass = size // o.batch_size
        self.width = min(STEPS, job.offline_steps)  # one program, also for the last pass

    def rows(self, member: int, step: int) -> offline.Choices:
        """Of the loop's pass ``step``: [width, batch_size]."""
        at = np.arange(step * self.width, (step + 1) * self.width)
        seed, a_pass = self._members[member].seed, self._a_pass
        orders = {int(e): self._order(int(e), seed) for e in set(at // a_pass)}
        examples = np.stack([orders[int(i // a_pass)][i % a_pass] for i in at])
        return offline.Choices(*(x[examples] for x in self._chosen[member]))


def _offline_step(
    job: Job,
    task: Task,
    members: Sequence[Member],
    samples: Sequence[PromptSamples],
    at_once: int | None,
) -> Step:
    """STEPS gradient steps on the examples of each member; ``at_once`` None: of the only one."""
    learns, mesh = job.method.learns, task.sampler.mesh
    assert isinstance(learns, Offline)
    pool, log_ref = _pool(job, task, samples)
    m = task.references.rewards_PxM.shape[-1]
    rewards = sample_files.rewards(samples, m)
    order_PxM = orders(samples, m, task.sampler) if job.options.ties == "order" else None
    kept = slice(len(rewards) - job.held_out)
    order_of_kept = None if order_PxM is None else order_PxM[kept]
    chosen = [learns.choose(rewards[kept], x, job.training.offline, order_of_kept) for x in members]
    weights = [
        learns.coefficients(x, float(-np.mean(log_ref[c.best_E])))
        for x, c in zip(members, chosen, strict=True)
    ]
    betas, alphas = (np.array(x, np.float32) for x in zip(*weights, strict=True))
    examples = _Examples(job, chosen, members)
    schedule = job.schedule
    base = None if job.training.trained.whole else task.reference["decoder"]
    one_pass = partial(offline.steps, setup=job.offline_setup())

    def steps(shared, state, choices, beta, alpha):
        pool, base = shared
        return one_pass(state, pool, choices, beta, alpha, base)

    def guarded(shared, state, choices, beta, alpha):
        new, metrics = steps(shared, state, choices, beta, alpha)
        return population.keep_finite(state, new, metrics)

    if at_once is None:
        update: Callable[..., Any] = jax.jit(steps, donate_argnums=1)
        scalars = (jnp.float32(betas[0]), jnp.float32(alphas[0]))
    else:
        update = population.over_members(guarded, mesh, at_once, donate=True)
        scalars = sharding.place((betas, alphas), mesh, population.AXIS)

    judge = None
    if job.held_out:
        judge = Judge(
            job, (pool, base), rewards, order_PxM, log_ref, members, at_once, job.iterations
        )

    def one(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        began = time.monotonic()
        rows = [examples.rows(i, step) for i in range(len(members))]
        if at_once is None:
            choices = rows[0]
        else:
            stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
            choices = sharding.place(stacked, mesh, population.AXIS)
        state, metrics = update((pool, base), state, choices, *scalars)
        values = {name: value.tolist() for name, value in sharding.fetch(metrics).items()}
        values["learning_rate"] = float(schedule(step * examples.width))
        words = f"loss {np.mean(values['loss']):.4f}"
        if judge is not None:
            state, found = judge(state, step)
            values, words = values | found, words + judging.words(found)
        values["seconds_update"] = time.monotonic() - began
        return state, values, words

    return one
