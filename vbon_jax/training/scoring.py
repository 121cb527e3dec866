"""A rollout as the epochs of PPO read it: scored by policy and reference, with its advantages."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.models import decoder, family, heads, log_probs, trainable
from vbon_jax.rl import gae, kl, ppo, shaping
from vbon_jax.rl.bond import leave_one_out
from vbon_jax.rl.masking import masked
from vbon_jax.rl.next_token import NextToken
from vbon_jax.rl.prefix import Lookahead
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import lengths
from vbon_jax.training.options import PREFIX, Memory, Train, microbatches

# Adjacent rows of a prompt that shuffling keeps together: each has an eighth of its forward pass.
MOST_TOGETHER = 8
LEAST_PROMPTS = 4  # of a minibatch, which learns less from rows that are more alike


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an update is compiled for. All of it is static: it hashes by value.

    Attributes:
      config: the decoder of policy and reference.
      optimizer: of what is trained.
      train: PPO's hyperparameters; see its keys.
      memory: microbatches, chunk of logits.
      objective: of ``bon.distribution``.
      estimator: of log F, of ``bon.log_f``.
      value_config: of a value network of its own; None for a value head on the policy.
      from_store: whether all rows are stored samples of the reference.
      top: the largest n of a family of policies over n; 0 of one policy.
    """

    config: decoder.DecoderConfig
    optimizer: optax.GradientTransformation
    train: Train = Train()
    memory: Memory = Memory()
    objective: str = "exact"
    estimator: str = "interval"
    value_config: decoder.DecoderConfig | None = None
    from_store: bool = False
    top: float = 0.0

    @property
    def full_penalty(self) -> bool:
        """Whether the KL penalty is that of the whole next-token distributions."""
        return self.train.penalty == "full"

    @property
    def microbatches(self) -> int:
        """Into how many the rows of a gradient step are divided."""
        return microbatches(self.train, self.memory)

    @property
    def microbatch(self) -> int:
        """Rows whose activations are held at once."""
        return self.train.minibatch_size // self.microbatches

    @property
    def together(self) -> int:
        """Adjacent rows that respond to one prompt, which is run once for them; of a microbatch."""
        most = math.gcd(self.train.group, self.train.replay, self.microbatch)
        fit = max(1, min(most, MOST_TOGETHER, self.train.minibatch_size // LEAST_PROMPTS))
        return next(k for k in range(fit, 0, -1) if most % k == 0)

    def same(self, rows: Any, mask_BxT: jax.Array) -> decoder.Adjacent:
        """Which of an update's rows [B, S] of prompt and response share a prompt.

        None where it is less than half as long as the response: there is little to save.
        """
        length = mask_BxT.shape[1]
        columns = rows.shape[1] - length
        return decoder.Adjacent(self.together if 2 * columns >= length else 1, columns)


class Target(NamedTuple):
    """What an objective makes of a rollout.

    Attributes:
      sequence_reward_B: float32, the reward at the last token of each response.
      kl_coef: coefficient of the penalty KL(policy || ref): a scalar, or [B] where rows differ in
        n.
      entropy_coef: coefficient of the policy's entropy, likewise.
      weight_B: float32, what each row counts for as a response of the policy; see ``rl.replay``.
        None where all rows are such.
      forward_B: float32, of the forward KL in the advantages, its weight in it; None without it.
    """

    sequence_reward_B: jax.Array
    kl_coef: jax.Array
    entropy_coef: jax.Array
    weight_B: jax.Array | None = None
    forward_B: jax.Array | None = None

    def mean(self, x_B: jax.Array) -> jax.Array:
        """The policy's mean of what the rows have."""
        if self.weight_B is None:
            return jnp.mean(x_B)
        return jnp.sum(self.weight_B * x_B) / jnp.sum(self.weight_B)


@dataclasses.dataclass(frozen=True)
class Experience:
    """What the PPO epochs read, a pytree with rows first.

    Attributes:
      tokens_BxS: int32 ids of prompt and response in one row.
      mask_BxS: bool, True on real tokens of both.
      response_mask_BxT: bool, True on the response's tokens.
      log_probs_BxT: nats, of the policy that sampled.
      values_BxT: of the value function when the rollout was scored.
      advantages_BxT: of GAE.
      returns_BxT: targets of the value function.
      trunk_BxSxD: activations of the frozen trunk, computed once for all epochs; None without one.
      ref_hidden_BxTxD: the reference's hidden states, from which its logits follow; None where the
        loss does not ask for them.
      kl_weight_B: weight of the "full" KL penalty in the loss.
      entropy_weight_B: weight of the entropy in it.
      value_mask_BxT: bool, True on the tokens that the value function learns from: the policy's.
      temperature: of the rollout, static.
      candidates: (ids, credit) [B, T, K] of the next tokens that the loss sums over; see
        ``rl.prefix.lookahead``. None without them.
      n_B: float32, the n that each row is trained for; None where all have one.
    """

    tokens_BxS: Any
    mask_BxS: Any
    response_mask_BxT: Any
    log_probs_BxT: Any
    values_BxT: Any
    advantages_BxT: Any
    returns_BxT: Any
    trunk_BxSxD: Any
    ref_hidden_BxTxD: Any
    kl_weight_B: Any
    entropy_weight_B: Any
    value_mask_BxT: Any
    temperature: float
    candidates: tuple[Any, Any] | None = None
    n_B: Any = None


jax.tree_util.register_dataclass(
    Experience,
    data_fields=[
        "tokens_BxS", "mask_BxS", "response_mask_BxT", "log_probs_BxT", "values_BxT",
        "advantages_BxT", "returns_BxT", "trunk_BxSxD", "ref_hidden_BxTxD", "kl_weight_B",
        "entropy_weight_B", "value_mask_BxT", "candidates", "n_B",
    ],
    meta_fields=["temperature"],
)  # fmt: skip


class Scored(NamedTuple):
    """A rollout under policy, reference and value function; [B, T] arrays are 0 outside responses.

    Attributes:
      tokens_BxS: int32 ids of prompt and response in one row.
      mask_BxS: bool, True on real tokens of both.
      response_mask_BxT: bool, True on the response's tokens.
      found: log-probs of policy and reference, KL and entropy of each next-token distribution.
      values_BxT: of the value function.
      trunk_BxSxD: as in Experience.
      ref_hidden_BxTxD: as in Experience.
    """

    tokens_BxS: jax.Array
    mask_BxS: jax.Array
    response_mask_BxT: jax.Array
    found: NextToken
    values_BxT: jax.Array
    trunk_BxSxD: jax.Array | None
    ref_hidden_BxTxD: jax.Array | None

    @property
    def log_ref_B(self) -> jax.Array:
        """Log pi_ref of each response, nats."""
        return jnp.sum(self.found.log_ref, axis=-1)

    @property
    def log_policy_ratio_B(self) -> jax.Array:
        """Log(policy / ref) of each response, nats."""
        return jnp.sum(self.found.log_prob - self.found.log_ref, axis=-1)

    @property
    def kl_ref_B(self) -> jax.Array:
        """Nats, the sum of a response's full next-token KLs, whose mean is KL(policy || ref)."""
        return kl.sequence_sum(self.found.kl, self.response_mask_BxT)


def values_of(
    params: Any, hidden_BxTxD: jax.Array, tokens_BxS: jax.Array, mask_BxS: jax.Array, setup: Setup
) -> jax.Array:
    """Values by a head on the policy's hidden states, or by a value network of its own."""
    if params is None:  # they are read off a table, see `methods.vbon`
        return jnp.zeros(hidden_BxTxD.shape[:2], jnp.float32)
    if setup.value_config is not None:
        hidden_BxTxD = log_probs.hidden(
            params["decoder"], setup.value_config, tokens_BxS, mask_BxS, hidden_BxTxD.shape[1],
            setup.same(tokens_BxS, hidden_BxTxD),
        )  # fmt: skip
    return heads.value(params["head"], hidden_BxTxD)


def policy_of(own: Any, base: Any, n_B: jax.Array | None, setup: Setup) -> Any:
    """The policy's tree for the rows of an update: of a family, that of each row's n.

    Args:
      own: what is trained of the reference, ``params["decoder"]``.
      base: the reference's tree.
      n_B: float32, the same in adjacent rows that share a prompt; None of one policy.
      setup: says how many those are.
    """
    if n_B is not None:
        own = family.opened(own, n_B[:: setup.together], setup.top)
    return trainable.join(base, own)


def _forward(
    params: Any,
    ref_params: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None],
    setup: Setup,
    temperature: float,
) -> tuple[NextToken, jax.Array, jax.Array | None, jax.Array | None]:
    """One pass of policy and reference over a rollout.

    A frozen trunk runs once for both, or, where the rollout has told its output, not at all.
    """
    config, (tokens_BxS, mask_BxS, mask, trunk, n_B) = setup.config, rows
    response_len, same = mask.shape[1], setup.same(tokens_BxS, mask)
    base = ref_params["decoder"]
    policy = policy_of(params["decoder"], base, n_B, setup)
    if trainable.divided(base):
        if trunk is None:
            trunk = decoder.trunk(base, config, tokens_BxS, mask_BxS, same)
        hidden, ref_hidden = (decoder.top(x, config, trunk, mask_BxS, same) for x in (policy, base))
    else:
        hidden, ref_hidden = (
            decoder.hidden(x, config, tokens_BxS, mask_BxS, same) for x in (policy, base)
        )
    hidden, ref_hidden = (log_probs.before(x, response_len) for x in (hidden, ref_hidden))
    values = values_of(params.get("value"), hidden, tokens_BxS, mask_BxS, setup)
    found = log_probs.against(
        tuple(decoder.head(x, config) for x in (policy, base)), (config, config),
        (hidden, ref_hidden),
        tokens_BxS[:, -response_len:], temperature, setup.memory.chunk,
    )  # fmt: skip
    return (
        NextToken(*(jnp.where(mask, x, 0.0) for x in found)),
        jnp.where(mask, values, 0.0),
        trunk,
        ref_hidden if setup.full_penalty else None,
    )


def in_microbatches(f: Any, rows: Any, size: int, together: int = 1) -> Any:
    """Applies f to ``size`` rows at a time, so that it holds the activations of no more."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= size:
        return f(rows)
    parts = in_parts(rows, count // size, together)
    out = jax.lax.map(lambda part: f(sharding.constrain(part, "batch")), parts)

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, together, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(count, *x.shape[3:])

    return sharding.constrain(jax.tree.map(back, out), "batch")


def in_parts(rows: Any, count: int, together: int = 1) -> Any:
    """Row i goes to part i % count, so that rows sharded over devices stay so in each part.

    Rows are single ones, or ``together`` adjacent ones that stay so.
    """

    def divided(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, count, together, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(count, -1, *x.shape[3:])

    return jax.tree.map(divided, rows)


def score(params: Any, ref_params: Any, batch: ScoredRollout, setup: Setup) -> Scored:
    """Log-probs of policy and reference, and values, of a rollout.

    The policy's log-probs come from the same full forward the epochs use, so that the PPO ratio is
    1 before the first step whatever the rounding of the decode loop.
    """
    rollout = batch.rollout
    mask = rollout.mask_BxT
    tokens = jnp.concatenate([batch.prompt_BxP, rollout.tokens_BxT], axis=1)
    token_mask = jnp.concatenate([batch.prompt_mask_BxP, mask], axis=1)
    T, S = mask.shape[1], tokens.shape[1]

    def forward(rows: Any) -> Any:
        found, values, trunk, ref_hidden = _forward(
            params, ref_params, rows, setup, batch.temperature
        )
        whole = jax.tree.map(lambda x: lengths.padded(x, T), (found, values, ref_hidden))
        return *whole, None if trunk is None else lengths.padded(trunk, S)

    def part(rows: Any) -> Any:
        return lengths.at_shortest(forward, rows, rows[2], setup.memory.lengths)

    with jax.named_scope("score"):
        rows = (tokens, token_mask, mask, rollout.trunk_BxSxD, batch.n_B)
        parts = max(1, mask.shape[0] // setup.microbatch)
        if setup.memory.lengths > 1:
            order = lengths.order(mask, parts, setup.together)
            rows = jax.tree.map(lambda x: x[order], rows)
        scored = in_microbatches(part, rows, setup.microbatch, setup.together)
        if setup.memory.lengths > 1:
            back = jnp.argsort(order)
            scored = jax.tree.map(lambda x: x[back], scored)
        found, values, ref_hidden, trunk = scored
    return Scored(tokens, token_mask, mask, found, values, trunk, ref_hidden)


def advantages(
    scored: Scored,
    batch: ScoredRollout,
    target: Target,
    setup: Setup,
    ahead: Lookahead | None = None,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Per-token rewards of the objective, and their advantages by GAE.

    The sequence reward stands at a response's last token. With the "sampled" penalty each token is
    charged kl_coef times its log-ratio; with the "full" one, the KL of its whole next-token
    distribution, whose gradient is part of ``loss``; with "response" the last token is charged for
    all, so that all tokens have the same return, which does not vary where the policy is optimal.

    Rows that count for more or less than one response have their advantages, and their part in the
    "full" penalty, in proportion. Values learn from the policy's own responses alone.

    With values of the next tokens ``ahead``, each token's reward is lessened by what its own value
    differs from the expected one: the loss sums over the tokens itself, and as a reward to come
    that difference is noise of mean 0 (a trajectory-wise control variate, Cheng et al., 2019).

    Returns:
      (experience for the epochs, float32 metrics of the rollout).
    """
    mask, train = scored.response_mask_BxT, setup.train
    log_policy, log_ref, full_kl_BxT, entropy_BxT = scored.found
    kl_coef, entropy_coef = (
        jnp.broadcast_to(coef, mask.shape[:1])[:, None]
        for coef in (target.kl_coef, target.entropy_coef)
    )
    if setup.full_penalty:
        rewards = shaping.token_rewards(target.sequence_reward_B, log_policy, log_ref, mask, 0.0)
        rewards += entropy_coef * entropy_BxT - kl_coef * full_kl_BxT
    else:
        rewards = shaping.token_rewards(
            target.sequence_reward_B, log_policy, log_ref, mask, kl_coef, entropy_coef
        )
    if train.penalty == "response":
        rewards = shaping.at_last(jnp.sum(rewards, axis=-1), mask)
    if ahead is not None:  # of this token and of all that follow: their means are 0 as well
        rewards -= masked(ahead.drawn_BxT, mask)
    advantage, returns = gae.gae(rewards, *_baseline(rewards, scored, train))
    if train.value_network == PREFIX:  # a table is a mean of whole returns, not of its own values
        returns = masked(jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], mask)
    own = _own(mask.shape[0], train)
    explained = ppo.explained_variance(scored.values_BxT[:own], returns[:own], mask[:own])
    weight_B = jnp.ones(mask.shape[0]) if target.weight_B is None else target.weight_B
    advantage *= weight_B[:, None]
    if target.forward_B is not None:
        advantage += masked(jnp.broadcast_to(target.forward_B[:, None], mask.shape), mask)
    scale = jnp.float32(1.0)
    if train.whiten:
        # The exact penalty must shrink with the advantages, or whitening would change the optimum.
        scale = gae.deviation(advantage, mask)
        advantage = gae.whiten(advantage, mask)
    drawn, full = mask[:own], setup.full_penalty
    finished = batch.rollout.finished_B[:own].astype(jnp.float32)
    tokens_drawn = jnp.maximum(jnp.sum(drawn), 1)
    metrics = {
        "objective": target.mean(jnp.sum(rewards, axis=-1)),
        "sequence_reward": target.mean(target.sequence_reward_B),
        "kl_ref": target.mean(scored.kl_ref_B),
        "kl_ref_k1": target.mean(scored.log_policy_ratio_B),
        "reward": target.mean(batch.reward_B),
        "response_length": jnp.mean(jnp.sum(drawn, axis=-1).astype(jnp.float32)),
        "eos_rate": jnp.mean(finished),
        "truncation_rate": jnp.mean(1.0 - finished),
        "entropy": jnp.sum(entropy_BxT[:own]) / tokens_drawn,
        "explained_variance": explained,
        "value_mean": jnp.sum(scored.values_BxT[:own]) / tokens_drawn,
        # How far the decode loop's log-probs are from the full forward's.
        "rollout_log_prob_error": jnp.max(jnp.abs(log_policy - batch.rollout.log_probs_BxT)[:own]),
    }
    if setup.from_store:  # they were not drawn in this run, and some were cut elsewhere
        for name in ("eos_rate", "truncation_rate", "rollout_log_prob_error"):
            del metrics[name]
    experience = Experience(
        scored.tokens_BxS, scored.mask_BxS, mask, log_policy, scored.values_BxT, advantage, returns,
        scored.trunk_BxSxD, scored.ref_hidden_BxTxD,
        weight_B * full * target.kl_coef / scale,
        weight_B * full * target.entropy_coef / scale,
        mask & (jnp.arange(mask.shape[0]) < own)[:, None],
        batch.temperature, None if ahead is None else (ahead.ids_BxTxK, ahead.credit_BxTxK / scale),
        batch.n_B,
    )  # fmt: skip
    return experience, metrics


def _own(rows: int, train: Train) -> int:
    """How many of the rows of an update, the first, are responses of the policy."""
    return rows * train.group // (train.group + train.replay)


def _baseline(
    rewards_BxT: jax.Array, scored: Scored, train: Train
) -> tuple[jax.Array, jax.Array, float, float]:
    """What GAE takes beside the rewards: values, mask, gamma and lambda.

    With a group, the mean over the other responses to the prompt of what their returns exceed their
    first values by is added to each value; without a value function it is their mean return, and
    lambda is 1, since a value that is the same at every token can stand in for no return. For a
    stored sample the others are all responses of the policy to its prompt.
    """
    values, mask, lam = scored.values_BxT, scored.response_mask_BxT, train.lam
    if train.baseline == "group":
        values, lam = jnp.zeros_like(values), 1.0
    if train.baseline != "value":
        excess_B = jnp.sum(rewards_BxT, axis=-1) - values[:, 0]
        excess_GxK = excess_B[: _own(mask.shape[0], train)].reshape(-1, train.group)
        of_others_B = (excess_GxK - leave_one_out(excess_GxK)).reshape(-1)
        if train.replay:
            of_all_B = jnp.repeat(jnp.mean(excess_GxK, axis=1), train.replay)
            of_others_B = jnp.concatenate([of_others_B, of_all_B])
        values = jnp.where(mask, values + of_others_B[:, None], 0.0)
    return values, mask, train.gamma, lam
