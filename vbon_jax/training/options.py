"""What the training room is told: the config groups of fitting, optimisation, LoRA and memory."""

import dataclasses

from vbon_jax.bon.distribution import JEFFREYS
from vbon_jax.bon.targets import TRANSFORMS
from vbon_jax.errors import InputError
from vbon_jax.keys import Size, key
from vbon_jax.models import trainable
from vbon_jax.models.config import DTYPES, REMAT

LABELS = ("hard", "soft")  # of dpo's pairs
BASELINES = ("value", "group", "both")
REFERENCE, WEIGHTED, REPLAY = "reference", "weighted", "replay"
STARTS = (REFERENCE, WEIGHTED, REPLAY)
PREFIX = "prefix"
ADAMW, MUON = "adamw", "muon"
# Sizes no real run reaches: a slip of the keyboard is told before memory is asked for it.
MOST_ROWS = Size(4_000_000)  # of a batch, or of what is drawn for a prompt
MOST_TOKENS = Size(4_000_000)
MOST_WIDTH = Size(100_000)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Supervised training of a reference, reward or evaluator model."""

    epochs: int = key(4, "Passes over the texts.", least=1, most=1_000_000)
    batch_size: int = key(64, "Texts per gradient step.", least=1, most=MOST_ROWS)
    learning_rate: float = key(2e-3, "Peak learning rate of AdamW: linear warm-up over the first "
                               "5% of the steps, then cosine decay to 0.", above=0)  # fmt: skip
    weight_decay: float = key(0.01, "Weight decay of AdamW.", least=0)
    max_tokens: int = key(
        40, "Texts are truncated to this many tokens, EOS included.", least=2, most=MOST_TOKENS
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Training of the policy; the online methods' hyperparameters of PPO."""

    start: str = key(REFERENCE, "Policy that an online method begins with: reference; weighted, "
                     "maximum likelihood on the stored samples by their weights as the winner "
                     "of the nearest whole n, as bon_sft trains it under the keys of `offline`; "
                     "replay, the method's own update on stored samples in place of responses, "
                     "`offline.pairs` a prompt and `offline.epochs` times.",
                     choices=STARTS)  # fmt: skip
    iterations: int = key(150, "Rollout batches to train on; training episodes are iterations x "
                          "batch_size.", least=1, most=100_000_000)  # fmt: skip
    batch_size: int = key(128, "Responses per rollout.", least=1, most=MOST_ROWS)
    minibatch_size: int = key(32, "Responses per gradient step; must divide `train.batch_size`.",
                              least=1, most=MOST_ROWS)  # fmt: skip
    group: int = key(1, "Responses to each prompt of a rollout; must divide `train.batch_size`, "
                     "and be 2 at least for `train.baseline` group and both.", least=1,
                     most=MOST_ROWS)  # fmt: skip
    ppo_epochs: int = key(4, "Passes over each rollout.", least=1, most=100_000)
    kl_target: float = key(0.0, "KL from the rollout's policy to the policy, nats a response, "
                           "beyond which no further pass over a rollout is begun; 0 for no such "
                           "limit.",
                           least=0)  # fmt: skip
    learning_rate: float = key(1e-5, "Learning rate of AdamW, decayed linearly to 0.", above=0)
    warmup: int = key(0, "Iterations over which the learning rate first rises linearly from 0.",
                      least=0, most=100_000_000)  # fmt: skip
    optimizer: str = key(ADAMW, "AdamW, or muon: orthogonalised momentum for the matrices of the "
                         "blocks, AdamW for all else.", choices=(ADAMW, MUON))  # fmt: skip
    adam_eps: float = key(1e-5, "Epsilon of AdamW.", above=0)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", least=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm.", above=0)
    clip_policy: float = key(0.2, "Clip range of PPO's probability ratio.", above=0, below=1)
    clip_value: float = key(0.2, "Clip range of the value function's change.", above=0)
    value_coef: float = key(0.2, "Coefficient of the value loss.", least=0)
    gamma: float = key(1.0, "Discount factor.", least=0, most=1)
    lam: float = key(0.95, "Lambda of generalized advantage estimation (GAE).", least=0, most=1)
    baseline: str = key("value", "What is subtracted from returns: value, the value function by "
                        "GAE; group, the mean return of the other responses to the prompt; both, "
                        "the value and what the others' returns exceed theirs by.",
                        choices=BASELINES)  # fmt: skip
    whiten: bool = key(True, "Normalise the advantages of a rollout to zero mean and unit "
                       "variance.")  # fmt: skip
    penalty: str = key("full", "KL penalty: sampled, the log-ratio of the sampled token, at each "
                       "token; full, there the KL divergence over the whole vocabulary; response, "
                       "the log-ratio of the response, at its last token.",
                       choices=("sampled", "full", "response"))  # fmt: skip
    num_layers_unfrozen: int = key(-1, "Number of upper transformer blocks to train, above a "
                                   "frozen trunk that policy and reference share; -1 trains the "
                                   "whole model.", least=-1)  # fmt: skip
    value_network: str = key("head", "Value function: head, a linear head on the policy; reward, a "
                             "separate network initialised from the reward model; prefix, a table "
                             "of returns by the rank of the reward of what was written so far.",
                             choices=("head", "reward", PREFIX))  # fmt: skip
    replay: int = key(0, "Stored samples of each prompt of a rollout that are learned from beside "
                      "its `train.group` responses, by their importance weights.", least=0,
                      most=MOST_ROWS)  # fmt: skip
    lookahead: int = key(0, "With `train.value_network=prefix`: likeliest next tokens at each "
                         "position whose values are asked for as well, so that the gradient sums "
                         "over them; each costs a call of the reward a token.", least=0,
                         most=MOST_WIDTH)  # fmt: skip
    average_half_life: float = key(0.0, "Half-life, in iterations, of an exponential average of "
                                   "the policy's weights, which is then the policy that is "
                                   "exported; 0 for the last iterate.", least=0)  # fmt: skip
    checkpoint_every: int = key(50, "Iterations between checkpoints.", least=1)
    keep: int = key(2, "Number of most recent checkpoints to keep.", least=1)

    @property
    def rows(self) -> int:
        """Rows of an iteration's update: responses, and the stored samples beside them."""
        return self.batch_size + self.batch_size // self.group * self.replay

    @property
    def learns_values(self) -> bool:
        """Whether parameters of a value function are trained."""
        return self.baseline != "group" and self.value_network != PREFIX


@dataclasses.dataclass(frozen=True)
class Offline:
    """Training on stored samples: bon_sft, dpo, qrpo and bonbon."""

    responses: int = key(
        6, "Stored responses per prompt from which dpo makes its pairs.", least=2, most=MOST_ROWS
    )
    pairs: int = key(
        12, "Training pairs per prompt (for bon_sft: stored responses, in proportion to their "
        "chance to be the best of n; for qrpo: stored responses, all of them once before any is "
        "taken again).", least=1, most=MOST_ROWS
    )  # fmt: skip
    labels: str = key("hard", "Preference labels of dpo: hard, the higher reward is preferred; "
                      "soft, with probability sigmoid(reward difference).",
                      choices=LABELS)  # fmt: skip
    transform: str = key("log", "Transform of qrpo's quantile reward q: log, log q, whose optimum "
                         "at `method.beta` = 1/(n-1) is best-of-n; identity, q itself.",
                         choices=TRANSFORMS)  # fmt: skip
    epochs: int = key(2, "Passes over the pairs.", least=1, most=1_000_000)
    batch_size: int = key(64, "Pairs per gradient step.", least=1, most=MOST_ROWS)
    learning_rate: float = key(1e-5, "Learning rate of AdamW, decayed linearly to 0.", above=0)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., 2021)."""

    rank: int = key(0, "Rank of the adapters that are trained on every block in place of its "
                    "weights; 0 for none.", least=0, most=MOST_WIDTH)  # fmt: skip
    alpha: float = key(16.0, "Scale of the adapters: their product is multiplied by alpha / rank.",
                       above=0)  # fmt: skip
    targets: tuple[str, ...] = key(
        ("q", "v"), f"Projections that have an adapter, among {', '.join(trainable.TARGETS)}."
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """What trades precision or time for memory."""

    compute_dtype: str = key("float32", "Dtype of activations and of the key-value cache.",
                             choices=DTYPES)  # fmt: skip
    param_dtype: str = key("float32", "Dtype of trained parameters.", choices=DTYPES)
    frozen_dtype: str = key("float32", "Dtype of frozen parameters: reference model, frozen trunk, "
                            "reward models.", choices=DTYPES)  # fmt: skip
    optimizer_dtype: str = key("float32", "Dtype of AdamW's moments.", choices=DTYPES)
    remat: str = key("dots", "Rematerialisation of transformer blocks. none stores all activations "
                     "for the backward pass; dots stores the results of matrix products with "
                     "weights and recomputes the rest; full stores each block's input only.",
                     choices=tuple(REMAT))  # fmt: skip
    accumulate: int = key(1, "Microbatches whose gradients are accumulated per gradient step; must "
                          "divide `train.minibatch_size`.", least=1, most=MOST_ROWS)  # fmt: skip
    lengths: int = key(1, "Lengths that responses are computed at in updates: each microbatch, of "
                       "responses of like length, at the shortest of this many that holds it. They "
                       "are as many as `accumulate` says, or, where it is 1, up to this many. Each "
                       "length is compiled; 1 pads all to `sampling.max_new_tokens`.",
                       least=1, most=16)  # fmt: skip
    rollout_rows: int = key(0, "Rows that the responses of a rollout take in turns, where one ends "
                            "the next: keys and values are held of no more. Of a policy that is "
                            "trained by itself; 0 for a row each.", least=0,
                            most=MOST_ROWS)  # fmt: skip
    chunk: int = key(1_024, "Tokens whose logits over the vocabulary are held in memory at once.",
                     least=1, most=MOST_TOKENS)  # fmt: skip
    device_gib: float = key(0.0, "Memory per device in GiB that `vbon plan` assumes; 0 takes this "
                            "machine's.", least=0)  # fmt: skip


def microbatches(train: Train, memory: Memory) -> int:
    """Into how many microbatches the rows of a gradient step are divided."""
    rows, most = train.minibatch_size, memory.lengths
    if memory.accumulate > 1:
        return memory.accumulate
    return next(d for d in range(min(most, rows), 0, -1) if rows % d == 0)


def check(train: Train, lora: Lora, memory: Memory) -> None:
    """Checks what the groups must obey together.

    Args:
      train: Batches, and which layers are trained.
      lora: Which projections have adapters.
      memory: Into how many microbatches a gradient step is divided.

    Raises:
      InputError: Names the keys, their values and what is allowed.
    """
    for holds, text in (
        (
            train.replay > 0 or train.batch_size % train.minibatch_size == 0,
            f"train.batch_size={train.batch_size} is not a multiple of "
            f"train.minibatch_size={train.minibatch_size}",
        ),
        (
            train.batch_size % train.group == 0,
            f"train.group={train.group} does not divide train.batch_size={train.batch_size}",
        ),
        (
            train.rows % train.minibatch_size == 0,
            f"train.batch_size={train.batch_size} responses and train.replay={train.replay} stored "
            f"samples for every train.group={train.group} of them are {train.rows} rows, not a "
            f"multiple of train.minibatch_size={train.minibatch_size}",
        ),
        (
            not (memory.rollout_rows and train.lookahead),
            f"memory.rollout_rows={memory.rollout_rows} and train.lookahead={train.lookahead}: "
            "next tokens are looked at where each response has a row; set one of them to 0",
        ),
        (
            not (train.replay and train.lookahead),
            f"train.replay={train.replay} and train.lookahead={train.lookahead}: next tokens are "
            "not known of stored samples, so set one of the two to 0",
        ),
        (
            train.warmup < train.iterations,
            f"train.warmup={train.warmup} must be less than train.iterations={train.iterations}",
        ),
        (
            train.baseline == "value" or train.group > 1,
            f"train.baseline={train.baseline} compares responses to one prompt, and "
            f"train.group={train.group}: set it to 2 or more",
        ),
        (
            not train.lookahead or (train.value_network == PREFIX and train.baseline != "group"),
            f"train.lookahead={train.lookahead} reads values of prefixes, and "
            f"train.value_network={train.value_network}, train.baseline={train.baseline}: set "
            "train.value_network=prefix and train.baseline=value or both",
        ),
        (
            train.minibatch_size % memory.accumulate == 0,
            f"memory.accumulate={memory.accumulate} does not divide "
            f"train.minibatch_size={train.minibatch_size}",
        ),
        (
            train.num_layers_unfrozen != 0,
            "train.num_layers_unfrozen=0 trains nothing: -1 trains all",
        ),
        (
            not lora.rank or train.num_layers_unfrozen == -1,
            f"lora.rank={lora.rank} and train.num_layers_unfrozen={train.num_layers_unfrozen}: "
            "adapters are on every layer, so set train.num_layers_unfrozen=-1, or lora.rank=0",
        ),
        (not lora.rank or bool(lora.targets), "lora.targets is empty: name at least one"),
        *(
            (
                target in trainable.TARGETS,
                f"lora.targets names {target!r}: choose from {', '.join(trainable.TARGETS)}",
            )
            for target in lora.targets
        ),
    ):
        if not holds:
            raise InputError(text)


def check_family(
    n: tuple[float, float], name: str, train: Train, lora: Lora, memory: Memory
) -> None:
    """Checks that one policy can be trained for every n.

    Args:
      n: the two that it is drawn between.
      name: the method's.
      train: how it is trained.
      lora: its adapters, which have the gates.
      memory: how responses are drawn.

    Raises:
      InputError: Names the keys, their values and what is allowed.
    """
    for holds, text in (
        (name == "vbon", f"method.name={name}: only vbon trains one policy for every n"),
        (
            lora.rank > 0,
            "lora.rank=0: the gates that n opens are those of adapters; set it, such as 16",
        ),
        (
            train.start == REFERENCE,
            f"train.start={train.start}: what it starts from would be of one n; set {REFERENCE}",
        ),
        (
            train.value_network == "head" or train.baseline == "group",
            f"train.value_network={train.value_network}: values must know n, and only those of a "
            "head on the policy do; set head, or train.baseline=group",
        ),
        (
            not memory.rollout_rows,
            f"memory.rollout_rows={memory.rollout_rows}: a row would go on with a response of "
            "another n; set 0",
        ),
    ):
        if not holds:
            raise InputError(f"method.n={n} and {text}")


def check_lookahead(train: Train, ties: str) -> None:
    """Checks that next tokens can be ranked.

    Args:
      train: says how many are.
      ties: how best-of-n chooses among equal rewards.

    Raises:
      InputError: by an order of the responses drawn, among which they are not.
    """
    if train.lookahead and ties == "order":
        raise InputError(
            f"train.lookahead={train.lookahead} ranks responses that were not drawn, which have no "
            f"place in the order of method.ties={ties}: set method.ties=random"
        )


def check_forward(train: Train, objective: str) -> None:
    """Checks that a forward KL is estimated from samples of the reference.

    Args:
      train: says how many there are beside the policy's responses.
      objective: of ``bon.distribution``.

    Raises:
      InputError: none, so that a response that the policy seldom draws would count without limit.
    """
    if objective == JEFFREYS and not train.replay:
        raise InputError(
            f"method.objective={objective} needs stored samples beside the rollouts, and "
            "train.replay=0: set it to train.group, so that each are half of a batch"
        )


def check_stored(train: Train, objective: str, name: str) -> None:
    """Checks that a method's update can learn from the reference's samples.

    Args:
      train: says whether it is to, at the start or beside its rollouts.
      objective: of ``bon.distribution``; "" where it has none.
      name: the method's.

    Raises:
      InputError: it cannot.
    """
    for asked, given, instead in (
        (train.start == REPLAY, f"train.start={train.start}", "weighted or reference"),
        (train.replay > 0, f"train.replay={train.replay}", "0"),
    ):
        if asked and not objective:
            raise InputError(
                f"{given}: {name} learns from responses of its anchor, not from stored samples; "
                f"set {instead}"
            )
