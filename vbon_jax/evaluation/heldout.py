"""Held-out evaluation: what a split is measured with, and the enumeration of the tabular world."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax.bon import log_f as lf
from vbon_jax.bon import pool as bon_pool
from vbon_jax.data import samples as reference_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.evaluation import exact as fixed_points
from vbon_jax.evaluation import measure
from vbon_jax.progress import reporting
from vbon_jax.sampling import responses
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.responses import Reward
from vbon_jax.sampling.sampler import Request, Sampling
from vbon_jax.stages import inputs
from vbon_jax.stages.inputs import Decoder, Run


@dataclasses.dataclass(frozen=True)
class Models:
    """What every measurement needs of a run, loaded once."""

    tokenizer: PreTrainedTokenizerFast
    reference: Decoder
    reward: Reward
    evaluator: Reward | None


def models(run: Run) -> Models:
    """Loads them from the workdir."""
    tokenizer = inputs.load_tokenizer(run)
    return Models(
        tokenizer,
        inputs.load_reference(run),
        inputs.load_reward(run, tokenizer),
        inputs.load_evaluator(run, tokenizer),
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A split at a temperature: its prompts, the opponents every response is compared with, and
    the pool of other fresh reference samples that best-of-n is read off."""

    run: Run
    models: Models
    split: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    yardstick: measure.Yardstick
    pool_samples: Sequence[PromptSamples]
    pool: measure.Responses

    def key(self, name: str) -> jax.Array:
        return _key(self.run, name, self.split, self.sampling.temperature)

    def policy(
        self, name: str, n: float, policy: Decoder, title: str, seed: int = 0
    ) -> tuple[dict[str, Any], list[list[responses.Response]]]:
        """The row of a policy, without its speed, and the responses behind it.

        What the reward and the evaluator count (texts they cut, responses without an end, the
        means of their parts) stands in the row under the names of the metrics.
        """
        s, m = self.run.settings, self.models

        def kls(batch: engine.Batch) -> dict[str, jax.Array]:
            found = measure.sequence_kls(
                policy.params["decoder"], m.reference.params["decoder"], batch.prompts,
                batch.rollout, np.float32(self.sampling.temperature), config=policy.config,
                ref_config=m.reference.config,
            )  # fmt: skip
            also = responses.also_evaluator(m.evaluator, self.prompts)
            return found | (also(batch) if also else {})

        each = s.evaluate.samples_per_prompt
        requests = responses.requests_for(self.prompts, each)
        drawn: list[responses.Response] = []
        _counts(m)  # of what came before
        with reporting(title, len(requests)) as report:
            for group in responses.scored(
                policy, self.sampling, self.run.mesh, jax.random.fold_in(self.key("policy"), seed),
                self.prompts, requests, s.sampling.batch_size, m.reward, m.tokenizer, kls,
            ):  # fmt: skip
                drawn += group
                report.update(len(drawn))
        rows = measure.grouped(drawn, each)
        by_order = self.yardstick.references.order_PxM is not None
        order = _orders(rows, self.sampling.max_new_tokens) if by_order else None
        row = measure.row(name, n, measure.of_policy(rows, order), self.yardstick)
        return row | _counts(m), rows

    def reference(self) -> dict[str, Any]:
        """The row of the reference."""
        each = self.run.settings.evaluate.samples_per_prompt
        order = self.pool.order
        own = measure.of_reference(self.pool_samples, order, each)
        return measure.row("reference", 1.0, own, self.yardstick)

    def bon(self, n: int) -> dict[str, Any]:
        """The row of best-of-n."""
        return measure.bon_row(n, self.pool, self.yardstick)

    def winners(self, n: int) -> list[list[tuple[str, float]]]:
        """Winners of best-of-n from the pool, as many a prompt as a policy gives: text, reward."""
        each = self.run.settings.evaluate.samples_per_prompt
        rng = np.random.default_rng(self.run.settings.seed)
        columns = bon_pool.sample_winners(rng, self.pool.rewards, n, each, self.pool.order)
        return [
            [(x.responses[i], x.rewards[i]) for i in row]
            for x, row in zip(self.pool_samples, columns)
        ]

    def speed(self, model: Decoder, calls: int, scoring: bool) -> tuple[float, float]:
        """Responses and tokens a second; see ``measure.throughput``."""
        by_id = {p.id: p for p in self.prompts}
        size = self.run.settings.sampling.batch_size
        count = len(self.prompts)
        requests = [
            Request(p.id, i // count, p.tokens)
            for i, p in ((i, self.prompts[i % count]) for i in range(size))
        ]
        return measure.throughput(
            lambda: next(
                engine.generate(
                    model.params["decoder"], model.config, self.sampling, self.run.mesh,
                    self.key("speed"), requests, size,
                )
            ),
            (lambda batch: responses.score_batch(self.models.reward, batch, by_id))
            if scoring
            else None,
            calls,
        )  # fmt: skip


def _counts(m: Models) -> dict[str, float]:
    return responses.counts_of(m.reward) | responses.counts_of(m.evaluator, "evaluator")


def _key(run: Run, name: str, split: str, temperature: float) -> jax.Array:
    return jax.random.fold_in(run.key(f"{name} {split}"), round(temperature * 1e6))


def _orders(rows: Sequence[Sequence[responses.Response]], longest: int) -> np.ndarray:
    """The places of responses in the total order, uint32 [P, S]."""
    tokens = np.zeros((len(rows) * len(rows[0]), longest), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, r in enumerate(r for row in rows for r in row):
        tokens[i, : len(r.tokens)], mask[i, : len(r.tokens)] = r.tokens, True
    return np.asarray(lf.response_order(tokens, mask)).reshape(len(rows), -1)


def open_split(
    run: Run, loaded: Models, split: str, temperature: float, n: float, m: int
) -> HeldOut:
    """Draws and scores what a split is measured with, unless it is in the workdir already.

    Args:
      n: of the best-of-n that policies are held against.
      m: opponents a prompt, and samples a prompt of the pool.
    """
    s = run.settings
    prompts = inputs.load_prompts(run, split)
    sampling = inputs.sampling(run, loaded.tokenizer, temperature)
    found = {}
    for role in ("opponents", "pool"):
        path = run.workdir.held_out(role, split, temperature, m)
        responses.write_samples(
            path, f"{role} ({split}) at T={temperature:g}", loaded.reference, sampling, run.mesh,
            _key(run, role, split, temperature), prompts, m, s.sampling.batch_size, loaded.reward,
            loaded.tokenizer, loaded.evaluator,
        )  # fmt: skip
        found[role] = reference_files.samples_of(path, prompts, m)
    yardstick = measure.Yardstick(
        inputs.references(run, loaded.tokenizer, found["opponents"], m, s.method.estimator),
        None
        if loaded.evaluator is None
        else np.sort([x.evaluator_rewards for x in found["opponents"]], axis=1).astype(np.float32),
        n,
        s.method.estimator,
        temperature,
    )
    order = (
        None
        if s.method.ties == "random"
        else inputs.orders(run, loaded.tokenizer, found["pool"], m)
    )
    pool = measure.of_reference(found["pool"], order)
    return HeldOut(run, loaded, split, prompts, sampling, yardstick, found["pool"], pool)


def sample_lines(
    held: HeldOut, texts: dict[str, list[list[tuple[str, float]]]]
) -> list[dict[str, Any]]:
    """Lines of a samples file: {policy: (text, reward) of each response to each prompt}."""
    return [
        {
            "policy": policy,
            "temperature": held.sampling.temperature,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "response": text,
            "reward": reward,
        }
        for policy, groups in texts.items()
        for prompt, group in zip(held.prompts, groups, strict=True)
        for text, reward in group
    ]


def enumerate_world(run: Run, loaded: Models, policy: Decoder, n: float) -> dict[str, float]:
    """The tabular world's enumeration, over its training prompts."""
    s = run.settings
    prompts = inputs.load_prompts(run, "train")
    strings = tabular.strings()
    ids = np.array([tokenizers.encode(loaded.tokenizer, text) for text in strings], np.int32)
    mask = np.ones(ids.shape, bool)
    return measure.exact(
        policy.params["decoder"],
        loaded.reference.params["decoder"],
        [p.tokens for p in prompts],
        ids,
        np.array([world_rewards(run, p.text, strings) for p in prompts]),
        n,
        s.sampling.temperature,
        config=policy.config,
        ref_config=loaded.reference.config,
        order_S=np.asarray(lf.response_order(ids, mask)) if s.method.ties == "order" else None,
    )


def fixed_point(
    run: Run, loaded: Models, policy: Decoder, method: str, n: float, beta: float | None
) -> dict[str, Any]:
    """The tabular world's exact figures of a policy; see ``fixed_points.row``."""
    s = run.settings
    prompts = inputs.load_prompts(run, "train")
    strings = tabular.strings()
    ids = np.array([tokenizers.encode(loaded.tokenizer, text) for text in strings], np.int32)
    log_p, log_ref = (
        [
            measure.string_log_probs(
                model.params["decoder"], model.config, p.tokens, ids, s.sampling.temperature
            )
            for p in prompts
        ]
        for model in (policy, loaded.reference)
    )
    rewards = np.array([world_rewards(run, p.text, strings) for p in prompts])
    return fixed_points.row(method, n, beta, log_p, log_ref, rewards, n, s.offline.labels)


def world_rewards(run: Run, prompt: str, strings: Sequence[str]) -> np.ndarray:
    """The run's reward of every response of the tabular world, float64 [S]."""
    from vbon_jax.rewards import function

    name = run.settings.reward.function
    values = function.call(name, function.load(name), [prompt] * len(strings), list(strings))
    return values.astype(np.float64)
