"""Alignment from stored samples: the pool, its training examples, the gradient steps.

A pool holds m reference samples of each of P prompts, N = P m rows, row p m + i being sample i of
prompt p. The methods differ in which rows they choose and in the loss; none draws a new sample.
Shape suffixes: S tokens of a whole row, T response slots; in `steps`, S gradient steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import InputError
from vbon_jax.models import log_probs, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.rl import kl
from vbon_jax.sampling.requests import pad_left
from vbon_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Pool:
    """N reference samples, a pytree with rows first.

    Attributes:
      tokens_NxS: int32, the prompt padded on the left to P columns, then T response slots.
      mask_NxS: bool, True on real tokens of both.
      response_mask_NxT: bool, True on those of the response.
      log_ref_N: float32 nats, log pi_ref of the whole response at the temperature.
      temperature: that the samples were drawn at, static.
    """

    tokens_NxS: Any
    mask_NxS: Any
    response_mask_NxT: Any
    log_ref_N: Any
    temperature: float


jax.tree_util.register_dataclass(
    Pool,
    data_fields=["tokens_NxS", "mask_NxS", "response_mask_NxT", "log_ref_N"],
    meta_fields=["temperature"],
)  # fmt: skip


class Choices(NamedTuple):
    """Training examples, E of them.

    Attributes:
      best_E: int32 rows of the pool.
      worst_E: int32 rows of the pool; those of ``best_E`` for a method that uses the best alone.
      target_E: float32, what the loss is held to: of pairs the probability that best is the better
        one, of single responses what the method makes of their reward.
    """

    best_E: Any
    worst_E: Any
    target_E: Any


@dataclasses.dataclass(frozen=True)
class OfflineSetup:
    """What the gradient steps are compiled for. All of it is static: it hashes by value.

    Attributes:
      config: the decoder of policy and reference.
      optimizer: of what is trained.
      loss: see ``methods.base.Offline``. None for maximum likelihood on the best.
      pairs: whether the loss compares best with worst.
      chunk: tokens whose logits are held at once.
    """

    config: DecoderConfig
    optimizer: optax.GradientTransformation
    loss: Callable[..., jax.Array] | None = None
    pairs: bool = True
    chunk: int = log_probs.CHUNK


def build_pool(
    samples: Sequence[PromptSamples],
    prompts: Sequence[Prompt],
    ids_of: Callable[[PromptSamples, int, Sequence[int]], Sequence[int]],
    m: int,
    max_new_tokens: int,
    prompt_length: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first m samples of each prompt as rows of tokens: a `Pool` without its log_ref.

    Args:
      samples: one a prompt, in the order of prompts.
      prompts: their token ids are what the model sees.
      ids_of: (samples of a prompt, i, the prompt's ids) -> ids of response i, at most
        max_new_tokens; see ``Sampler.stored_ids``.
      m: samples taken of each prompt.
      max_new_tokens: T.
      prompt_length: P, columns of the prompt in tokens.
      pad_id: fills empty slots.

    Returns:
      (tokens_NxS int32, mask_NxS bool, response_mask_NxT bool), N = P m, S = prompt_length + T.

    Raises:
      InputError: samples that are not those of the prompts, fewer than m of a prompt, a prompt
        longer than prompt_length, or a response without a token; names it.
    """
    if len(samples) != len(prompts):
        raise InputError(
            f"samples of {len(samples)} prompts were given for {len(prompts)} prompts; give one a "
            "prompt, in the same order"
        )
    rows: list[list[int]] = []
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        name = f"prompt {prompt.id} ({prompt.text!r})"
        if of_prompt.prompt != prompt.text:
            raise InputError(f"{name} was given samples of {of_prompt.prompt!r}; sample anew")
        if len(of_prompt.responses) < m:
            raise InputError(
                f"{name} has {len(of_prompt.responses)} responses, m = {m} are needed; sample more "
                "or lower m"
            )
        if len(prompt.tokens) > prompt_length:
            raise InputError(
                f"{name} has {len(prompt.tokens)} tokens, more than prompt_length = {prompt_length}"
            )
        for i in range(m):
            rows.append(list(ids_of(of_prompt, i, prompt.tokens)))
            if not rows[-1]:
                raise InputError(
                    f"{name}: response {i} ({of_prompt.responses[i]!r}) has no token to train on; "
                    "remove it and its reward from the samples"
                )
    left = pad_left([p.tokens for p in prompts], prompt_length, pad_id)
    tokens_NxT = np.full((len(rows), max_new_tokens), pad_id, np.int32)
    response_mask_NxT = np.zeros(tokens_NxT.shape, bool)
    for row, ids in enumerate(rows):
        tokens_NxT[row, : len(ids)] = ids
        response_mask_NxT[row, : len(ids)] = True
    return (
        np.concatenate([np.repeat(left.tokens_BxP, m, axis=0), tokens_NxT], axis=1),
        np.concatenate([np.repeat(left.mask_BxP, m, axis=0), response_mask_NxT], axis=1),
        response_mask_NxT,
    )


def log_prob(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    response_mask_BxT: jax.Array,
    *,
    config: DecoderConfig,
    temperature: float,
    chunk: int = log_probs.CHUNK,
) -> jax.Array:
    """Sums the log-probs of each response's tokens given its prompt.

    Args:
      params: {"decoder": ...}.
      tokens_BxS: rows of a `Pool`.
      mask_BxS: likewise.
      response_mask_BxT: likewise.
      config: the decoder's configuration.
      temperature: divides the logits.
      chunk: tokens whose logits are held at once.

    Returns:
      float32 nats [B].
    """
    response_len = response_mask_BxT.shape[1]
    log_probs_BxT = log_probs.log_probs(
        params["decoder"], config, tokens_BxS, mask_BxS, response_len, temperature, chunk
    )
    return kl.sequence_sum(log_probs_BxT, response_mask_BxT)


_log_prob_jit = partial(jax.jit, static_argnames=("config", "temperature"))(log_prob)


def log_ref(
    params: Any,
    tokens_NxS: Any,
    mask_NxS: Any,
    response_mask_NxT: Any,
    batch_size: int,
    *,
    config: DecoderConfig,
    temperature: float,
) -> np.ndarray:
    """`log_prob` of a whole pool under the reference, batch_size rows a forward: float32 [N].

    The last batch is filled with copies of its last row, so that one program serves all.
    """
    arrays = (tokens_NxS, mask_NxS, response_mask_NxT)
    size = len(tokens_NxS)
    found = []
    for start in range(0, size, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), size - 1)
        log_prob_B = _log_prob_jit(
            params, *(x[rows] for x in arrays), config=config, temperature=temperature
        )
        found.append(sharding.fetch(log_prob_B)[: size - start])
    return np.concatenate(found)


def check_n(method: str, n: float, m: int, lowest: int) -> None:
    """Raises InputError unless n is a whole number from ``lowest`` to m, the samples stored."""
    if not (lowest <= n <= m and n % 1 == 0):
        raise InputError(
            f"n = {n:g} must be a whole number from {lowest} to the m = {m} samples of a prompt "
            f"for {method}; sample more or change n"
        )


def check_pairs(pairs: int, most: int | None = None, responses: int = 0) -> None:
    """Raises InputError on fewer than one pair a prompt, or more than ``most`` there are."""
    if pairs < 1:
        raise InputError(f"pairs = {pairs} a prompt; at least 1 is needed")
    if most is not None and pairs > most:
        raise InputError(
            f"pairs = {pairs} a prompt, but {responses} responses make only {most}; lower "
            "pairs or raise responses"
        )


def examples(m: int, best: np.ndarray, worst: np.ndarray, target: np.ndarray) -> Choices:
    """Choices from sample numbers [P, pairs] of each prompt, prompt by prompt."""
    first_row_Px1 = m * np.arange(len(best))[:, None]
    return Choices(
        (first_row_Px1 + best).astype(np.int32).ravel(),
        (first_row_Px1 + worst).astype(np.int32).ravel(),
        target.astype(np.float32).ravel(),
    )


def epoch_order(size: int, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    """The examples of each step of a pass, int32 [size // batch_size, batch_size], none twice.

    What is left over when batch_size does not divide size sits this pass out; another epoch leaves
    out others. A function of its arguments alone.

    Raises:
      InputError: fewer examples than a batch.
    """
    if not 1 <= batch_size <= size:
        raise InputError(
            f"batch_size = {batch_size} must be between 1 and the {size} training examples"
        )
    order_E = np.random.default_rng((seed, epoch)).permutation(size)
    steps_of_pass = size // batch_size
    return order_E[: steps_of_pass * batch_size].reshape(-1, batch_size).astype(np.int32)


def loss(
    params: Any,
    pool: Pool,
    rows: Choices,
    beta: jax.Array | float,
    alpha: jax.Array | float,
    base: Any = None,
    *,
    setup: OfflineSetup,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of a minibatch of examples.

    Args:
      params: {"decoder": ...}, what ``models.trainable`` trains of ``base``.
      pool: the samples.
      rows: B examples.
      beta: coefficient of the method's loss.
      alpha: a second one.
      base: the reference's decoder, which holds what is not trained; None where all is.
      setup: what is static.

    Returns:
      (float32 scalar, metrics): ``loss``, ``nll`` (mean -log policy(best), nats a response), and of
      pairs ``accuracy`` (share with log-ratio(best) > log-ratio(worst)) and ``margin`` (mean of
      their difference, nats).
    """
    pairwise = setup.loss is not None and setup.pairs
    rows_B = jnp.concatenate([rows.best_E, rows.worst_E]) if pairwise else rows.best_E
    # Gathered rows would be whole on every device: each would do all of the minibatch.
    batch = sharding.constrain(jax.tree.map(lambda x: jnp.asarray(x)[rows_B], pool), "batch")
    policy = params["decoder"] if base is None else trainable.join(base, params["decoder"])
    log_policy = log_prob(
        {"decoder": policy},
        batch.tokens_NxS,
        batch.mask_NxS,
        batch.response_mask_NxT,
        config=setup.config,
        temperature=pool.temperature,
        chunk=setup.chunk,
    )
    size = rows.best_E.shape[0]
    nll = -jnp.mean(log_policy[:size])
    if setup.loss is None:
        return nll, {"loss": nll, "nll": nll}
    log_ratio = log_policy - batch.log_ref_N
    best, worst = log_ratio[:size], log_ratio[size:] if pairwise else None
    total = jnp.mean(setup.loss(log_policy[:size], best, worst, rows.target_E, beta, alpha))
    if worst is None:
        return total, {"loss": total, "nll": nll}
    return total, {
        "loss": total,
        "nll": nll,
        "accuracy": jnp.mean((best > worst).astype(jnp.float32)),
        "margin": jnp.mean(best - worst),
    }


def steps(
    state: TrainState,
    pool: Pool,
    choices_SxB: Choices,
    beta: jax.Array | float,
    alpha: jax.Array | float,
    base: Any = None,
    *,
    setup: OfflineSetup,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """S gradient steps, one a row of choices_SxB, in one scan.

    Pure and not jitted, for `jax.vmap` over (state, choices_SxB, beta, alpha) with one pool for all
    members as well. Callers jit it with the setup static and the state donated.

    Args:
      state: params are {"decoder": ...}.
      pool: the samples.
      choices_SxB: `Choices` with leading axes [S, B].
      beta: as in `loss`; data, not structure.
      alpha: likewise.
      base: as in `loss`.
      setup: what is static.

    Returns:
      (state S steps on, metrics of `loss`, means over the steps, and ``grad_norm``, the largest).
    """

    def gradient_step(carry, rows):
        params, opt_state = carry
        grads, info = jax.grad(loss, has_aux=True)(
            params, pool, rows, beta, alpha, base, setup=setup
        )
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        info["grad_norm"] = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), opt_state), info

    trained = {"decoder": state.params["decoder"]}
    with jax.named_scope("offline"):
        (trained, opt_state), info = jax.lax.scan(
            gradient_step, (trained, state.opt_state), choices_SxB
        )
    metrics = {name: jnp.mean(value) for name, value in info.items()}
    metrics["grad_norm"] = jnp.max(info["grad_norm"])
    done = state.step + choices_SxB.best_E.shape[0]
    params = state.params | trained
    # Left to the compiler, small leaves drift from the table, and the next call compiles anew.
    return sharding.constrain(TrainState(done, params, opt_state, state.key), ""), metrics


def nll(
    params: Any, pool: Pool, rows_LxB: jax.Array, base: Any = None, *, setup: OfflineSetup
) -> jax.Array:
    """Mean -log policy of rows of the pool, nats a response, B rows a forward.

    Args:
      params: {"decoder": ...}, as in `loss`.
      pool: the samples.
      rows_LxB: int32 rows of the pool.
      base: as in `loss`.
      setup: what is static.

    Returns:
      float32 scalar.
    """
    policy = params["decoder"] if base is None else trainable.join(base, params["decoder"])

    def of_batch(rows_B: jax.Array) -> jax.Array:
        batch = sharding.constrain(jax.tree.map(lambda x: jnp.asarray(x)[rows_B], pool), "batch")
        log_policy_B = log_prob(
            {"decoder": policy}, batch.tokens_NxS, batch.mask_NxS, batch.response_mask_NxT,
            config=setup.config, temperature=pool.temperature, chunk=setup.chunk,
        )  # fmt: skip
        return -jnp.mean(log_policy_B)

    return jnp.mean(jax.lax.map(of_batch, rows_LxB))
