"""What a method is: a record that everything which lists methods reads.

Adding a method is a file with its options (a dataclass), its step and a ``Method`` record, a line
in ``vbon_jax/methods/__init__.py``, and a test.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vbon_jax import keys
from vbon_jax.bon.log_f import ESTIMATORS, TIES
from vbon_jax.keys import SPAN, key
from vbon_jax.training.learner import Member, Update
from vbon_jax.training.offline import Choices
from vbon_jax.training.options import Offline as OfflineKeys
from vbon_jax.training.options import Train
from vbon_jax.training.scoring import Setup

BEST_OF_N = "bon"  # as `method.name`: best-of-n itself, which trains nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every method is told: the best-of-n that it aims at or, having no n, is compared with.

    Attributes:
      n: of best-of-n; two numbers for a family of policies, see ``models.family``.
      estimator: of log F.
      ties: how best-of-n chooses among equal rewards.
    """

    n: SPAN = key(8.0, "The n of best-of-n: any real number of at least 1, a whole one for "
                       "bon_sft and bonbon. Of vbon also two, `(2, 64)`: one policy for every n "
                       "from 1 to the second, trained between them; its adapters (`lora.rank`) "
                       "are opened as far as n asks for.", least=1)  # fmt: skip
    estimator: str = key("interval", "Estimator of log F from the reference samples; interval "
                         "estimates the density ratio of best-of-n directly.",
                         choices=ESTIMATORS)  # fmt: skip
    ties: str = key("random", "Choice of best-of-n among equal rewards: random, or by a fixed "
                    "order of responses (pairs of dpo and bonbon: always random).",
                    choices=TIES)  # fmt: skip

    def __post_init__(self) -> None:
        """Raises InputError on a value that is out of range."""
        keys.check(self, type(self).__name__)

    @property
    def is_family(self) -> bool:
        """Whether one policy is trained for every n between two."""
        return isinstance(self.n, tuple)

    @property
    def low(self) -> float | None:
        """The least n that a family is trained for; None of one policy."""
        return self.n[0] if isinstance(self.n, tuple) else None

    @property
    def top(self) -> float:
        """The n, or the largest of a family."""
        return self.n[1] if isinstance(self.n, tuple) else self.n


def beta_key() -> Any:
    """The coefficient of KL(policy || reference)."""
    return key(1 / 7, "Of ppo, dpo and qrpo: KL coefficient; 1/(n-1) matches best-of-n.", above=0)


def taken(cls: type, *groups: Any) -> Any:
    """Options of a method from config groups: each field from the first group that has it."""
    return cls(
        **{
            f.name: next(getattr(g, f.name) for g in groups if hasattr(g, f.name))
            for f in dataclasses.fields(cls)
        }
    )


@dataclasses.dataclass(frozen=True)
class Online:
    """A method that learns from rollouts.

    Attributes:
      build: (options, setup) -> the update, a pure function: (state, reference params, scored
        rollouts, references, n, beta) -> (state, metrics). ``setup`` has everything static.
      iteration: (learner, state, step) -> (state, metrics): roll out, score, update.
      sources: the entries of the state's params that respond to each prompt, in order.
      values: whether it learns a value function beside the policy.
      anchor: whether its state holds a moving copy of the policy, "anchor".
      microbatches: whether its update can go by microbatches (`memory.accumulate`).
      passes: training options -> gradient passes over a rollout.
      objective: options -> that of ``bon.distribution`` whose sequence reward it maximises; ""
        where it has none of these.
    """

    build: Callable[[Any, Setup], Update]
    iteration: Callable[[Any, Any, int], tuple[Any, dict[str, Any]]]
    sources: tuple[str, ...] = ("decoder",)
    values: bool = True
    anchor: bool = False
    microbatches: bool = True
    passes: Callable[[Train], int] = lambda train: train.ppo_epochs
    objective: Callable[[Any], str] = lambda options: ""


@dataclasses.dataclass(frozen=True)
class Offline:
    """A method that learns from stored samples.

    Attributes:
      choose: (rewards [P, M], member, offline options, places in the total order [P, M] or None) ->
        its training examples.
      coefficients: (member, mean -log pi_ref of the examples' best, nats) -> (beta, alpha) of the
        loss.
      loss: (log pi of best [B], log-ratio of best [B], of worst [B] or None, target [B], beta,
        alpha) -> loss [B]; None for maximum likelihood on the best.
      pairs: whether the loss compares best with worst; if not, it is told of no worst.
      weights: (rewards [P, M], member, places in the total order or None) -> the probability of
        each sample under the method's optimum, rows summing to 1. Where it is given, training is
        judged by KL(optimum || policy) on the samples of prompts that are held out, ends when that
        has stopped falling, and gives the best weights, not the last; None trains to the end.
    """

    choose: Callable[[np.ndarray, Member, OfflineKeys, np.ndarray | None], Choices]
    coefficients: Callable[[Member, float], tuple[float, float]] = lambda member, nll: (
        member.beta,
        0.0,
    )
    loss: Callable[..., jax.Array] | None = None
    pairs: bool = True
    weights: Callable[[np.ndarray, Member, np.ndarray | None], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of a sweep: a method under fixed options over a grid of values.

    Attributes:
      label: of its rows, and of its grid, the config key ``sweep.<label>``.
      name: what a reader sees.
      color: of figures.
      marker: of figures, matplotlib's.
      doc: of the grid's key.
      varies: the option that the grid gives values of: "n" or "beta".
      fixed: values of other options.
      offline: values of offline options.
      estimators: where the curve needs an estimator of its own: what ``sweep.<label>_estimator``
        may be, its default first.
      optimum: (log pi_ref [S], rewards [S], n, beta, offline options) -> log-probabilities, float64
        nats [S], of what the method converges to in a world whose S responses are enumerated; None
        where there is no closed form.
      formula: of the optimum, for tables.
      in_front: whether the main Pareto figure shows it.
      variant: names the options in the digests of sweep folders.
    """

    label: str
    name: str
    color: str
    marker: str
    doc: str
    optimum: Callable[[np.ndarray, np.ndarray, float, float, OfflineKeys], np.ndarray | None]
    formula: str
    varies: str = "n"
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    offline: dict[str, Any] = dataclasses.field(default_factory=dict)
    estimators: tuple[str, ...] = ()
    in_front: bool = True
    variant: str = "exact"


@dataclasses.dataclass(frozen=True)
class Method:
    """A training algorithm.

    Attributes:
      name: of ``method.name``.
      options: its options, a frozen dataclass of keys with defaults.
      from_config: config -> its options.
      learns: from rollouts (Online) or from stored samples (Offline).
      series: its curves in sweeps and figures.
      group: its own config group: (name, dataclass of keys); None where it has none.
      when: config -> whether this record is meant, where several share a name.
      check: options -> why they cannot be trained on, "" where they can.
      check_n: n -> why it cannot be that, "" where it can.
      check_samples: (offline options, m) -> why m samples a prompt cannot serve them, "" where they
        can.
      whole_n: whether it takes the best of a whole number n of the stored samples.
    """

    name: str
    options: type
    from_config: Callable[[Any], Any]
    learns: Online | Offline
    series: tuple[Series, ...] = ()
    group: tuple[str, type] | None = None
    when: Callable[[Any], bool] = lambda config: True
    check: Callable[[Any], str] = lambda options: ""
    check_n: Callable[[float], str] = lambda n: ""
    check_samples: Callable[[OfflineKeys, int], str] = lambda offline, m: ""
    whole_n: bool = False

    @property
    def online(self) -> bool:
        """Whether it learns from rollouts."""
        return isinstance(self.learns, Online)

    @property
    def microbatches(self) -> bool:
        """Whether its update can go by microbatches."""
        return isinstance(self.learns, Online) and self.learns.microbatches

    @property
    def values(self) -> bool:
        """Whether it learns a value function."""
        return isinstance(self.learns, Online) and self.learns.values
