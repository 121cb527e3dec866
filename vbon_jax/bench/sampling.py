"""Tokens a second of drawing responses, on random weights: shared prompts, and rows that end early.

python -m vbon_jax.bench.sampling --model=smollm2-135m
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vbon_jax import sharding
from vbon_jax.bench.ppo import GPT2_SMALL, MODELS
from vbon_jax.models import decoder
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.sampler import Sampler, Sampling

SHORT, ENDS = 8, 20  # tokens of a short prompt; one token in so many ends a response
CASES = ("short", "shared", "own", "ending")


def rates(
    config: DecoderConfig = GPT2_SMALL,
    rows: int = 64,
    prompt: int = 128,
    new_tokens: int = 64,
    pages: int = 4,
    repeats: int = 3,
) -> dict[str, float]:
    """Measures how fast responses are drawn. Compilation is not counted.

    Args:
      config: the decoder, whose weights are random.
      rows: responses drawn at once.
      prompt: tokens of a long prompt.
      new_tokens: the longest response.
      pages: of work where responses end early, 4 x ``rows`` responses each.
      repeats: times each case is measured, in turns; the median counts.

    Returns:
      Tokens of responses a second: "short" of prompts of 8 tokens, a prompt a row; "shared" of one
      prompt of ``prompt`` tokens for all rows; "own" of such a prompt for each row; "ending" as
      "short", with ``rows`` responses to a prompt of which about 5% end at each token.
    """
    mesh, rng = sharding.make_mesh(), np.random.default_rng(0)
    model = LanguageModel(config, decoder.init(config, jax.random.key(0)), tokenizer=None)

    def requests(prompts: int, length: int, each: int) -> list[Request]:
        found = rng.integers(0, config.vocab_size, (prompts, length)).tolist()
        return [Request(i, k, tuple(p)) for i, p in enumerate(found) for k in range(each)]

    whole = Sampler(model, mesh, Sampling(1.0, new_tokens, (), pad_id=0))
    ended = whole.at(end_ids=tuple(range(0, config.vocab_size, ENDS)))
    cases = {
        "short": (whole, requests(rows, SHORT, 1)),
        "shared": (whole, requests(1, prompt, rows)),
        "own": (whole, requests(rows, prompt, 1)),
        "ending": (ended, requests(4 * pages, SHORT, rows)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    tokens: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, (sampler, asked) in cases.items():
            begin = time.perf_counter()
            batches = list(sampler.batches(jax.random.key(1), asked, rows))
            tokens[name] = sum(int(b.rollout.mask_BxT[: b.size].sum()) for b in batches)
            if repeat:  # the first compiles
                seconds[name].append(time.perf_counter() - begin)
    return {name: tokens[name] / statistics.median(seconds[name]) for name in cases}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the rates of a model, and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m vbon_jax.bench.sampling", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    found = rates(MODELS[args.model], rows=args.rows, repeats=args.repeats)
    table = Table("responses", "tokens/s", "share of the first")
    names = (
        "to 8-token prompts, a prompt a row",
        "to one 128-token prompt",
        "to 128-token prompts, a prompt a row",
        "to 8-token prompts, 5% end at a token",
    )
    for name, case in zip(names, CASES, strict=True):
        table.add_row(name, f"{found[case]:,.0f}", f"{found[case] / found['short']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
