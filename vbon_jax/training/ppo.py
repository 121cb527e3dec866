"""The gradient steps of a PPO update: clipped losses, microbatches, epochs of minibatches.

``methods.vbon.update`` puts them together with ``training.scoring``, one jitted and donated
program.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.models import decoder, log_probs, trainable
from vbon_jax.rl import chunked, ppo
from vbon_jax.rl.masking import masked_mean
from vbon_jax.rl.next_token import log_prob, next_token
from vbon_jax.training import lengths
from vbon_jax.training import state as optim
from vbon_jax.training.scoring import Experience, Setup, in_parts, policy_of, values_of
from vbon_jax.training.state import TrainState

TRAINED = ("decoder", "value")  # of a state's params, what the optimizer sees


def loss(
    params: Any, ref_params: Any, exp: Experience, count: jax.Array, *, setup: Setup
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss + value_coef * clipped value loss, summed over tokens / ``count``.

    With the tokens of a whole minibatch as ``count``, the losses of its microbatches, and their
    gradients, add up to its own. Logits are made ``memory.chunk`` tokens at a time and their
    gradient at once with them: [B, T, V] is never stored.

    With the "full" penalty, mean_t [kl_coef KL_t - entropy_coef H_t] of the whole next-token
    distributions is added. For J = E[R - c sum_t KL_t], with KL_t a function of the state,

        grad J = E sum_t [ grad log pi(a_t) (R - c sum_{t' > t} KL_t') - c grad KL_t ]:

    the first part is what the advantages carry (the KL_t' of later states are in the rewards), the
    second is this term. The sampled penalty estimates it from one token instead.

    With ``exp.candidates``, mean_t sum_k pi(k) credit_k is subtracted; see ``rl.prefix.lookahead``.
    """
    config, train, full = setup.config, setup.train, setup.full_penalty
    mask = exp.response_mask_BxT
    response_len, same = mask.shape[1], setup.same(exp.tokens_BxS, mask)
    base = ref_params["decoder"]
    policy = policy_of(params["decoder"], base, exp.n_B, setup)
    if exp.trunk_BxSxD is not None:
        hidden = decoder.top(policy, config, exp.trunk_BxSxD, exp.mask_BxS, same)
    else:
        hidden = decoder.hidden(policy, config, exp.tokens_BxS, exp.mask_BxS, same)
    hidden = log_probs.before(hidden, response_len)

    def project(head: jax.Array, states: jax.Array) -> jax.Array:
        return log_probs.project(head, config, states, exp.temperature)

    def token_loss(
        logits, frozen, tokens, old, advantages, here, kl_w, entropy_w, ref_hidden, candidates
    ):
        ref_head, count = frozen
        if full:
            found = next_token(logits, project(ref_head, ref_hidden), tokens)
            chosen = found.log_prob
        else:
            chosen = log_prob(logits, tokens)
        total, info = ppo.policy_loss(chosen, old, advantages, here, train.clip_policy, count)
        if candidates is not None:
            ids, credit = candidates
            likely = jnp.take_along_axis(logits, ids, axis=-1)
            log_z = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - chosen[:, None]
            expected = jnp.sum(jnp.exp(likely - log_z) * credit, axis=-1)
            total -= masked_mean(expected, here, count)
        policy_part = total
        if full:
            total += masked_mean(kl_w * found.kl - entropy_w * found.entropy, here, count)
        return total, {"policy_loss": policy_part, **info}

    def each_token(weight_B: jax.Array) -> jax.Array:
        return jnp.broadcast_to(weight_B[:, None], mask.shape).reshape(-1)

    flat = log_probs.flat
    total, info = chunked.sum_logits(
        token_loss,
        project,
        decoder.head(policy, config),
        flat(hidden),
        (
            *map(flat, (exp.tokens_BxS[:, -response_len:], exp.log_probs_BxT, exp.advantages_BxT)),
            flat(mask),
            each_token(exp.kl_weight_B),
            each_token(exp.entropy_weight_B),
            None if exp.ref_hidden_BxTxD is None else flat(exp.ref_hidden_BxTxD),
            jax.tree.map(flat, exp.candidates),
        ),
        setup.memory.chunk,
        frozen=(decoder.head(base, config) if full else None, count),
        train_head=trainable.trains_head(params["decoder"]),
        lanes=sharding.parts(sharding.BATCH, mask.shape[0]),
        hold=partial(jax.tree.map, lambda x: sharding.held(x, sharding.BATCH, "tensor")),
    )
    values = values_of(params.get("value"), hidden, exp.tokens_BxS, exp.mask_BxS, setup)
    value_loss, value_info = ppo.value_loss(
        values, exp.values_BxT, exp.returns_BxT, exp.value_mask_BxT, train.clip_value, count
    )
    if train.learns_values:
        total += train.value_coef * value_loss
    return total, {
        "loss": total,
        "policy_loss": info["policy_loss"],
        "value_loss": value_loss,
        "approx_kl": info["approx_kl"],
        "policy_clip_fraction": info["clip_fraction"],
        "value_clip_fraction": value_info["clip_fraction"],
    }


def gradients(
    params: Any, ref_params: Any, minibatch: Experience, setup: Setup
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of ``loss`` and its metrics, by its microbatches in turn."""
    count = jnp.maximum(jnp.sum(minibatch.response_mask_BxT), 1).astype(jnp.float32)
    of_rows = partial(_gradients, setup=setup)
    return sharding.summed(
        of_rows, (params, ref_params, count), minibatch, setup.config.compute_dtype
    )


def _gradients(
    shared: tuple[Any, Any, jax.Array], minibatch: Experience, setup: Setup
) -> tuple[Any, dict[str, jax.Array]]:
    """What some of a minibatch's rows add to `gradients`."""
    params, ref_params, count = shared

    def at_length(rows: Experience) -> tuple[Any, dict[str, jax.Array]]:
        return jax.grad(loss, has_aux=True)(params, ref_params, rows, count, setup=setup)

    def of(rows: Experience) -> tuple[Any, dict[str, jax.Array]]:
        return lengths.at_shortest(at_length, rows, rows.response_mask_BxT, setup.memory.lengths)

    if setup.microbatches == 1:
        return of(minibatch)
    parts = in_parts(minibatch, setup.microbatches, setup.together)

    def add(total: Any, part: Experience) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(sharding.constrain(part, "batch"))), None

    like = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return jax.lax.scan(add, zeros, parts)[0]


def epochs(
    state: TrainState, ref_params: Any, exp: Experience, setup: Setup
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Passes over the experience in shuffled minibatches, ``train.ppo_epochs`` of them.

    Adjacent responses to one prompt, ``setup.together`` of them, stay in one minibatch.

    They end early once the policy is further than ``train.kl_target`` from that of the rollout:
    KL(rollout policy || policy) in nats a response, the mean over the minibatches of a pass, each
    measured before its own step.

    Returns:
      (state one step on, metrics: means over the gradient steps; ``grad_norm`` is the largest,
      ``first_approx_kl`` that of the first step, which must be 0, ``kl_rollout`` the KL of the last
      pass, ``epochs`` the passes done).
    """
    train, rows = setup.train, exp.tokens_BxS.shape[0]
    minibatches = rows // train.minibatch_size

    def gradient_step(carry, rows_of_step):
        params, opt_state = carry
        if setup.memory.lengths > 1:
            here = exp.response_mask_BxT[rows_of_step]
            order = lengths.order(here, setup.microbatches, setup.together)
            rows_of_step = rows_of_step[order]
        # Gathered rows would be whole on every device: each would do all of the minibatch.
        minibatch = sharding.constrain(jax.tree.map(lambda x: x[rows_of_step], exp), "batch")
        grads, info = gradients(params, ref_params, minibatch, setup)
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        info["grad_norm"] = optax.tree.norm(grads)
        length = jnp.sum(minibatch.response_mask_BxT) / train.minibatch_size
        info["kl_rollout"] = info["approx_kl"] * length
        return (optax.apply_updates(params, updates), opt_state), info

    def one_pass(epoch: jax.Array, carry: Any) -> tuple[Any, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), epoch)
        order = jax.random.permutation(key, rows // setup.together)
        order = lengths.rows_of(order, setup.together).reshape(minibatches, train.minibatch_size)
        return jax.lax.scan(gradient_step, carry, order)

    def another(loop: Any) -> Any:
        epoch, carry, found = loop
        carry, info = one_pass(epoch, carry)
        found = jax.tree.map(lambda all_, one: all_.at[epoch].set(one), found, info)
        return epoch + 1, carry, found

    def within(loop: Any) -> jax.Array:
        epoch, _, found = loop
        near = jnp.mean(found["kl_rollout"][epoch - 1]) <= (train.kl_target or jnp.inf)
        return (epoch < train.ppo_epochs) & ((epoch == 0) | near)

    # What stands beside these is kept by the methods themselves.
    trained = {name: state.params[name] for name in TRAINED if name in state.params}
    carry = (trained, state.opt_state)
    like = jax.eval_shape(partial(one_pass, jnp.int32(0)), carry)[1]
    found = jax.tree.map(lambda x: jnp.zeros((train.ppo_epochs, *x.shape), x.dtype), like)
    with jax.named_scope("ppo"):
        done, (trained, opt_state), found = jax.lax.while_loop(
            within, another, (jnp.int32(0), carry, found)
        )
    metrics = {name: jnp.sum(x) / (done * minibatches) for name, x in found.items()}
    metrics["grad_norm"] = jnp.max(found["grad_norm"])
    metrics["first_approx_kl"] = found["approx_kl"][0, 0]
    metrics["kl_rollout"] = jnp.mean(found["kl_rollout"][done - 1])
    metrics["epochs"] = done.astype(jnp.float32)
    # The learning rate is a function of the iteration, whatever the passes that were left out.
    opt_state = optim.at_step(opt_state, (state.step + 1) * train.ppo_epochs * minibatches)
    # Left to the compiler, small leaves drift from the table, and the next call compiles anew.
    new_state = TrainState(state.step + 1, state.params | trained, opt_state, state.key)
    return sharding.constrain(new_state, ""), metrics
