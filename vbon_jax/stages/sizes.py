"""Sizes that a machine cannot hold, told before anything is made: least figures, from keys alone.

`plan` computes what a run needs; this is a check of every command, so it must cost nothing.
"""

import os
from collections.abc import Callable

from vbon_jax.config import Config, Model
from vbon_jax.errors import InputError, size

REQUEST_BYTES = 100  # of a response that is asked for, in the list of them
TRAINED_BYTES = 16  # of a parameter: itself, its gradient and two moments


def host_bytes() -> int:
    """Memory of this machine."""
    pages: Callable[[str], int] = os.sysconf
    return pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES")


def refuse_impossible(config: Config, host: int, devices: int) -> None:
    """Refuses sizes that exceed all memory there is.

    Args:
      config: the run's.
      host: bytes of the machine's memory.
      devices: bytes of all devices together.

    Raises:
      InputError: names the keys, what they need at least and what there is.
    """
    for keys, needed in _of_devices(config):
        _refuse(keys, needed, devices, "the devices have")
    for keys, needed in _of_host(config):
        _refuse(keys, needed, host, "this machine has")


def _refuse(keys: str, needed: int, limit: int, has: str) -> None:
    if needed > limit:
        raise InputError(
            f"{keys} needs at least {size(needed)} of memory, and {has} {size(limit)}: lower it; "
            "`vbon plan` with the same flags tells what a run needs"
        )


def _of_devices(c: Config) -> list[tuple[str, int]]:
    found = []
    trained = {
        "reference": (c.reference.model, not c.reference.path),
        "reward": (c.reward.model, not (c.reward.path or c.reward.function)),
        "evaluator": (c.evaluator.model, c.evaluator.train),
    }
    for name, (model, is_trained) in trained.items():
        if is_trained:
            keys = f"{name}.model.layers={model.layers} x {name}.model.width={model.width}"
            found.append((keys, TRAINED_BYTES * _parameters(model)))
    tokens = c.sampling.max_new_tokens
    # A key and a value for each layer, where the model is known; the ids and log-probs in any case.
    m = c.reference.model
    each = 12 + (0 if c.reference.path else 2 * 2 * m.layers * m.width)
    for key, rows in (
        ("sampling.batch_size", c.sampling.batch_size),
        ("train.batch_size", c.train.batch_size),
    ):
        found.append((f"{key}={rows} x sampling.max_new_tokens={tokens}", rows * tokens * each))
    return found


def _of_host(c: Config) -> list[tuple[str, int]]:
    made = [("prompts.test", c.prompts.test, "evaluate.m", c.evaluate.m)]
    if not c.samples.path:
        made.append(("prompts.train", c.prompts.train, "samples.m", c.samples.m))
    given = bool(c.prompts.path or c.prompts.hub)  # which bring their own number, one at least
    return [
        (f"{m}={count}" if given else f"{key}={prompts} x {m}={count}",
         REQUEST_BYTES * count * (1 if given else prompts))
        for key, prompts, m, count in made
    ]  # fmt: skip


def _parameters(model: Model) -> int:
    return 12 * model.layers * model.width**2
