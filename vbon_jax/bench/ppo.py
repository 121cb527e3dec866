"""Seconds and floating-point rate of one vBoN iteration by phase, on random weights.

The operations counted are the multiplications and additions of matrix products with weights, those
that a phase cannot do without. So a phase's share of the machine's own rate is a lower bound.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bench.machine import Row
from vbon_jax.bench.models import GPT2_SMALL, block_products
from vbon_jax.bon import references
from vbon_jax.bon.references import References
from vbon_jax.methods import vbon
from vbon_jax.models import decoder, heads, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.models.trainable import Trainable
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.responses import Batch, Sampling, ScoredRollout
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training import scoring, state
from vbon_jax.training.options import Memory, Train
from vbon_jax.training.state import TrainState

N, BETA = 8.0, 1 / 7
experience = jax.jit(vbon.experience, static_argnames="setup")  # an update before its epochs
PHASES = ("rollout", "score", "epochs", "iteration")


@dataclasses.dataclass(frozen=True)
class Work:
    """Size of an iteration.

    Attributes:
      rows: responses per rollout.
      prompt: tokens per prompt.
      new: tokens per response; none ends before.
      epochs: PPO epochs.
      minibatch: responses per gradient step.
      group: responses to each prompt.
    """

    rows: int = 128
    prompt: int = 8
    new: int = 40
    epochs: int = 4
    minibatch: int = 32
    group: int = 1


class Arguments(NamedTuple):
    """What an iteration starts from, on a mesh: random weights, prompts and rewards.

    Attributes:
      sampler: the reference model under the sampling settings.
      state: the first state of training.
      requests: the responses to draw, those to a prompt beside each other.
      reward_B: float32 rewards, whatever the responses are.
      row_B: int32 rows of the prompts in ``table``.
      table: reference rewards of the prompts.
      n: of best-of-n, float32 scalar.
      beta: KL coefficient, float32 scalar.
    """

    sampler: Sampler
    state: TrainState
    requests: list[Request]
    reward_B: jax.Array
    row_B: jax.Array
    table: References
    n: jax.Array
    beta: jax.Array

    @property
    def reference(self) -> dict[str, Any]:
        """The reference's parameters, {"decoder": ...}."""
        return {"decoder": self.sampler.model.params}

    def draw(self, own: Any) -> Batch:
        """The rollout of the policy with trained parameters ``own``."""
        policy = trainable.join(self.sampler.model.params, own)
        return self.sampler.with_params(policy).draw(jax.random.key(3), 0, self.requests)

    def scored(self, batch: Batch) -> ScoredRollout:
        """The rollout with its rewards."""
        scores = (self.reward_B, self.row_B)
        return ScoredRollout(*batch.prompts, batch.rollout, *scores, batch.temperature)


def operations(config: DecoderConfig, work: Work, unfrozen: int, penalty: str) -> dict[str, float]:
    """Counts the floating-point operations of each phase.

    Args:
      config: the decoder of policy and reference.
      work: size of the iteration.
      unfrozen: upper blocks trained, -1 for the whole model.
      penalty: "sampled" or "full", as config key ``train.penalty``.

    Returns:
      Multiplications and additions of products with weights, attention scores left out, of
      "rollout", "score" and "epochs" (all gradient steps). A prompt is run once for its group.
    """
    c = config
    block = block_products(c)
    vocabulary = c.width * c.vocab_size
    whole = unfrozen == -1
    top = c.layers if whole else unfrozen
    drawn = work.rows * work.new
    all_tokens = drawn + work.rows // work.group * work.prompt
    # Forward pass of policy and reference on what the rollout tells of their frozen trunk.
    score = 2 * all_tokens * 2 * top * block + 2 * drawn * 2 * vocabulary
    # Of the policy's logits: forward, and backward into hidden states and, where it is trained,
    # the head. The full penalty computes the reference's logits again in each epoch.
    head_products = (3 if whole else 2) + (1 if penalty == "full" else 0)
    # Backward takes two products for each of the forward pass; none goes into the trunk.
    epoch = 2 * all_tokens * 3 * top * block + 2 * drawn * head_products * vocabulary
    return {
        "rollout": 2.0 * all_tokens * c.layers * block + 2.0 * drawn * vocabulary,
        "score": float(score),
        "epochs": float(work.epochs * epoch),
    }


def arguments(setup: scoring.Setup, work: Work, dtype: str) -> Arguments:
    """Makes what an iteration starts from.

    Args:
      setup: what the update is compiled for.
      work: size of the iteration.
      dtype: of frozen weights; what is trained is float32.
    """
    config, what = setup.config, Trainable(setup.train.num_layers_unfrozen)

    @jax.jit
    def make(key: jax.Array) -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), decoder.init(config, key))
        return trainable.divide(params, what, config.layers)

    base = make(jax.random.key(0))
    own = jax.jit(partial(trainable.start, what=what, key=jax.random.key(1)))(base)
    params = {"decoder": own, "value": {"head": heads.init_value(config, jax.random.key(1))}}
    first = state.create(params, setup.optimizer, jax.random.key(2))
    rng = np.random.default_rng(0)
    prompts = work.rows // work.group
    ids = rng.integers(0, config.vocab_size, (prompts, work.prompt)).tolist()
    table = references.references(rng.normal(size=(prompts, 64)).astype(np.float32), "interval")
    rewards = rng.normal(size=work.rows).astype(np.float32)
    mesh = sharding.make_mesh()
    model = LanguageModel(  # nothing here is text
        config, sharding.place(base, mesh, "decoder"), tokenizer=None
    )
    frozen = 0 if what.layers == -1 else config.layers - what.layers
    sampling = Sampling(1.0, work.new, end_ids=(), pad_id=0, trunk_layers=frozen)
    of_row = np.arange(work.rows, dtype=np.int32) // work.group
    return Arguments(
        Sampler(model, mesh, sampling),
        sharding.place(first, mesh),  # as the update leaves it, or its second call would compile
        [Request(int(i), s % work.group, tuple(ids[i])) for s, i in enumerate(of_row)],
        *sharding.place((rewards, of_row), mesh, "batch"),
        *sharding.place((table, jnp.float32(N), jnp.float32(BETA)), mesh),
    )


def _median(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call; called once before, untimed, to compile."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def iteration_times(
    config: DecoderConfig = GPT2_SMALL,
    work: Work = Work(),
    unfrozen: int = 2,
    penalty: str = "sampled",
    chunk: int = 1_024,
    remat: str = "none",
    dtype: str = "float32",
    repeats: int = 3,
) -> dict[str, dict[str, float]]:
    """Times one iteration of vBoN, n = 8, by phase. Compilation is not counted.

    Args:
      config: the decoder, whose weights are random.
      work: size of the iteration.
      unfrozen: upper blocks trained, -1 for the whole model.
      penalty: as config key ``train.penalty``.
      chunk: as config key ``memory.chunk``.
      remat: as config key ``memory.remat``.
      dtype: of frozen weights; what is trained is float32.
      repeats: times each phase is measured; the median counts.

    Returns:
      {"rollout" | "score" | "epochs" | "iteration": {"seconds", "operations", "rate"}}, the rate in
      operations per second. "score" is the forward pass of policy and reference over the rollout,
      with log F and advantages; "epochs" all gradient steps; the reward takes no time.
    """
    setup = scoring.Setup(
        dataclasses.replace(config, remat=remat),
        state.adamw(lambda step: 1e-5, 1e-5, 0.0, 1.0),
        Train(
            batch_size=work.rows, minibatch_size=work.minibatch, ppo_epochs=work.epochs,
            penalty=penalty, num_layers_unfrozen=unfrozen, group=work.group,
        ),
        Memory(chunk=chunk),
    )  # fmt: skip
    given = arguments(setup, work, dtype)
    with jax.set_mesh(given.sampler.mesh):
        seconds = _phase_seconds(given, setup, repeats)
    counted = operations(config, work, unfrozen, penalty)
    counted["iteration"] = sum(counted.values())
    return {
        phase: {
            "seconds": seconds[phase],
            "operations": counted[phase],
            "rate": counted[phase] / seconds[phase],
        }
        for phase in PHASES
    }


def _phase_seconds(given: Arguments, setup: scoring.Setup, repeats: int) -> dict[str, float]:
    """Median seconds of each phase, compilation not counted."""
    params, reference = given.state.params, given.reference
    scalars = (given.table, given.n, given.beta)
    rollout_s = _median(lambda: given.draw(params["decoder"]).rollout, repeats)
    batch = given.scored(given.draw(params["decoder"]))
    score_s = _median(lambda: experience(params, reference, batch, *scalars, setup=setup), repeats)
    train_state = given.state

    def update() -> Any:
        nonlocal train_state  # the one before is donated
        train_state, metrics = vbon.update(train_state, reference, (batch,), *scalars, setup=setup)
        return metrics

    update_s = _median(update, repeats)
    return {
        "rollout": rollout_s,
        "score": score_s,
        "epochs": update_s - score_s,
        "iteration": rollout_s + update_s,
    }


def rows(results: Mapping[str, Mapping[str, float]], what: str, peak: float) -> list[Row]:
    """Makes the lines of the table.

    Args:
      results: what `iteration_times` returns.
      what: was trained, such as "2 blocks".
      peak: the machine's rate, of `machine.matrix_rate`.

    Returns:
      One a phase.
    """
    return [
        Row(
            "iteration", f"{what}: {phase}", row["seconds"], "s", row["rate"] / peak,
            "the matrix rate",
        )
        for phase, row in results.items()
    ]  # fmt: skip
