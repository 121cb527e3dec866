"""J-BOND (Sessa et al., 2024, Algorithm 2): distil best-of-2 of a moving anchor, repeatedly."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.bon.references import References
from vbon_jax.keys import key
from vbon_jax.methods import bond as backward
from vbon_jax.methods.base import Method, Online, Options, taken
from vbon_jax.methods.vbon import best_of_n_density, iteration
from vbon_jax.models import decoder, log_probs, trainable
from vbon_jax.rl import bond, kl
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training.scoring import Setup
from vbon_jax.training.state import TrainState

SOURCES = ("decoder", "anchor", "anchor")  # one response of the policy, two of the anchor


def _jeffreys_key() -> Any:
    return key(0.5, "Weight of the forward KL; the backward KL has the rest.", least=0, most=1)


def _anchor_rate_key() -> Any:
    return key(0.02, "Step size of the anchor's moving average of the policy, per iteration.",
               least=0, most=1)  # fmt: skip


def _beta_key() -> Any:
    return key(0.1, "Coefficient of an additional KL to the anchor, in the backward part.", least=0)


@dataclasses.dataclass(frozen=True)
class Bond:
    """Best-of-n distillation, BOND and J-BOND (Sessa et al., 2024)."""

    form: str = key("jeffreys", "Form: jeffreys, J-BOND, iterated with a moving anchor; backward, "
                    "the backward KL against the reference.",
                    choices=("jeffreys", "backward"))  # fmt: skip
    jeffreys: float = _jeffreys_key()
    anchor_rate: float = _anchor_rate_key()
    beta: float = _beta_key()


@dataclasses.dataclass(frozen=True, kw_only=True)
class JBOND(Options):
    """Options of J-BOND.

    Attributes:
      jeffreys: weight of the forward KL; 0.5 in the paper.
      anchor_rate: of the anchor's exponential moving average, a step an iteration.
      beta: weight of KL(policy || anchor) beyond the 1/(n - 1) = 1 of the best-of-2 distilled.
      n: of the best-of-n that the metric KL(policy || best-of-n) is about: J-BOND itself has no n,
        it moves along n = 2, 4, ... as its anchor moves.
      estimator: of log F, for that metric.
      ties: how that best-of-n chooses among equal rewards.
    """

    jeffreys: float = _jeffreys_key()
    anchor_rate: float = _anchor_rate_key()
    beta: float = _beta_key()


def _rows(batch: ScoredRollout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and mask of prompt and response in one row, and the response's mask."""
    rollout = batch.rollout
    tokens = jnp.concatenate([batch.prompt_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([batch.prompt_mask_BxP, rollout.mask_BxT], axis=1)
    return tokens, mask, rollout.mask_BxT


def _log_prob(params: Any, rows: tuple, setup: Setup, temperature: float) -> jax.Array:
    """Log p(response) in nats, [B]."""
    tokens, mask, response_mask = rows
    found = log_probs.log_probs(
        params, setup.config, tokens, mask, response_mask.shape[1], temperature, setup.memory.chunk
    )
    return kl.sequence_sum(found, response_mask)


def _against(
    policy: Any, base: Any, rows: tuple, batch: ScoredRollout, setup: Setup
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log pi and log pi_ref of the responses, and KL(policy || ref) along them, nats [B] each."""
    tokens, mask, response_mask = rows
    config, length = setup.config, response_mask.shape[1]
    found = log_probs.against(
        tuple(decoder.head(x, config) for x in (policy, base)), (config, config),
        tuple(log_probs.hidden(x, config, tokens, mask, length) for x in (policy, base)),
        batch.rollout.tokens_BxT, batch.temperature, setup.memory.chunk,
    )  # fmt: skip
    log_policy, log_ref, kl_ref = (
        kl.sequence_sum(x, response_mask) for x in (found.log_prob, found.log_ref, found.kl)
    )
    return log_policy, log_ref, kl_ref


@partial(jax.jit, static_argnames=("setup", "options"), donate_argnums=0)
def update(
    state: TrainState,
    ref_params: Any,
    scored: tuple[ScoredRollout, ScoredRollout, ScoredRollout],
    table: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    setup: Setup,
    options: JBOND,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over a rollout, then one step of the anchor.

    Args:
      state: donated. params are {"decoder", "anchor"}; the optimizer sees {"decoder"} only.
      ref_params: {"decoder"} of the reference: for the metrics, and what is not trained.
      scored: responses to the same prompts by the policy and, twice, by the anchor (``SOURCES``).
      table: each prompt's reference rewards.
      n: of the best-of-n that the metric ``kl_bon`` is about.
      beta: not used; J-BOND's is in the options.
      setup: what is static.
      options: likewise.

    Returns:
      (state one step on, float32 metrics).
    """
    del beta
    policy_batch, *anchors = scored
    mine, *theirs = (_rows(b) for b in scored)
    anchor_rewards_Bx2 = jnp.stack([b.reward_B for b in anchors], axis=1)
    first_wins_B = anchor_rewards_Bx2[:, 0] >= anchor_rewards_Bx2[:, 1]
    best = jax.tree.map(lambda a, b: jnp.where(first_wins_B[:, None], a, b), *theirs)

    params = {"decoder": state.params["decoder"]}
    base, temperature = ref_params["decoder"], policy_batch.temperature
    policy = trainable.join(base, params["decoder"])
    chosen, chosen_ref, kl_B = _against(policy, base, mine, policy_batch, setup)
    anchor = trainable.join(base, state.params["anchor"])
    log_anchor = _log_prob(anchor, mine, setup, temperature)
    reward = bond.jbond_reward(policy_batch.reward_B, anchor_rewards_Bx2)
    returns = bond.regularised(reward, chosen, log_anchor, 1.0 + options.beta)
    advantage = bond.leave_one_out(returns)
    kl_ref = jnp.mean(kl_B)
    density = best_of_n_density(table, policy_batch, chosen_ref, n, options.estimator)

    def loss(params: Any, part: Any) -> jax.Array:
        own, best_of_two, advantage_B = part
        policy = trainable.join(base, params["decoder"])
        log_policy = _log_prob(policy, own, setup, temperature)
        log_best = _log_prob(policy, best_of_two, setup, temperature)
        return jnp.mean(bond.jbond_loss(log_best, log_policy, advantage_B, options.jeffreys))

    params, opt_state, info = _one_pass(state, params, loss, (mine, best, advantage), setup)
    anchor = bond.ema(state.params["anchor"], params["decoder"], options.anchor_rate)
    metrics = info | {
        "reward": jnp.mean(policy_batch.reward_B),
        "anchor_reward": jnp.mean(anchor_rewards_Bx2),
        "jbond_reward": jnp.mean(reward),
        "kl_ref": kl_ref,
        "kl_anchor": jnp.mean(chosen - log_anchor),
        "kl_bon": kl_ref - jnp.mean(density.log_ratio_B),
        "response_length": jnp.mean(jnp.sum(mine[2], axis=-1).astype(jnp.float32)),
        "eos_rate": jnp.mean(policy_batch.rollout.finished_B.astype(jnp.float32)),
    }
    new_params = {"decoder": params["decoder"], "anchor": anchor}
    new_state = TrainState(state.step + 1, new_params, opt_state, state.key)
    return sharding.constrain(new_state, ""), metrics


def _one_pass(
    state: TrainState, params: Any, loss: Any, rows: Any, setup: Setup
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Minibatch steps over shuffled rows: (params, optimizer state, metrics)."""
    count = jax.tree.leaves(rows)[0].shape[0]
    key = jax.random.fold_in(state.key, state.step)
    order = jax.random.permutation(key, count).reshape(-1, setup.train.minibatch_size)

    def gradient_step(carry, rows_of_step):
        params, opt_state = carry
        part = sharding.constrain(jax.tree.map(lambda x: x[rows_of_step], rows), "batch")
        value, grads = jax.value_and_grad(loss)(params, part)
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        info = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), info

    with jax.named_scope("bond"):
        (params, opt_state), info = jax.lax.scan(gradient_step, (params, state.opt_state), order)
    return (
        params,
        opt_state,
        {
            "loss": jnp.mean(info["loss"]),
            "grad_norm": jnp.max(info["grad_norm"]),
        },
    )


METHOD = Method(
    name="bond",
    options=JBOND,
    from_config=lambda config: taken(JBOND, config.bond, config.method),
    learns=Online(
        build=lambda options, setup: partial(update, setup=setup, options=options),
        iteration=iteration,
        sources=SOURCES,
        values=False,
        anchor=True,
        microbatches=False,
        passes=lambda train: 1,
    ),
    group=("bond", Bond),
    when=lambda config: config.bond.form == "jeffreys",
    check_n=backward.check_n,
)
