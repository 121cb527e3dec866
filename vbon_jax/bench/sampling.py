"""A policy against best-of-n: seconds a prompt and tokens a second of drawing responses.

A batch has R rows. A policy answers R prompts with it, naive best-of-n R / n; with a shared prefix
the n responses to a prompt read it once. No response ends early unless a case says so.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bench.machine import Row, interleaved
from vbon_jax.bench.models import block_products
from vbon_jax.evaluation import measure
from vbon_jax.models import heads
from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.rewards import classifier
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.responses import Batch, Sampling
from vbon_jax.sampling.sampler import Sampler

SHORT, ENDS, NAIVE = 8, 20, 8  # tokens of a short prompt; one token in ENDS ends; n of naive BoN
SECTION = "sampling"


@dataclasses.dataclass(frozen=True)
class Work:
    """What is drawn.

    Attributes:
      rows: R, responses drawn at once.
      prompt: tokens of a prompt.
      new: tokens of a response.
      n: best of so many responses, with a shared prefix.
      pages: of work where responses end early, 4 R responses each.
    """

    rows: int = 64
    prompt: int = 128
    new: int = 64
    n: tuple[int, ...] = (2, 8, 32, 128)
    pages: int = 2


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One case.

    Attributes:
      seconds: the median.
      prompts: answered.
      tokens: of all responses.
    """

    seconds: float
    prompts: int
    tokens: int

    @property
    def each(self) -> float:
        """Seconds a prompt."""
        return self.seconds / self.prompts

    @property
    def rate(self) -> float:
        """Tokens of responses a second."""
        return self.tokens / self.seconds


# Draws responses of so many tokens, one to each row of prompt ids; says how many tokens they have.
Engine = Callable[[np.ndarray, int], int]
OURS = "vbon_jax"
# Cases that other engines draw too, as the table calls them.
COMMON = {
    "short": f"{SHORT}-token prompts", "policy": "policy", "one prompt": "one prompt for all rows",
}  # fmt: skip


def requests_of(ids_NxP: np.ndarray, each: int, share: bool = True) -> list[Request]:
    """Asks for ``each`` responses to every prompt.

    Args:
      ids_NxP: token ids of the prompts.
      each: responses a prompt.
      share: those to one prompt beside each other, so that they read it once; else none of a
        prompt's are neighbours, as long as there are two prompts.
    """
    prompts = [tuple(p) for p in ids_NxP.tolist()]
    if share:
        return [Request(i, k, p) for i, p in enumerate(prompts) for k in range(each)]
    return [Request(i, k, p) for k in range(each) for i, p in enumerate(prompts)]


def draws(
    model: LanguageModel,
    work: Work = Work(),
    repeats: int = 3,
    others: Mapping[str, Engine] | None = None,
) -> dict[str, dict[str, Drawn]]:
    """Measures how fast responses are drawn. Compilation is not counted.

    Args:
      model: whose tokens are drawn; its ids need not be text.
      work: how many.
      repeats: rounds; the median counts.
      others: engines that draw from the same weights, by name.

    Returns:
      Of "vbon_jax", by case: "short", R prompts of 8 tokens; "policy", R prompts; "naive", best of
      8 without a shared prefix; "bon 32", best of 32 with one, for every n; "one prompt", R
      responses to one; "prefill", one token to each of R prompts; "proposal", as "policy" with what
      corrected sampling asks of a proposal (both models' log-probs and a reward by a classifier of
      the model's size); "reward", that classifier alone; "ending", as "short" with R responses to a
      prompt, of which about 5% end at each token. Of each other engine the cases of ``COMMON``.

    Raises:
      ValueError: if there are fewer than 2 rows.
    """
    if work.rows < 2:
        raise ValueError(f"rows must be at least 2, got {work.rows}")
    R, rng = work.rows, np.random.default_rng(0)
    whole = Sampler(model, sharding.make_mesh(), Sampling(1.0, work.new, (), pad_id=0))
    ended = whole.at(end_ids=tuple(range(0, model.config.vocab_size, ENDS)))

    def prompts(count: int, length: int = work.prompt) -> np.ndarray:
        return rng.integers(0, model.config.vocab_size, (count, length))

    short, own, one = prompts(R, SHORT), prompts(R), prompts(1)
    naive = min(NAIVE, R // 2)
    asked = {
        "short": (whole, requests_of(short, 1)),
        "policy": (whole, requests_of(own, 1)),
        "naive": (whole, requests_of(prompts(R // naive), naive, share=False)),
        "one prompt": (whole, requests_of(one, R)),
        "prefill": (whole.at(max_new_tokens=1), requests_of(own, 1)),
        "ending": (ended, requests_of(prompts(4 * work.pages, SHORT), R)),
        **{f"bon {n}": (whole, requests_of(prompts(max(1, R // n)), n)) for n in work.n},
    }
    cases: dict[tuple[str, str], Callable[[], tuple[int, int]]] = {
        (OURS, case): partial(_draw, sampler, requests, R)
        for case, (sampler, requests) in asked.items()
    }
    cases |= _of_corrected(whole, asked["policy"][1])
    rows = {"short": short, "policy": own, "one prompt": one.repeat(R, axis=0)}
    for name, engine in (others or {}).items():
        for case, ids in rows.items():
            answered = 1 if case == "one prompt" else R
            cases[name, case] = partial(_draw_by, engine, ids, work.new, answered)
    found: dict[str, dict[str, Drawn]] = {}
    for (name, case), (seconds, drawn) in interleaved(cases, repeats).items():
        found.setdefault(name, {})[case] = Drawn(seconds, *drawn)
    return found


def _draw(sampler: Sampler, requests: Sequence[Request], rows: int) -> tuple[int, int]:
    """Draws responses; how many prompts they answer, and how many tokens they have."""
    batches = list(sampler.batches(jax.random.key(1), requests, rows))
    tokens = sum(int(b.rollout.mask_BxT[: b.size].sum()) for b in batches)
    return len({r.prompt_id for r in requests}), tokens


def _draw_by(engine: Engine, ids_BxP: np.ndarray, new: int, answered: int) -> tuple[int, int]:
    return answered, engine(ids_BxP, new)


def _of_corrected(
    sampler: Sampler, requests: Sequence[Request]
) -> dict[tuple[str, str], Callable[[], tuple[int, int]]]:
    """The cases "reward" and "proposal"."""
    config = sampler.model.config
    head = heads.init_score(config, 2, jax.random.key(2))
    params = {"decoder": sampler.model.params, "score": head}
    drawn = sampler.draw(jax.random.key(1), 0, requests)

    def reward(batch: Batch) -> jax.Array:
        tokens = jnp.concatenate([batch.prompts.tokens_BxP, batch.rollout.tokens_BxT], axis=1)
        mask = jnp.concatenate([batch.prompts.mask_BxP, batch.rollout.mask_BxT], axis=1)
        return classifier.score(params, tokens, mask, config=config, kind="logit", label=1)

    def rewarded() -> tuple[int, int]:
        jax.block_until_ready(reward(drawn))
        return len(requests), int(drawn.rollout.mask_BxT.sum())

    def proposed() -> tuple[int, int]:
        tokens = 0
        for batch in sampler.batches(jax.random.key(1), requests, len(requests)):
            ratio = measure.sequence_kls(sampler.model, sampler.model, batch)
            jax.block_until_ready((reward(batch), ratio))
            tokens += int(batch.rollout.mask_BxT[: batch.size].sum())
        return len(requests), tokens

    return {(OURS, "reward"): rewarded, (OURS, "proposal"): proposed}


def rows(
    found: Mapping[str, Mapping[str, Drawn]],
    config: DecoderConfig,
    work: Work,
    peak: float,
    copying: float,
) -> list[Row]:
    """Makes the lines of the table.

    Args:
      found: what `draws` returns.
      config: of the model.
      work: that was measured.
      peak: floating-point operations a second of the machine, of `machine.matrix_rate`.
      copying: bytes a second of its memory, of `machine.copy_rate`.
    """
    ours = found[OURS]
    policy, short, prefill = ours["policy"], ours["short"], ours["prefill"]
    blocks, head = 2 * config.layers * block_products(config), 2 * config.width * config.vocab_size
    drawing = (short.tokens + short.prompts * (SHORT - 1)) * blocks + short.tokens * head
    reading = 2.0 * (blocks + head) * work.new  # float32 weights, once a step
    filling = prefill.prompts * (work.prompt * blocks + head)

    def of_policy(what: str, drawn: Drawn) -> Row:
        return Row(SECTION, what, drawn.each, "s a prompt", drawn.each / policy.each, "the policy")

    def of_short(what: str, drawn: Drawn) -> Row:
        ratio = drawn.rate / short.rate
        return Row(SECTION, what, drawn.rate, "tokens/s", ratio, COMMON["short"])

    def of_machine(what: str, value: float, unit: str, share: float, ceiling: str) -> Row:
        return Row(SECTION, what, value, unit, share, ceiling)

    matrix, copy = "the matrix rate", "the copy rate"
    lines = [
        Row(SECTION, "policy", policy.each, "s a prompt"),
        *[of_policy(f"BoN({n}), {how}", drawn) for n, how, drawn in of_bon(ours)],
        of_policy("corrected, a proposal", ours["proposal"]),
        of_policy("reward by a model of its size, a response", ours["reward"]),
        Row(SECTION, "policy", policy.rate, "tokens/s"),
        of_machine(
            COMMON["short"], short.rate, "tokens/s", drawing / short.seconds / peak, matrix
        ),
        of_machine(
            f"{COMMON['short']}: weights read", reading / short.seconds / 1e9, "GB/s",
            reading / short.seconds / copying, copy,
        ),
        of_machine(
            "prefill of a batch", prefill.seconds, "s", filling / prefill.seconds / peak, matrix
        ),
        of_short(COMMON["one prompt"], ours["one prompt"]),
        of_short(f"{COMMON['short']}, 5% end at a token", ours["ending"]),
    ]  # fmt: skip
    for name in found.keys() - {OURS}:
        for case, what in COMMON.items():
            rate = found[name][case].rate
            ratio = ours[case].rate / rate
            lines.append(
                Row(SECTION, f"{what}, {name}", rate, "tokens/s", ratio, f"{OURS} to {name}")
            )
    return lines


def of_bon(ours: Mapping[str, Drawn]) -> list[tuple[int, str, Drawn]]:
    """(n, how, case) of every best-of-n that was measured."""
    n = round(ours["policy"].prompts / ours["naive"].prompts)
    shared = [(int(case[4:]), drawn) for case, drawn in ours.items() if case.startswith("bon ")]
    return [(n, "naive", ours["naive"]), *[(n, "shared prefix", d) for n, d in sorted(shared)]]
