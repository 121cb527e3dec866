"""Held-out evaluation: the rows of one temperature, and the enumeration of the tabular world."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax import inputs, responses
from vbon_jax.data import reference as reference_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.evaluation import measure
from vbon_jax.inputs import Decoder, Run
from vbon_jax.progress import log, reporting
from vbon_jax.sampling import engine
from vbon_jax.sampling.engine import Request

MOST_DRAWN = 20_000_000  # responses held in memory at once


def evaluate_at(
    run: Run,
    temperature: float,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    reference: Decoder,
    policy: Decoder,
    score: responses.Reward,
) -> list[tuple[dict[str, Any], measure.Measured]]:
    """The rows of one temperature, each with the responses behind it."""
    s = run.settings
    e, n, batch_size = s.evaluate, s.method.n, s.sampling.batch_size
    whole = int(n) if float(n).is_integer() else None
    if len(prompts) * e.samples_per_prompt * (whole or 1) > MOST_DRAWN:
        raise InputError(
            f"method.n={n:g} x evaluate.samples_per_prompt={e.samples_per_prompt} x {len(prompts)} "
            f"prompts is more than {MOST_DRAWN:,} reference responses for best-of-n: lower one"
        )
    if whole is None:
        log(f"evaluate: method.n={n} is not a whole number, so best-of-n cannot be drawn")
    sampling = inputs.sampling(run, tokenizer, temperature)
    number = round(temperature * 1e6)

    def key(name: str) -> jax.Array:
        return jax.random.fold_in(run.key(name), number)

    path = run.workdir.opponents(temperature, e.m)
    responses.write_samples(
        path, f"opponents at T={temperature:g}", reference, sampling, run.mesh, key("opponents"),
        prompts, e.m, batch_size, score, tokenizer,
    )  # fmt: skip
    yardstick = measure.Yardstick(
        reference_files.sorted_rewards_of(path, prompts, e.m),
        n,
        s.method.estimator,
        temperature,
    )

    def draw(model: Decoder, name: str, count: int, also: Any = None) -> list[list[Any]]:
        requests = responses.requests_for(prompts, count)
        drawn: list[responses.Response] = []
        with reporting(f"{name} at T={temperature:g}", len(requests)) as report:
            for group in responses.scored(
                model, sampling, run.mesh, key(name), prompts, requests, batch_size, score,
                tokenizer, also,
            ):  # fmt: skip
                drawn += group
                report.update(len(drawn))
        return measure.grouped(drawn, count)

    def kls(batch: engine.Batch) -> dict[str, jax.Array]:
        return measure.sequence_kls(
            policy.params["decoder"], reference.params["decoder"], batch.prompts, batch.rollout,
            np.float32(temperature), config=policy.config, ref_config=reference.config,
        )  # fmt: skip

    def speed(model: Decoder, calls: int, scoring: bool) -> tuple[float, float]:
        texts = {p.id: p.text for p in prompts}
        requests = [
            Request(p.id, i // len(prompts), p.tokens)
            for i, p in ((i, prompts[i % len(prompts)]) for i in range(batch_size))
        ]
        return measure.throughput(
            lambda: next(
                engine.generate(
                    model.params["decoder"], model.config, sampling, run.mesh, key("speed"),
                    requests, batch_size,
                )
            ),
            (lambda batch: responses.score_batch(score, batch, texts)) if scoring else None,
            calls,
        )  # fmt: skip

    pool = draw(reference, "reference", e.samples_per_prompt * (whole or 1))
    measured_reference = measure.of_reference([group[:: whole or 1] for group in pool])
    rows = [
        (
            measure.row(
                "reference", 1.0, measured_reference, yardstick, speed(reference, 1, False)
            ),
            measured_reference,
        )
    ]
    if whole is not None:
        bon = measure.of_bon(pool, whole)
        rows.append((measure.row("bon", n, bon, yardstick, speed(reference, whole, True)), bon))
    drawn = measure.of_policy(draw(policy, "policy", e.samples_per_prompt, kls))
    rows.append((measure.row(s.method.name, n, drawn, yardstick, speed(policy, 1, False)), drawn))
    return rows


def enumerate_world(
    run: Run, tokenizer: PreTrainedTokenizerFast, reference: Decoder, policy: Decoder
) -> dict[str, float]:
    """The tabular world's enumeration, over its training prompts."""
    s = run.settings
    prompts = inputs.load_prompts(run, "train")
    strings = tabular.strings()
    return measure.exact(
        policy.params["decoder"],
        reference.params["decoder"],
        [p.tokens for p in prompts],
        np.array([tokenizers.encode(tokenizer, text) for text in strings], np.int32),
        np.array([tabular.reward([p.text] * len(strings), strings) for p in prompts]),
        s.method.n,
        s.sampling.temperature,
        config=policy.config,
        ref_config=reference.config,
    )
