"""The PPO iteration on the vBoN objective: one jitted, donated update (the paper's Algorithm 1)."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.models import decoder, heads, trainable
from vbon_jax.models import log_probs as score
from vbon_jax.rl import chunked, gae, kl, ppo, shaping
from vbon_jax.rl.masking import masked_mean
from vbon_jax.rl.next_token import NextToken, log_prob, next_token
from vbon_jax.sampling import decode
from vbon_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class PPOPlan:
    """What the update does. The defaults are the paper's table of PPO hyperparameters.

    objective, estimator: of ``bon.distribution`` and ``bon.log_f``.
    epochs: passes over a rollout; minibatch_size: responses a gradient step.
    clip_policy, clip_value, value_coef, gamma, lam: PPO's and GAE's constants.
    whiten: advantages to zero mean and unit variance over the rollout.
    penalty: how KL(policy || ref), and the entropy of ``jensen_bound``, enter: "sampled" as the
      log-ratio of each sampled token in its reward (the usual way), "full" as the KL of the whole
      next-token distributions, differentiated exactly (see ``loss``): the same objective and the
      same expected gradient, with less noise.
    temperature: of the rollouts, and so of every log-prob.
    accumulate: microbatches a minibatch, one after the other; their gradients add up.
    chunk: tokens whose logits are held at once.
    """

    objective: str = "exact"
    estimator: str = "interval"
    epochs: int = 4
    minibatch_size: int = 32
    clip_policy: float = 0.2
    clip_value: float = 0.2
    value_coef: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    penalty: str = "sampled"
    temperature: float = 0.7
    accumulate: int = 1
    chunk: int = 1024


class RolloutBatch(NamedTuple):
    """A scored rollout, rows first.

    prompt_BxP, prompt_mask_BxP: int32 ids padded on the left, bool mask.
    rollout: decode.Rollout with T response slots.
    reward_B: float32 rewards. row_B: int32, the prompt's row in the References.
    """

    prompt_BxP: jax.Array
    prompt_mask_BxP: jax.Array
    rollout: decode.Rollout
    reward_B: jax.Array
    row_B: jax.Array


class Experience(NamedTuple):
    """What the PPO epochs read: tokens and masks of the whole rows [B, S], and of the response
    slots [B, T] the log-probs and values of the policy that sampled, advantages and returns.
    trunk_BxSxD: activations of the frozen trunk, computed once for all epochs; None without one.
    ref_hidden_BxTxD: the reference's hidden states, from which its logits follow; None where the
    loss does not ask for them.
    kl_weight_B, entropy_weight_B: weights of the "full" penalty in the loss, one value repeated."""

    tokens_BxS: jax.Array
    mask_BxS: jax.Array
    response_mask_BxT: jax.Array
    log_probs_BxT: jax.Array
    values_BxT: jax.Array
    advantages_BxT: jax.Array
    returns_BxT: jax.Array
    trunk_BxSxD: jax.Array | None
    ref_hidden_BxTxD: jax.Array | None
    kl_weight_B: jax.Array
    entropy_weight_B: jax.Array


class Forward(NamedTuple):
    """What a rollout's tokens are worth to policy and reference. log_policy, log_ref, kl, entropy,
    values: [B, T], 0 outside the response. The rest as in Experience."""

    found: NextToken
    values_BxT: jax.Array
    trunk_BxSxD: jax.Array | None
    ref_hidden_BxTxD: jax.Array | None


def _values(
    params: Any,
    hidden_BxTxD: jax.Array,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    value_config: decoder.DecoderConfig | None,
) -> jax.Array:
    """Values of the response's states: by a head on the policy's hidden states, or by a network of
    its own."""
    if value_config is not None:
        length = hidden_BxTxD.shape[1]
        hidden_BxTxD = score.hidden(params["decoder"], value_config, tokens_BxS, mask_BxS, length)
    return heads.value(params["head"], hidden_BxTxD)


def forward(
    params: Any,
    ref_params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    response_mask_BxT: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
    value_config: decoder.DecoderConfig | None = None,
) -> Forward:
    """One pass of policy and reference over a rollout. A frozen trunk runs once for both."""
    mask, response_len = response_mask_BxT, response_mask_BxT.shape[1]
    base = ref_params["decoder"]
    policy = trainable.join(base, params["decoder"])
    trunk = None
    if trainable.divided(base):
        trunk = decoder.trunk(base, config, tokens_BxS, mask_BxS)
        hidden, ref_hidden = (decoder.top(x, config, trunk, mask_BxS) for x in (policy, base))
    else:
        hidden, ref_hidden = (
            decoder.hidden(x, config, tokens_BxS, mask_BxS) for x in (policy, base)
        )
    hidden, ref_hidden = (score.before(x, response_len) for x in (hidden, ref_hidden))
    values = _values(params["value"], hidden, tokens_BxS, mask_BxS, value_config)

    found = score.against(
        (decoder.head(policy), decoder.head(base)), (config, config), (hidden, ref_hidden),
        tokens_BxS[:, -response_len:], plan.temperature, plan.chunk,
    )  # fmt: skip
    found = NextToken(*(jnp.where(mask, x, 0.0) for x in found))
    return Forward(
        found,
        jnp.where(mask, values, 0.0),
        trunk,
        ref_hidden if plan.penalty == "full" else None,
    )


def in_microbatches(f: Any, rows: Any, size: int) -> Any:
    """f of ``size`` rows at a time: what it holds meanwhile is that of so few."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= size:
        return f(rows)
    out = jax.lax.map(
        lambda part: f(sharding.constrain(part, "batch")), _parts(rows, count // size)
    )
    together = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), out)
    return sharding.constrain(together, "batch")


def _parts(rows: Any, count: int) -> Any:
    """Row i goes to part i % count, so that rows sharded over devices stay so in each part."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)


def experience(
    params: Any,
    ref_params: Any,
    batch: RolloutBatch,
    references: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
    value_config: decoder.DecoderConfig | None = None,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Log-probs, values, the objective's per-token rewards and advantages of a rollout.

    The policy's log-probs come from the same full forward the epochs use, so that the PPO ratio is
    1 before the first step whatever the rounding of the decode loop.
    """
    rollout = batch.rollout
    mask = rollout.mask_BxT
    tokens = jnp.concatenate([batch.prompt_BxP, rollout.tokens_BxT], axis=1)
    token_mask = jnp.concatenate([batch.prompt_mask_BxP, mask], axis=1)

    with jax.named_scope("score"):
        scored = in_microbatches(
            lambda rows: forward(
                params, ref_params, *rows, config=config, plan=plan, value_config=value_config
            ),
            (tokens, token_mask, mask),
            plan.minibatch_size // plan.accumulate,
        )
        log_policy, log_ref, full_kl_BxT, entropy_BxT = scored.found
        values = scored.values_BxT
        full_kl = kl.sequence_sum(full_kl_BxT, mask)

    with jax.named_scope("log_f"):
        by_order = references.order_PxM is not None
        density = bon_references.density(
            references,
            batch.row_B,
            batch.reward_B,
            lf.response_order(rollout.tokens_BxT, mask) if by_order else None,
            jnp.sum(log_ref, axis=-1),
            n,
            estimator=plan.estimator,
        )
        sequence_reward = distribution.sequence_reward(
            plan.objective,
            n=n,
            log_f=density.log_f_B,
            log_ratio=density.log_ratio_B,
            log_up_to=density.log_up_to_B,
            reward=batch.reward_B,
        )
        kl_coef = distribution.kl_coefficient(plan.objective, n, beta)
        entropy_coef = distribution.entropy_coefficient(plan.objective, n)

    if plan.penalty == "full":
        rewards = shaping.token_rewards(sequence_reward, log_policy, log_ref, mask, 0.0)
        rewards += entropy_coef * entropy_BxT - kl_coef * full_kl_BxT
    else:
        rewards = shaping.token_rewards(
            sequence_reward, log_policy, log_ref, mask, kl_coef, entropy_coef
        )
    advantages, returns = gae.gae(rewards, values, mask, plan.gamma, plan.lam)
    explained = ppo.explained_variance(values, returns, mask)
    scale = jnp.float32(1.0)
    if plan.whiten:
        # The exact penalty must shrink with the advantages, or whitening would change the optimum.
        scale = gae.deviation(advantages, mask)
        advantages = gae.whiten(advantages, mask)
    weight = plan.penalty == "full"
    rows = mask.shape[0]

    tokens_drawn = jnp.maximum(jnp.sum(mask), 1)
    metrics = {
        "objective": jnp.mean(jnp.sum(rewards, axis=-1)),
        "sequence_reward": jnp.mean(sequence_reward),
        "kl_ref": jnp.mean(full_kl),
        "kl_ref_k1": jnp.mean(kl.k1(log_policy, log_ref, mask)),
        "kl_bon": jnp.mean(full_kl) - jnp.mean(density.log_ratio_B),
        "reward": jnp.mean(batch.reward_B),
        "response_length": jnp.mean(jnp.sum(mask, axis=-1).astype(jnp.float32)),
        "eos_rate": jnp.mean(rollout.finished_B.astype(jnp.float32)),
        "truncation_rate": jnp.mean(1.0 - rollout.finished_B.astype(jnp.float32)),
        "entropy": jnp.sum(entropy_BxT) / tokens_drawn,
        "explained_variance": explained,
        "value_mean": jnp.sum(values) / tokens_drawn,
        # How far the decode loop's log-probs are from the full forward's.
        "rollout_log_prob_error": jnp.max(jnp.abs(log_policy - rollout.log_probs_BxT)),
    }
    return (
        Experience(
            tokens,
            token_mask,
            mask,
            log_policy,
            values,
            advantages,
            returns,
            scored.trunk_BxSxD,
            scored.ref_hidden_BxTxD,
            jnp.full(rows, weight * kl_coef / scale, jnp.float32),
            jnp.full(rows, weight * entropy_coef / scale, jnp.float32),
        ),
        metrics,
    )


def loss(
    params: Any,
    ref_params: Any,
    exp: Experience,
    count: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
    value_config: decoder.DecoderConfig | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss + value_coef * clipped value loss, summed over tokens / ``count``.

    With the tokens of a whole minibatch as ``count``, the losses of its microbatches, and their
    gradients, add up to its own. Logits are made ``plan.chunk`` tokens at a time, their gradient at
    once with them: [B, T, V] is never stored.

    With the "full" penalty, mean_t [kl_coef KL_t - entropy_coef H_t] of the whole next-token
    distributions is added. For J = E[R - c sum_t KL_t], with KL_t a function of the state,

        grad J = E sum_t [ grad log pi(a_t) (R - c sum_{t' > t} KL_t') - c grad KL_t ]:

    the first part is what the advantages carry (the KL_t' of later states are in the rewards), the
    second is this term. The sampled penalty estimates it from one token instead.
    """
    mask = exp.response_mask_BxT
    response_len = mask.shape[1]
    base = ref_params["decoder"]
    policy = trainable.join(base, params["decoder"])
    if exp.trunk_BxSxD is not None:
        hidden = decoder.top(policy, config, exp.trunk_BxSxD, exp.mask_BxS)
    else:
        hidden = decoder.hidden(policy, config, exp.tokens_BxS, exp.mask_BxS)
    hidden = score.before(hidden, response_len)
    full = plan.penalty == "full"

    def project(head: jax.Array, states: jax.Array) -> jax.Array:
        return score.project(head, config, states, plan.temperature)

    def token_loss(logits, frozen, tokens, old, advantages, here, kl_w, entropy_w, ref_hidden):
        ref_head, count = frozen
        if full:
            found = next_token(logits, project(ref_head, ref_hidden), tokens)
            chosen = found.log_prob
        else:
            chosen = log_prob(logits, tokens)
        total, info = ppo.policy_loss(chosen, old, advantages, here, plan.clip_policy, count)
        policy_part = total
        if full:
            total += masked_mean(kl_w * found.kl - entropy_w * found.entropy, here, count)
        return total, {"policy_loss": policy_part, **info}

    def each_token(weight_B: jax.Array) -> jax.Array:
        return jnp.broadcast_to(weight_B[:, None], mask.shape).reshape(-1)

    total, info = chunked.sum_logits(
        token_loss,
        project,
        decoder.head(policy),
        score.flat(hidden),
        (
            *map(
                score.flat,
                (exp.tokens_BxS[:, -response_len:], exp.log_probs_BxT, exp.advantages_BxT),
            ),
            score.flat(mask),
            each_token(exp.kl_weight_B),
            each_token(exp.entropy_weight_B),
            None if exp.ref_hidden_BxTxD is None else score.flat(exp.ref_hidden_BxTxD),
        ),
        plan.chunk,
        frozen=(decoder.head(base) if full else None, count),
        train_head=trainable.trains_head(params["decoder"]),
    )
    values = _values(params["value"], hidden, exp.tokens_BxS, exp.mask_BxS, value_config)
    value_loss, value_info = ppo.value_loss(
        values, exp.values_BxT, exp.returns_BxT, mask, plan.clip_value, count
    )
    total += plan.value_coef * value_loss
    return total, {
        "loss": total,
        "policy_loss": info["policy_loss"],
        "value_loss": value_loss,
        "approx_kl": info["approx_kl"],
        "policy_clip_fraction": info["clip_fraction"],
        "value_clip_fraction": value_info["clip_fraction"],
    }


def gradients(
    params: Any, ref_params: Any, minibatch: Experience, plan: PPOPlan, **static: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of ``loss`` and its metrics, by ``plan.accumulate`` microbatches in turn."""
    count = jnp.maximum(jnp.sum(minibatch.response_mask_BxT), 1).astype(jnp.float32)

    def of(rows: Experience) -> tuple[Any, dict[str, jax.Array]]:
        return jax.grad(loss, has_aux=True)(params, ref_params, rows, count, plan=plan, **static)

    if plan.accumulate == 1:
        return of(minibatch)
    parts = _parts(minibatch, plan.accumulate)

    def add(total: Any, part: Experience) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(sharding.constrain(part, "batch"))), None

    like = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return jax.lax.scan(add, zeros, parts)[0]


@partial(jax.jit, static_argnames=("config", "plan", "optimizer", "value_config"), donate_argnums=0)
def iteration(
    state: TrainState,
    ref_params: Any,
    batch: RolloutBatch,
    references: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
    optimizer: optax.GradientTransformation,
    value_config: decoder.DecoderConfig | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One PPO iteration: experience of a scored rollout, then epochs of minibatch steps.

    Args:
      state: donated. params are {"decoder", "value"}: what ``models.trainable`` trains of the
        reference, and {"head"} of the values, beside it "decoder" for a network of their own.
      ref_params: {"decoder"} of the reference, which holds all that is not trained.
      batch: B rows, B a multiple of plan.minibatch_size.
      references: each prompt's reference rewards.
      n, beta: float32 scalars; data, not structure, so another value needs no compile.
      value_config: of the value network of its own, if there is one.

    Returns:
      (state one step on, metrics: float32 scalars; those of the loss are means over the gradient
      steps, ``grad_norm`` is the largest, ``first_approx_kl`` that of the first step, which must
      be 0).
    """
    static: dict[str, Any] = {"config": config, "value_config": value_config}
    exp, metrics = experience(
        state.params, ref_params, batch, references, n, beta, plan=plan, **static
    )
    rows = exp.tokens_BxS.shape[0]
    minibatches = rows // plan.minibatch_size

    def epoch_order(epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), epoch)
        return jax.random.permutation(key, rows).reshape(minibatches, plan.minibatch_size)

    order = jax.vmap(epoch_order)(jnp.arange(plan.epochs))
    order = order.reshape(plan.epochs * minibatches, plan.minibatch_size)

    def gradient_step(carry, rows_of_step):
        params, opt_state = carry
        # Gathered rows would be whole on every device: each would do all of the minibatch.
        minibatch = sharding.constrain(jax.tree.map(lambda x: x[rows_of_step], exp), "batch")
        grads, info = gradients(params, ref_params, minibatch, plan, **static)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        info["grad_norm"] = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), opt_state), info

    with jax.named_scope("ppo"):
        (params, opt_state), info = jax.lax.scan(
            gradient_step, (state.params, state.opt_state), order
        )
    metrics |= {name: jnp.mean(value) for name, value in info.items()}
    metrics["grad_norm"] = jnp.max(info["grad_norm"])
    metrics["first_approx_kl"] = info["approx_kl"][0]
    # Left to the compiler, small leaves drift from the table, and the next call compiles anew.
    new_state = TrainState(state.step + 1, params, opt_state, state.key)
    return sharding.constrain(new_state, ""), metrics
