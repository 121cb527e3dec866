"""An enumerable world, of which every quantity can be computed exactly.

A prompt is one of 6 letters and a response is 4 letters, hence 1296 responses to each of 6 prompts.
The corpus is drawn from a fixed second-order Markov process; the reward is a fixed table, or the
verdict of a fixed rule, 0 or 1.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from vbon_jax.data.sources.text import Example

ALPHABET = "abcdef"
LENGTH = 4

# The world is fixed: these are not settings, and the seeds of functions only draw from it.
_TRANSITION_SEED = 20
_REWARD_SEED = 21
_FLOOR = 0.1  # share of each transition that is uniform, so that no string is impossible


def strings(alphabet: str = ALPHABET, length: int = LENGTH) -> list[str]:
    """Enumerates all strings of a length.

    Args:
      alphabet: the letters.
      length: the number of letters of a string.

    Returns:
      len(alphabet) ** length strings, the last letter changing fastest.
    """
    return ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]


@functools.cache
def _transitions() -> np.ndarray:
    """P(next letter | letter before last, last letter), float64 [7, 6, 6]; row 6: no letter."""
    size = len(ALPHABET)
    drawn = np.random.default_rng(_TRANSITION_SEED).dirichlet(np.ones(size), (size + 1, size))
    return (1 - _FLOOR) * drawn + _FLOOR / size


@functools.cache
def reward_table() -> np.ndarray:
    """Returns the reward of every response to every prompt.

    Returns:
      float32 [6, 1296], read-only: prompts in the order of ALPHABET, responses in that of
      `strings()`. Standard normal draws, all different within a row.
    """
    shape = (len(ALPHABET), len(ALPHABET) ** LENGTH)
    table = np.random.default_rng(_REWARD_SEED).standard_normal(shape).astype(np.float32)
    table.flags.writeable = False
    return table


@functools.cache
def _columns() -> dict[str, int]:
    return {response: column for column, response in enumerate(strings())}


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Looks up the reward of each response to its prompt in `reward_table`.

    Args:
      prompts: one letter of ALPHABET each.
      responses: LENGTH letters of ALPHABET each, as many as prompts.

    Returns:
      The rewards; each is a float32 value.

    Raises:
      ValueError: the numbers of prompts and responses differ, or one is not of this world.
    """
    _check_world(prompts, responses)
    table, columns = reward_table(), _columns()
    return [
        float(table[ALPHABET.index(prompt), columns[response]])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def verifier(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Scores a response 1 if its first letter equals its last, else 0; nearly all are tied.

    Depending on the prompt, 14% to 19% of responses pass under the process that the corpus is drawn
    from.

    Args:
      prompts: one letter of ALPHABET each; the rule does not depend on them.
      responses: LENGTH letters of ALPHABET each, as many as prompts.

    Returns:
      1.0 for a response that passes, else 0.0.

    Raises:
      ValueError: the numbers of prompts and responses differ, or one is not of this world.
    """
    _check_world(prompts, responses)
    return [float(response[0] == response[-1]) for response in responses]


def _check_world(prompts: Sequence[str], responses: Sequence[str]) -> None:
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    columns = _columns()
    for prompt, response in zip(prompts, responses, strict=True):
        if len(prompt) != 1 or prompt not in ALPHABET:
            raise ValueError(f"prompt {prompt!r} is not one letter of {ALPHABET!r}")
        if response not in columns:
            raise ValueError(
                f"response {response!r} to {prompt!r} is not {LENGTH} letters of {ALPHABET!r}; "
                f"sample exactly {LENGTH} tokens with the tokenizer of kind 'characters'"
            )


def corpus(seed: int, count: int) -> list[Example]:
    """Draws texts of a prompt letter and 4 response letters, each prompt letter equally often.

    Args:
      seed: seed of the draws; the process itself is fixed.
      count: number of texts; text i begins with letter i modulo 6.

    Returns:
      Examples labelled 1 where the reward is above the median reward of the prompt, else 0.
    """
    rng = np.random.default_rng(seed)
    transitions = _transitions()
    size = len(ALPHABET)
    letters = np.empty((count, 1 + LENGTH), np.int64)
    letters[:, 0] = np.arange(count) % size
    before_last = np.full(count, size)
    for position in range(LENGTH):
        probs = transitions[before_last, letters[:, position]]
        below = np.cumsum(probs[:, :-1], axis=1) <= rng.random((count, 1))  # inverse CDF
        before_last = letters[:, position]
        letters[:, position + 1] = below.sum(axis=1)
    medians = np.median(reward_table(), axis=1)
    texts = ["".join(ALPHABET[letter] for letter in row) for row in letters]
    rewards = reward([text[0] for text in texts], [text[1:] for text in texts])
    labels = np.asarray(rewards) > medians[letters[:, 0]]
    return [Example(text, int(label)) for text, label in zip(texts, labels, strict=True)]
