"""The table of reference rewards that log F is read off, from stored samples."""

from collections.abc import Sequence

import numpy as np

from vbon_jax.bon import log_f
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.amortised import Prior
from vbon_jax.bon.references import References
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.samples import PromptSamples
from vbon_jax.progress import log
from vbon_jax.sampling.sampler import Sampler


def references(
    samples: Sequence[PromptSamples],
    m: int,
    estimator: str,
    ties: str,
    sampler: Sampler,
    prior: Prior | None = None,
) -> References:
    """The first m reference rewards of each prompt, as the density of best-of-n is read off them.

    Args:
      samples: P prompts with their responses.
      m: responses of each that count at most, from the first.
      estimator: of log F.
      ties: "random", or "order" for the fixed total order of responses.
      sampler: whose tokenizer and length limit the order is taken under.
      prior: what a head says of the same prompts, of which some may then have no samples.
    """
    order_PxM = orders(samples, m, sampler) if ties == "order" else None
    rewards_PxM, m_P = sample_files.padded_rewards(samples, m, 1 if prior is None else 0)
    whole = bool((m_P == m).all())
    table = bon_references.references(
        rewards_PxM, estimator, order_PxM, None if whole else m_P, prior
    )
    if table.fit is not None:
        failed = int(np.sum(~np.asarray(table.fit.converged_P)))
        log(
            f"exponential: {failed} of {len(samples)} prompts have no curve that fits their {m} "
            "rewards and take the smoothed estimate"
        )
    return table


def orders(samples: Sequence[PromptSamples], m: int, sampler: Sampler) -> np.ndarray:
    """The place of each prompt's first m responses in the total order of responses.

    The order is over token ids; a file without them has its texts encoded.

    Returns:
      uint32 [P, M], 0 where a prompt has fewer.
    """
    rows = []
    for of_prompt in samples:
        prompt = of_prompt.prompt_tokens or tokenizers.begun(
            sampler.tokenizer, tokenizers.encode(sampler.tokenizer, of_prompt.prompt)
        )
        rows += [
            sampler.stored_ids(of_prompt, i, prompt)
            for i in range(min(m, len(of_prompt.responses)))
        ]
    real_PxM = np.arange(m) < np.array([[len(x.responses)] for x in samples])
    found = np.zeros(real_PxM.shape, np.uint32)
    found[real_PxM] = response_orders(rows, sampler.settings.max_new_tokens)
    return found


def response_orders(rows: Sequence[Sequence[int]], longest: int) -> np.ndarray:
    """The place of each response, given as token ids, in the total order: uint32 [N]."""
    tokens = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return np.asarray(log_f.response_order(tokens, mask))
