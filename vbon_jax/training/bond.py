"""An iteration of J-BOND (Sessa et al., 2024, Algorithm 2): distil best-of-2 of a moving anchor."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.models import decoder, trainable
from vbon_jax.models import log_probs as score
from vbon_jax.rl import bond, kl
from vbon_jax.training.ppo import RolloutBatch
from vbon_jax.training.state import TrainState

SOURCES = ("decoder", "anchor", "anchor")  # one response of the policy, two of the anchor


@dataclasses.dataclass(frozen=True)
class BondPlan:
    """What the update does.

    jeffreys: weight of the forward KL; 0.5 in the paper.
    anchor_rate: of the anchor's exponential moving average, a step an iteration.
    beta: weight of KL(policy || anchor) beyond the 1/(n - 1) = 1 of the best-of-2 distilled.
    minibatch_size: responses of the policy a gradient step; each rollout is passed over once.
    temperature: of the rollouts. estimator: of the KL to best-of-n that is reported.
    chunk: tokens whose logits are held at once.
    """

    jeffreys: float
    anchor_rate: float
    beta: float
    minibatch_size: int
    temperature: float
    estimator: str
    chunk: int = score.CHUNK


def _rows(batch: RolloutBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and mask of prompt and response in one row, and the response's mask."""
    rollout = batch.rollout
    tokens = jnp.concatenate([batch.prompt_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([batch.prompt_mask_BxP, rollout.mask_BxT], axis=1)
    return tokens, mask, rollout.mask_BxT


def _log_prob(params: Any, rows: tuple, config: decoder.DecoderConfig, plan: BondPlan) -> jax.Array:
    """log p(response) in nats, [B]."""
    tokens, mask, response_mask = rows
    length = response_mask.shape[1]
    log_probs = score.log_probs(params, config, tokens, mask, length, plan.temperature, plan.chunk)
    return kl.sequence_sum(log_probs, response_mask)


@partial(jax.jit, static_argnames=("config", "plan", "optimizer"), donate_argnums=0)
def iteration(
    state: TrainState,
    ref_params: Any,
    batches: tuple[RolloutBatch, RolloutBatch, RolloutBatch],
    references: References,
    n: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: BondPlan,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over a rollout, then one step of the anchor.

    Args:
      state: donated. params are {"decoder", "anchor"}; the optimizer sees {"decoder"} only.
      ref_params: {"decoder"} of the reference: for the metrics, and what is not trained.
      batches: responses to the same prompts by the policy and, twice, by the anchor (``SOURCES``).
      references: each prompt's reference rewards. n: of the best-of-n that ``kl_bon`` is about;
        J-BOND itself has no n, it moves along n = 2, 4, ... as its anchor moves.

    Returns:
      (state one step on, float32 metrics).
    """
    policy_batch, *anchors = batches
    mine, *theirs = (_rows(b) for b in batches)
    anchor_rewards_Bx2 = jnp.stack([b.reward_B for b in anchors], axis=1)
    first_wins_B = anchor_rewards_Bx2[:, 0] >= anchor_rewards_Bx2[:, 1]
    best = jax.tree.map(lambda a, b: jnp.where(first_wins_B[:, None], a, b), *theirs)

    params = {"decoder": state.params["decoder"]}
    base = ref_params["decoder"]
    both = (trainable.join(base, params["decoder"]), base)
    length = mine[2].shape[1]
    found = score.against(
        (decoder.head(both[0]), decoder.head(base)), (config, config),
        tuple(score.hidden(x, config, *mine[:2], length) for x in both),
        policy_batch.rollout.tokens_BxT, plan.temperature, plan.chunk,
    )  # fmt: skip
    chosen, chosen_ref, kl_B = (
        kl.sequence_sum(x, mine[2]) for x in (found.log_prob, found.log_ref, found.kl)
    )
    anchor = trainable.join(base, state.params["anchor"])
    log_anchor = _log_prob(anchor, mine, config, plan)
    reward = bond.jbond_reward(policy_batch.reward_B, anchor_rewards_Bx2)
    returns = bond.regularised(reward, chosen, log_anchor, 1.0 + plan.beta)
    advantage = bond.leave_one_out(returns)
    kl_ref = jnp.mean(kl_B)
    by_order = references.order_PxM is not None
    density = bon_references.density(
        references, policy_batch.row_B, policy_batch.reward_B,
        lf.response_order(policy_batch.rollout.tokens_BxT, mine[2]) if by_order else None,
        chosen_ref, n, estimator=plan.estimator,
    )  # fmt: skip

    def loss(params: Any, part: Any) -> jax.Array:
        own, best_of_two, advantage_B = part
        policy = trainable.join(base, params["decoder"])
        log_policy = _log_prob(policy, own, config, plan)
        log_best = _log_prob(policy, best_of_two, config, plan)
        return jnp.mean(bond.jbond_loss(log_best, log_policy, advantage_B, plan.jeffreys))

    rows = advantage.shape[0]
    key = jax.random.fold_in(state.key, state.step)
    order = jax.random.permutation(key, rows).reshape(-1, plan.minibatch_size)

    def gradient_step(carry, rows_of_step):
        params, opt_state = carry
        part = sharding.constrain(
            jax.tree.map(lambda x: x[rows_of_step], (mine, best, advantage)), "batch"
        )
        value, grads = jax.value_and_grad(loss)(params, part)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        info = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), info

    with jax.named_scope("bond"):
        (params, opt_state), info = jax.lax.scan(gradient_step, (params, state.opt_state), order)
    anchor = bond.ema(state.params["anchor"], params["decoder"], plan.anchor_rate)
    metrics = {
        "loss": jnp.mean(info["loss"]),
        "grad_norm": jnp.max(info["grad_norm"]),
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
