"""Seconds and floating-point rate of one vBoN iteration by phase, on random weights.

    python -m vbon_jax.bench.ppo --unfrozen=2 --unfrozen=-1

The operations counted are the multiplications and additions of matrix products with weights, those
that a phase cannot do without. So a phase's share of the machine's own rate is a lower bound.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vbon_jax import sharding
from vbon_jax.bon import references
from vbon_jax.bon.references import References
from vbon_jax.methods import vbon
from vbon_jax.models import decoder, heads, trainable
from vbon_jax.models.decoder import DecoderConfig, Rotary
from vbon_jax.models.lm import LanguageModel
from vbon_jax.models.trainable import Trainable
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.sampler import Batch, Sampler, Sampling, ScoredRollout
from vbon_jax.training import scoring, state
from vbon_jax.training.options import Memory, Train
from vbon_jax.training.state import TrainState

GPT2_SMALL = DecoderConfig(
    vocab_size=50_257, positions=1_024, layers=12, width=768, heads=12, mlp_width=3_072
)
N, BETA = 8.0, 1 / 7
experience = jax.jit(vbon.experience, static_argnames="setup")  # an update before its epochs


def pythia(layers: int, width: int, heads: int) -> DecoderConfig:
    """The architecture of a Pythia model (Biderman et al., 2023).

    Args:
      layers: number of blocks.
      width: width of the residual stream.
      heads: number of attention heads.
    """
    return DecoderConfig(
        vocab_size=50_304, positions=2_048, layers=layers, width=width, heads=heads,
        mlp_width=4 * width, place="parallel", rotary=Rotary(fraction=0.25),
        activation="gelu", tied=False, compute_dtype="bfloat16",
    )  # fmt: skip


MODELS = {
    "gpt2": GPT2_SMALL,
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        positions=8_192,
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        mlp_width=1_536,
        norm="rms",
        norm_eps=1e-5,
        rotary=Rotary(theta=1e5),
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    ),
    "pythia-410m": pythia(24, 1_024, 16),
    "pythia-1.4b": pythia(24, 2_048, 16),
}
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


def matrix_rate(dtype: str = "float32", size: int = 4_096) -> float:
    """Measures the floating-point operations per second of a square matrix product in JAX.

    Args:
      dtype: of the matrices.
      size: rows and columns.

    Returns:
      The best of 5 repetitions.
    """
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


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
    block = c.width * c.key_width * (2 * c.heads + 2 * c.key_heads)
    block += c.width * c.mlp_width * (3 if c.gated else 2)
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


def table(results: dict[str, dict[str, float]], title: str, peak: float) -> Table:
    """Makes the table of results for the screen.

    Args:
      results: what `iteration_times` returns.
      title: of the table.
      peak: the machine's rate, of `matrix_rate`.

    Returns:
      One row per phase.
    """
    shown = Table(title=title)
    for column in ("phase", "seconds", "TFLOP", "GFLOP/s", "share of the matrix rate"):
        shown.add_column(column, justify="left" if column == "phase" else "right")
    for phase, row in results.items():
        shown.add_row(
            phase, f"{row['seconds']:.2f}", f"{row['operations'] / 1e12:.2f}",
            f"{row['rate'] / 1e9:.0f}", f"{row['rate'] / peak:.0%}",
        )  # fmt: skip
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each ``--unfrozen``.

    Args:
      argv: the command line's arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vbon_jax.bench.ppo",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2", help="architecture")
    parser.add_argument(
        "--unfrozen", type=int, action="append", metavar="LAYERS",
        help="upper blocks trained, -1 for the whole model; may be repeated (2 and -1)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--penalty", choices=("sampled", "full"), default="sampled", help="train.penalty"
    )
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), default="none", help="memory.remat"
    )
    parser.add_argument("--chunk", type=int, default=1_024, help="memory.chunk")
    parser.add_argument("--rows", type=int, default=Work.rows, help="responses per rollout")
    parser.add_argument("--prompt", type=int, default=Work.prompt, help="tokens per prompt")
    parser.add_argument("--group", type=int, default=1, help="train.group")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the median counts")
    given = parser.parse_args(argv)
    config = MODELS[given.model]
    work = Work(rows=given.rows, prompt=given.prompt, group=given.group)
    peak = matrix_rate(config.compute_dtype)
    console = Console()
    console.print(f"matrix rate, {config.compute_dtype}: {peak / 1e9:.0f} GFLOP/s")
    for unfrozen in getattr(given, "unfrozen", (2, -1)):
        results = iteration_times(
            config, work, unfrozen, given.penalty, given.chunk, given.remat,
            config.compute_dtype, given.repeats,
        )  # fmt: skip
        title = f"{given.model}, {unfrozen} layers unfrozen, {given.penalty} penalty"
        title += f", {work.group} responses to each prompt of {work.prompt} tokens"
        console.print(table(results, title, peak))


if __name__ == "__main__":
    main()
