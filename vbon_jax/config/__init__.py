"""The configuration of a run: typed groups of keys with defaults, checked once, at the start.

A config file (``configs/*.py``) is data: ``default()`` and what differs from it. The command line
turns it into frozen dataclasses by ``parse``, and nothing below the stages sees the config.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vbon_jax import keys
from vbon_jax.config.checks import check, template_arguments
from vbon_jax.config.groups import (
    METHOD_GROUPS,
    Config,
    Evaluator,
    Fit,
    Model,
    Reward,
    RewardPart,
)
from vbon_jax.keys import as_dict, flatten

# Keys that the first workdirs were written without: the digests in their file names lack them.
ADDED = frozenset({
    "data.hub", "data.text_column", "data.label_column", "data.train_split", "data.test_split",
    "prompts.hub", "prompts.column", "prompts.train_split", "prompts.test_split", "prompts.date",
    "tokenizer.add_bos", "sampling.end_tokens", "reward.template_arguments",
    "evaluator.template_arguments", "train.group", "train.kl_target", "train.warmup",
    "train.baseline", "train.average_half_life", "train.start", "train.optimizer", "train.replay",
    "train.lookahead", "offline.transform", "samples.adaptive", "samples.adaptive_n",
    "evaluate.n",
    "samples.prompts", "samples.amortised",
})  # fmt: skip


def default() -> Any:
    """Returns the defaults as what a config file starts from.

    Returns:
      An ``ml_collections.ConfigDict``, locked: a misspelt key raises where it is set. Only
      ``reward.others`` takes names of the user's own.
    """
    import ml_collections  # the Python API needs no config file

    values = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    # A number or two: ml_collections would hold it to the type of the default.
    n = ml_collections.FieldReference(values.method.n, field_type=object)
    values.method["n"] = n
    values.lock()
    values.reward.others.unlock()
    return values


def parse(values: dict[str, Any]) -> Config:
    """Builds and checks a configuration.

    Args:
      values: Nested dicts of a config; a key that is missing takes its default.

    Returns:
      The configuration.

    Raises:
      InputError: Names the key, its value and what is allowed.
    """
    config = keys.build(Config, values)
    check(config)
    return config


def added(names: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the defaults of the keys that the first workdirs were written without.

    Args:
      names: Keys of a run, of which those of ``reward.others`` have names of the user's own.
    """
    defaults = {name: value for name, value in defaults_flat().items() if name in ADDED}
    for name in names:
        group, _, leaf = name.rpartition(".")
        if group.startswith("reward.others.") and f"reward.{leaf}" in ADDED:
            defaults[name] = defaults[f"reward.{leaf}"]
    return defaults


def defaults_flat() -> dict[str, Any]:
    """Returns the default of every key as a JSON value, by dotted key."""
    return flatten(as_dict(Config()))


__all__ = [
    "METHOD_GROUPS",
    "Config",
    "Evaluator",
    "Fit",
    "Model",
    "Reward",
    "RewardPart",
    "added",
    "as_dict",
    "check",
    "default",
    "defaults_flat",
    "flatten",
    "parse",
    "template_arguments",
]
