"""An example of a reward function: the sentiment of prompt and response by VADER's lexicon.

VADER (Hutto and Gilbert, 2014) needs no model and no labels, so it shows on any language model what
the alignment does. It comes with the package's extra ``vader``. As a config's reward:
``--config.reward.function=vbon_jax.rewards.vader:compound``.
"""

import functools
from collections.abc import Sequence
from typing import Any


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "VADER is not installed: pip install 'vbon_jax[vader]' (the package vaderSentiment)"
        ) from error
    return SentimentIntensityAnalyzer()


def compound(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Scores the sentiment of each text, prompt and response together.

    Args:
      prompts: texts.
      responses: as many, what a model wrote after them.

    Returns:
      VADER's compound score of prompt + response, in [-1, 1], 1 the most positive, rounded to four
      digits. It is 0 where no word is in the lexicon, so many responses tie.

    Raises:
      ImportError: the package vaderSentiment is not installed.
    """
    score = _analyzer().polarity_scores
    return [float(score(p + r)["compound"]) for p, r in zip(prompts, responses, strict=True)]
