"""Held-out evaluation: a split at a temperature, and what its figures are taken from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vbon_jax.bon import pool as bon_pool
from vbon_jax.bon.references import references
from vbon_jax.data import samples as sample_files
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.evaluation import measure
from vbon_jax.progress import reporting
from vbon_jax.rewards.base import Reward, counts_of
from vbon_jax.sampling.requests import Request, index, requests_for
from vbon_jax.sampling.responses import Batch, Response
from vbon_jax.sampling.sampler import Sampler, named_key
from vbon_jax.training.references import orders, response_orders


@dataclasses.dataclass(frozen=True)
class Models:
    """What every measurement needs, loaded once.

    Attributes:
      reference: the reference model; it is measured at other temperatures too.
      reward: the reward that best-of-n maximises.
      evaluator: a second reward that only measures; None without one.
    """

    reference: Sampler
    reward: Reward
    evaluator: Reward | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a split is measured.

    Attributes:
      n: of the best-of-n that policies are compared with.
      estimator: of log F.
      ties: how best-of-n chooses among equal rewards.
      m: opponents a prompt, and samples a prompt of the pool; policies are held against both.
      each: responses a prompt from each policy.
      batch_size: responses drawn at once.
      seed: of the draws.
    """

    n: float
    estimator: str = "interval"
    ties: str = "random"
    m: int = 64
    each: int = 4
    batch_size: int = 64
    seed: int = 0

    def key(self, name: str, split: str, temperature: float) -> jax.Array:
        """The key of a piece of the measurement."""
        key = named_key(self.seed, f"{name} {split}")
        return jax.random.fold_in(key, round(temperature * 1e6))


# (role, "opponents" or "pool"; the reference at the temperature; key) -> m samples a prompt
Draw = Callable[[str, Sampler, jax.Array], Sequence[PromptSamples]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A split at a temperature.

    Attributes:
      models: reference, at the temperature, and rewards.
      protocol: how it is measured.
      split: its name, "test" or "ood".
      prompts: held-out prompts.
      yardstick: the opponents that reference and best-of-n are compared with.
      pool_samples: other fresh reference samples, that best-of-n is read off.
      pool: their figures.
      all_samples: opponents and pool together, that a policy is compared with: it has no response
        in either, and twice the opponents halve the variance that they cause.
    """

    models: Models
    protocol: Protocol
    split: str
    prompts: Sequence[Prompt]
    yardstick: measure.Yardstick
    pool_samples: Sequence[PromptSamples]
    pool: measure.Responses
    all_samples: measure.Yardstick

    @property
    def temperature(self) -> float:
        """That everything is drawn and scored at."""
        return self.models.reference.settings.temperature

    def key(self, name: str) -> jax.Array:
        """The key of a piece of this split's measurement."""
        return self.protocol.key(name, self.split, self.temperature)

    def at(self, n: float) -> "HeldOut":
        """The same split for another n of best-of-n."""
        return dataclasses.replace(
            self,
            protocol=dataclasses.replace(self.protocol, n=n),
            yardstick=dataclasses.replace(self.yardstick, n=n),
            all_samples=dataclasses.replace(self.all_samples, n=n),
        )

    def policy(
        self, name: str, n: float, policy: Sampler, title: str, seed: int = 0
    ) -> tuple[dict[str, Any], list[list[Response]]]:
        """The row of a policy, without its speed, and the responses behind it.

        What the reward and the evaluator count (texts they cut, responses without an end, the means
        of their parts) stands in the row under the names of the metrics.

        Args:
          name: of the row.
          n: of the row.
          policy: drawn from at the split's temperature.
          title: of the progress line.
          seed: tells policies of one population apart.
        """
        m, each = self.models, self.protocol.each
        policy = policy.at(temperature=self.temperature)
        evaluate = (
            None if m.evaluator is None else policy.measure(m.evaluator, self.prompts, "evaluator")
        )

        def also(batch: Batch) -> dict[str, Any]:
            found = measure.sequence_kls(policy.model, m.reference.model, batch)
            return found | (evaluate(batch) if evaluate else {})

        requests = requests_for(self.prompts, each)
        key = jax.random.fold_in(self.key("policy"), seed)
        drawn: list[Response] = []
        self._counts()  # of what came before
        with reporting(title, len(requests)) as report:
            for group in policy.responses(
                key, self.prompts, requests, self.protocol.batch_size, m.reward, also
            ):
                drawn += group
                report.update(len(drawn))
        rows = measure.grouped(drawn, each)
        order = None
        if self.yardstick.references.order_PxM is not None:
            ids = [r.tokens for r in drawn]
            longest = policy.settings.max_new_tokens
            order = response_orders(ids, longest).reshape(len(rows), -1)
        row = measure.row(name, n, measure.of_policy(rows, order), self.all_samples)
        return row | self._counts(), rows

    def _counts(self) -> dict[str, float]:
        return counts_of(self.models.reward) | counts_of(self.models.evaluator, "evaluator")

    def reference(self) -> dict[str, Any]:
        """The row of the reference."""
        own = measure.of_reference(self.pool_samples, self.pool.order, self.protocol.each)
        return measure.row("reference", 1.0, own, self.yardstick)

    def bon(self, n: int) -> dict[str, Any]:
        """The row of best-of-n."""
        return measure.bon_row(n, self.pool, self.yardstick)

    def winners(self, n: int) -> list[list[tuple[str, float]]]:
        """Winners of best-of-n from the pool, as many a prompt as a policy gives: text, reward."""
        rng = np.random.default_rng(self.protocol.seed)
        columns = bon_pool.sample_winners(
            rng, self.pool.rewards, n, self.protocol.each, self.pool.order
        )
        return [
            [(x.responses[i], x.rewards[i]) for i in row]
            for x, row in zip(self.pool_samples, columns)
        ]

    def speed(self, model: Sampler, calls: int, scoring: bool) -> tuple[float, float]:
        """Responses and tokens a second; see ``measure.throughput``."""
        model = model.at(temperature=self.temperature)
        by_id, _ = index(self.prompts)
        size, count = self.protocol.batch_size, len(self.prompts)
        requests = [
            Request(p.id, i // count, p.tokens)
            for i, p in ((i, self.prompts[i % count]) for i in range(size))
        ]

        def pick(batch: Batch) -> Any:
            of = [by_id[r.prompt_id] for r in batch.requests]
            rollout = batch.rollout
            return self.models.reward(of, *batch.prompts, rollout.tokens_BxT, rollout.mask_BxT)

        return measure.throughput(
            lambda: next(model.batches(self.key("speed"), requests, size)),
            pick if scoring else None,
            calls,
        )


def open_split(
    models: Models,
    prompts: Sequence[Prompt],
    split: str,
    temperature: float,
    protocol: Protocol,
    draw: Draw,
) -> HeldOut:
    """Draws and scores what a split is measured with.

    Args:
      models: reference and rewards.
      prompts: held-out prompts.
      split: its name.
      temperature: that everything is drawn and scored at.
      protocol: how it is measured.
      draw: gives the samples of each role; a stage's goes by files in the workdir.
    """
    reference = models.reference.at(temperature=temperature)
    found = {
        role: draw(role, reference, protocol.key(role, split, temperature))
        for role in ("opponents", "pool")
    }
    by_order = protocol.ties == "order"
    order = {role: orders(x, protocol.m, reference) for role, x in found.items() if by_order}

    def yardstick(*roles: str) -> measure.Yardstick:
        evaluated = None
        if models.evaluator is not None:
            columns = [np.array([x.evaluator_rewards for x in found[role]]) for role in roles]
            evaluated = np.sort(np.concatenate(columns, axis=1), axis=1).astype(np.float32)
        table = references(
            np.concatenate([sample_files.rewards(found[role], protocol.m) for role in roles], 1),
            protocol.estimator,
            np.concatenate([order[role] for role in roles], axis=1) if by_order else None,
        )
        return measure.Yardstick(table, evaluated, protocol.n, protocol.estimator, temperature)

    pool = measure.of_reference(found["pool"], order.get("pool"))
    return HeldOut(
        dataclasses.replace(models, reference=reference), protocol, split, prompts,
        yardstick("opponents"), found["pool"], pool, yardstick("opponents", "pool"),
    )  # fmt: skip


def sample_lines(
    held: HeldOut, texts: dict[str, list[list[tuple[str, float]]]]
) -> list[dict[str, Any]]:
    """Lines of a samples file: {policy: (text, reward) of each response to each prompt}."""
    return [
        {
            "policy": policy,
            "temperature": held.temperature,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "response": text,
            "reward": reward,
        }
        for policy, groups in texts.items()
        for prompt, group in zip(held.prompts, groups, strict=True)
        for text, reward in group
    ]
