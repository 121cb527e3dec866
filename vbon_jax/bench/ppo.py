"""Seconds and floating-point rates of one PPO iteration by phase, on random weights.

    python -m vbon_jax.bench.ppo --unfrozen=2 --unfrozen=-1

A rate counts the multiplications and additions of matrix products with weights alone, those that
the phase cannot do without, so a share of the machine's own rate is a lower bound.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vbon_jax import sharding
from vbon_jax.bon import references
from vbon_jax.models import decoder, heads, trainable
from vbon_jax.models.trainable import Trainable
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.sampler import Request, Sampling
from vbon_jax.training import ppo, state

GPT2_SMALL = decoder.DecoderConfig(
    vocab_size=50_257, positions=1_024, layers=12, width=768, heads=12, mlp_width=3_072
)


def pythia(layers: int, width: int, heads: int) -> decoder.DecoderConfig:
    """The shape of a Pythia model (Biderman et al. 2023)."""
    return decoder.DecoderConfig(
        vocab_size=50_304, positions=2_048, layers=layers, width=width, heads=heads,
        mlp_width=4 * width, place="parallel", rotary=decoder.Rotary(fraction=0.25),
        activation="gelu", tied=False, compute_dtype="bfloat16",
    )  # fmt: skip


MODELS = {
    "gpt2": GPT2_SMALL,
    "pythia-410m": pythia(24, 1_024, 16),
    "pythia-1.4b": pythia(24, 2_048, 16),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """rows: responses a rollout, of prompt + new tokens each, no EOS; epochs over minibatches."""

    rows: int = 128
    prompt: int = 8
    new: int = 40
    epochs: int = 4
    minibatch: int = 32


def matrix_rate(dtype: str = "float32", size: int = 4_096) -> float:
    """Floating-point operations a second of a square matrix product under JAX, the best of 5."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def operations(
    config: decoder.DecoderConfig, work: Work, unfrozen: int, penalty: str
) -> dict[str, float]:
    """Floating-point operations of each phase: of products with weights, attention left out."""
    c = config
    block = c.width * c.key_width * (2 * c.heads + 2 * c.key_heads)
    block += c.width * c.mlp_width * (3 if c.gated else 2)
    vocabulary = c.width * c.vocab_size
    top = c.layers if unfrozen == -1 else unfrozen
    drawn, all_tokens = work.rows * work.new, work.rows * (work.prompt + work.new)
    trunk = (c.layers - top) * block
    whole = unfrozen == -1
    # Forward of policy and reference; the reference's logits again each epoch for its full KL.
    score = 2 * all_tokens * (trunk + 2 * top * block) + 2 * drawn * 2 * vocabulary
    head_products = (3 if whole else 2) + (1 if penalty == "full" else 0)
    # Backward, two products for each of the forward's; into the trunk none.
    epoch = 2 * all_tokens * 3 * top * block + 2 * drawn * head_products * vocabulary
    return {
        "rollout": 2.0 * all_tokens * c.layers * block + 2.0 * drawn * vocabulary,
        "score": float(score),
        "epochs": float(work.epochs * epoch),
    }


def _median(call: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def iteration_times(
    config: decoder.DecoderConfig = GPT2_SMALL,
    work: Work = Work(),
    unfrozen: int = 2,
    penalty: str = "sampled",
    chunk: int = 1_024,
    remat: str = "none",
    dtype: str = "float32",
    repeats: int = 3,
) -> dict[str, dict[str, float]]:
    """Times one vBoN iteration, n = 8, by phase; compiled before.

    Args:
      config: the model; random weights. dtype: of frozen weights; what is trained is float32.
      unfrozen: upper blocks trained, -1 for all.
      penalty, chunk, remat: as ``train.penalty``, ``memory.chunk`` and ``memory.remat``.

    Returns:
      {"rollout" | "score" | "epochs" | "iteration": {"seconds", "operations", "rate"}}. "score" is
      the forward of policy and reference over the rollout, "epochs" all gradient steps.
    """
    mesh = sharding.make_mesh()
    config = dataclasses.replace(config, remat=remat)
    what = Trainable(unfrozen)

    @jax.jit
    def make(key: jax.Array) -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), decoder.init(config, key))
        return trainable.divide(params, what, config.layers)

    reference = {"decoder": make(jax.random.key(0))}
    plan = ppo.PPOPlan(
        epochs=work.epochs, minibatch_size=work.minibatch, penalty=penalty, temperature=1.0,
        chunk=chunk,
    )  # fmt: skip
    optimizer = state.adamw(lambda step: 1e-5, 1e-5, 0.0, 1.0)
    own = jax.jit(partial(trainable.start, what=what, key=jax.random.key(1)))(reference["decoder"])
    params = {"decoder": own, "value": {"head": heads.init_value(config, jax.random.key(1))}}
    train_state = state.create(params, optimizer, jax.random.key(2))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (work.rows, work.prompt))
    requests = [Request(i, 0, tuple(row)) for i, row in enumerate(ids.tolist())]
    table = references.references(rng.normal(size=(work.rows, 64)).astype(np.float32), "interval")
    rewards = jnp.asarray(rng.normal(size=work.rows), jnp.float32)

    def draw(own: Any) -> tuple[Any, Any]:
        return engine.draw(
            trainable.join(reference["decoder"], own), config, Sampling(1.0, work.new, None, 0),
            mesh, jax.random.key(3), 0, requests,
        )  # fmt: skip

    seconds = {"rollout": _median(lambda: draw(train_state.params["decoder"]), repeats)}
    rows, rollout = draw(train_state.params["decoder"])
    batch = ppo.RolloutBatch(
        rows.tokens_BxP, rows.mask_BxP, rollout, rewards, jnp.arange(work.rows)
    )
    n, beta = jnp.float32(8), jnp.float32(1 / 7)
    score = jax.jit(ppo.experience, static_argnames=("config", "plan"))
    seconds["score"] = _median(
        lambda: score(
            train_state.params, reference, batch, table, n, beta, config=config, plan=plan
        ),
        repeats,
    )
    holder = [train_state]

    def update() -> Any:
        holder[0], metrics = ppo.iteration(
            holder[0], reference, batch, table, n, beta, config=config, plan=plan,
            optimizer=optimizer,
        )  # fmt: skip
        return metrics

    both = _median(update, repeats)
    seconds["epochs"] = both - seconds["score"]
    seconds["iteration"] = seconds["rollout"] + both
    work_of = operations(config, work, unfrozen, penalty)
    work_of["iteration"] = sum(work_of.values())
    return {
        phase: {
            "seconds": seconds[phase],
            "operations": work_of[phase],
            "rate": work_of[phase] / seconds[phase],
        }
        for phase in ("rollout", "score", "epochs", "iteration")
    }


def main() -> None:
    """Prints a table for each ``--unfrozen``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--unfrozen", type=int, action="append", help="upper blocks trained; -1")
    parser.add_argument("--penalty", choices=("sampled", "full"), default="sampled")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--chunk", type=int, default=1_024)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    config = MODELS[given.model]
    peak = matrix_rate(config.compute_dtype)
    console = Console()
    console.print(f"matrix rate, {config.compute_dtype}: {peak / 1e9:.0f} GFLOP/s")
    for unfrozen in given.unfrozen or [2, -1]:
        found = iteration_times(
            config, unfrozen=unfrozen, penalty=given.penalty, chunk=given.chunk,
            remat=given.remat, dtype=config.compute_dtype, repeats=given.repeats,
        )  # fmt: skip
        table = Table(title=f"{given.model}, {unfrozen} layers unfrozen, {given.penalty} penalty")
        for column in ("phase", "seconds", "TFLOP", "GFLOP/s", "share of the matrix rate"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for phase, row in found.items():
            table.add_row(
                phase, f"{row['seconds']:.2f}", f"{row['operations'] / 1e12:.2f}",
                f"{row['rate'] / 1e9:.0f}", f"{row['rate'] / peak:.0%}",
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    main()
